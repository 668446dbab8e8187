"""Rows of all ranks, differentiable, and sums over the ranks: where gradients of a global loss cross processes.

The backward of every rank starts from the gradient of the one global loss times `Call.factor`, by which `total` and
`rows` multiply. What then reaches a rank's own tensors is theirs already; what reaches gathered rows is added over the
ranks in float32; what reaches a tensor that all ranks share is added too, and divided by the factor.

`torch.utils.checkpoint` makes a forward again, with its collectives, where a backward first reads what was saved, and
only up to what was saved last. `total` and `rows` save and read a tensor, so that this is after all collectives of the
forward and before those of the backward, on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import contrast
from .call import ONE, ROWS, Call

T = TypeVar("T")


def gather(
    call: Call, tensors: Sequence[Tensor], counts: Sequence[Sequence[int]], wires: Sequence[torch.dtype | None] = ()
) -> list[Tensor]:
    """Return the rows of all ranks of each tensor, in rank order; gradients are added as they come, in float32.

    counts: of each tensor, its numbers of rows on all ranks. wires: the dtype in which a tensor travels, which has to
        hold its values exactly; None: its own.
    """
    if contrast.is_explaining():
        return [x.new_zeros(1, *x.shape[1:]).expand(sum(c), *x.shape[1:]) for x, c in zip(tensors, counts, strict=True)]
    return list(_Gather.apply(call, counts, wires or [None] * len(tensors), *tensors)) if tensors else []


def handle(call: Call, x: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return what stands for the rows of all ranks in a graph, of their shape and without memory.

    Its gradient, of this dtype, is added over the ranks and rounded once, to that of x.
    """
    return _Handle.apply(call, counts, dtype, x)


def total(call: Call, values: Tensor) -> Tensor:
    """Return the sum over the ranks of a small vector, added in float64 in rank order: bitwise the same on all."""
    return _Total.apply(call, values)


def rows(call: Call, losses: Tensor) -> Tensor:
    """Return this rank's losses as they are; their gradients are those of parts of a global loss."""
    return _Scaled.apply(losses, call.factor)


def shared(call: Call | None, temperature: T) -> T:
    """Return a temperature, the same on all ranks; the gradient of a tensor is that of all their rows.

    A number, and a tensor of one value a row, (N,) or (N, 1), have nothing to share and are returned as they are.
    Whether (1,) is such a tensor, of a rank with one row, is known once the ranks have met.
    """
    if call is None or not isinstance(temperature, Tensor):
        return temperature
    call.temperatures = ONE if temperature.numel() == 1 and temperature.dim() < 2 else ROWS
    whole = call.temperatures == ONE and call.options.parameter_gradients == "mean" and _needs_gradient(temperature)
    return _Shared.apply(call, temperature, True) if whole else temperature


def alike(call: Call | None, tensor: T) -> T:
    """Return a tensor that is the same on all ranks, or None; its gradient is that of all their rows."""
    if call is None or not isinstance(tensor, Tensor) or not _needs_gradient(tensor):
        return tensor
    call.noted += f" one shared tensor of shape {tuple(tensor.shape)} with a gradient;"
    return _Shared.apply(call, tensor, False) if call.options.parameter_gradients == "mean" else tensor


def _needs_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def added(call: Call, x: Tensor) -> Tensor:
    """Return the sum over the ranks, in float64 and rank order."""
    if contrast.is_explaining():
        return x.double() * call.world
    return call.communicator.all_gather(x.double()[None], [1] * call.world)().sum(0)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype. What `to` leaves as it is would be two results of a Function that PyTorch 2.11 has recorded,
    and its gradient that of the second, which nothing has."""
    return x if x.dtype == dtype else x.to(dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, counts: Sequence[Sequence[int]], wires: Sequence[torch.dtype | None], *tensors: Tensor
    ) -> Any:
        ctx.call, ctx.counts, ctx.dtypes = call, counts, [x.dtype for x in tensors]
        begun = []
        for x, each, wire in zip(tensors, counts, wires, strict=True):
            begun.append(call.communicator.all_gather(x.contiguous() if wire is None else x.to(wire), each))
        found = [_cast(rows(), x.dtype) for rows, x in zip(begun, tensors, strict=True)]
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        begun = []
        for needed, grad, counts in zip(ctx.needs_input_grad[3:], upstream, ctx.counts, strict=True):
            begun.append(ctx.call.communicator.reduce_scatter(grad, counts) if needed else None)
        grads = [None if rows is None else rows().to(dtype) for rows, dtype in zip(begun, ctx.dtypes, strict=True)]
        return None, None, None, *grads


class _Handle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, counts: Sequence[int], dtype: torch.dtype, x: Tensor) -> Tensor:
        ctx.call, ctx.counts, ctx.dtype = call, counts, x.dtype
        return x.new_zeros([1] * x.dim(), dtype=dtype).expand(sum(counts), *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, None, ctx.call.communicator.reduce_scatter(upstream, ctx.counts)().to(ctx.dtype)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, values: Tensor) -> Tensor:
        ctx.factor = call.factor
        ctx.save_for_backward(values)
        return _cast(added(call, values), values.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        _ = ctx.saved_tensors
        return None, upstream * ctx.factor


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(losses)
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        _ = ctx.saved_tensors
        return upstream * ctx.factor, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, parameter: Tensor, temperature: bool) -> Tensor:
        ctx.call, ctx.temperature = call, temperature
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.temperature and ctx.call.temperatures == ROWS:
            return None, upstream, None
        return None, (added(ctx.call, upstream) / ctx.call.factor).to(upstream.dtype), None
