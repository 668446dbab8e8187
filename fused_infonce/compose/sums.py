"""Sums of rows of all ranks beside the scores: what they add to the rows' gradient is added where the scores' lies.

A problem over ranks has a handle in place of its rows in the graph (`contract.Problem.handles`). What is made here of
the rows passes the handle on. A backward so is given the gradient that the problem's scores make, and adds to it in
place, a few rows at a time: there is one gradient of the size of all rows, and never another beside it. A sum
therefore comes before the statistics of the problem that it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import KeySet, Problem
from ..backends.indexing import add_rows, slices, take_rows
from ..backends.precision import without_autocast
from ..backends.rows import Rows
from ..contrast import differentiable_once
from .rows import dots, unit

SumOf = Callable[[Tensor, slice], Tensor]


def summed(problem: Problem, of: SumOf, limit: int, place: int = 1) -> tuple[Problem, Tensor]:
    """Return the problem to go on with, and the sum over parts of a set's rows of what `of` makes of a part.

    of: given rows as the logits see them, in the accumulator dtype, and which of the set's they are, a function that is
        linear in the rows. limit: bytes of a part, which has as many rows as there are queries at least. place: of the
        set in `Problem.sets`.
    """
    keys, handle = problem.sets[place], problem.handles[place] if problem.handles else None
    if handle is None:
        y = unit(keys.rows, problem.normalize and keys.norm is None, problem.acc_dtype)
        return problem, of(y, slice(0, len(y)))
    handle, total = _Summed.apply(of, parts_of(problem, limit, place), keys, problem.normalize, handle)
    return passed(problem, place, handle), total


def parts_of(problem: Problem, limit: int, place: int = 1) -> list[slice]:
    """Return the parts of a set's rows that are made at a time, one at least; see `summed`."""
    n, d = problem.query.rows.shape
    rows = max(n, limit // max(4 * d * problem.acc_dtype.itemsize, 1))
    return slices(len(problem.sets[place].rows), rows) or [slice(0, 0)]


def passed(problem: Problem, place: int, handle: Tensor) -> Problem:
    """Return the problem whose rows of a set are another handle's in the graph."""
    handles = list(problem.handles)
    handles[place] = handle
    return replace(problem, handles=tuple(handles))


def seen(keys: KeySet, part: slice | Tensor, normalize: bool, acc: torch.dtype) -> Rows:
    """Return some rows of a set, a slice of them or those at some places, as the logits see them."""
    rows, norm = keys.rows, keys.norm
    if isinstance(part, slice):
        rows, norm = rows[part], None if norm is None else norm[part]
    else:
        rows, norm = take_rows(rows, part), None if norm is None else take_rows(norm, part)
    return Rows(rows, normalize, None, acc) if norm is None else Rows.made([rows, norm], True, False)


def pair_dots(problem: Problem, x: Tensor, rows: Tensor, index: Tensor, limit: int) -> tuple[Problem, Tensor]:
    """Return the problem to go on with, and the dot products (K,) of pairs of rows of x and rows of the first set.

    x: (N, D), differentiable, as are rows of a set without a handle. limit: bytes of the rows of a set with one that
        are taken at a time, or a few times those of a quarter of x
    """
    keys, handle = problem.keys[0], problem.handles[1]
    if handle is None:
        y = unit(take_rows(keys.rows, index), problem.normalize and keys.norm is None, x.dtype)
        return problem, dots(take_rows(x, rows), y)
    handle, found = _PairDots.apply(x, rows, index, keys, problem.normalize, limit, handle)
    return passed(problem, 1, handle), found


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of: SumOf, parts: list[slice], keys: KeySet, normalize: bool, handle: Tensor) -> Any:
        ctx.of, ctx.parts, ctx.normalize, ctx.acc = of, parts, normalize, handle.dtype
        ctx.save_for_backward(keys.rows, keys.norm)
        ctx.set_materialize_grads(False)
        total = None
        for part in parts:
            found = of(seen(keys, part, normalize, handle.dtype).unit, part)
            total = found if total is None else total.add_(found)
        return handle.view_as(handle), total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, upstream: Tensor | None) -> Any:
        rows, norm = ctx.saved_tensors
        if upstream is not None:
            grad = torch.zeros_like(rows, dtype=ctx.acc) if grad is None else grad
            for part in ctx.parts:
                some = seen(KeySet(rows, norm=norm), part, ctx.normalize, ctx.acc)
                with torch.enable_grad(), without_autocast(rows.device.type):
                    y = some.unit.detach().requires_grad_()
                    (of_part,) = torch.autograd.grad(ctx.of(y, part), y, upstream)
                grad[part] += some.finish(of_part.contiguous())
        return None, None, None, None, grad


class _PairDots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, index: Tensor, keys: KeySet, normalize: bool, limit: int, handle: Tensor
    ) -> Any:
        ctx.save_for_backward(x, rows, index, keys.rows, keys.norm)
        step = max(len(x) // 4, limit // max(4 * x.shape[1] * x.element_size(), 1))
        ctx.normalize, ctx.parts = normalize, slices(len(rows), step)
        ctx.set_materialize_grads(False)
        found = x.new_empty(len(rows))
        for part in ctx.parts:
            found[part] = dots(take_rows(x, rows[part]), seen(keys, index[part], normalize, x.dtype).unit)
        return handle.view_as(handle), found

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, upstream: Tensor | None) -> Any:
        x, rows, index, keys, norm = ctx.saved_tensors
        if upstream is None:
            return *[None] * 6, grad
        grad = torch.zeros_like(keys, dtype=x.dtype) if grad is None else grad
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for part in ctx.parts:
            y, w = seen(KeySet(keys, norm=norm), index[part], ctx.normalize, x.dtype), upstream[part, None]
            if grad_x is not None:
                add_rows(grad_x, rows[part], w * y.unit)
            add_rows(grad, index[part], y.finish(w * take_rows(x, rows[part])))
        return grad_x, *[None] * 5, grad
