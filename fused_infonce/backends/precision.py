"""The dtypes of a call: of its products, of its sums, and of its inputs under autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

# Bits of range, of which a temperature of 1/64 takes 92.3: 2^(a logit up to this), summed over a million columns, and
# its inverse times 1 / t, divided by a million rows, are numbers that the accumulator and on a GPU the products' dtype
# hold with all their digits, but for half a bit where all of this comes together; float16 has no such range.
EXPONENT_ROOM = {torch.float16: 0.0, torch.bfloat16: 92.5, torch.float32: 92.5, torch.float64: 900.0}

AS_IT_IS = nullcontext()
T = TypeVar("T")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and statistics for products in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which the products of x are made: autocast's where it is on, but for float64; else x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the statistics of x, of its loss and of its temperature."""
    return accumulator(x.dtype)  # autocast leaves float64 as it is


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return the context in which products are made in the dtypes of their operands, whatever autocast says."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else AS_IT_IS


def cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return `x` in `dtype`, and where float16 has no range for it the power of two that each row was divided by."""
    if x.dtype == dtype:
        return x, None
    if dtype != torch.float16 or not x.numel():
        return x.to(dtype), None
    exponent = torch.frexp(x.float().abs().amax(-1)).exponent.clamp(-120, 126)
    scale = torch.exp2(exponent.to(torch.float32))  # the largest element of a row ends in [0.5, 1)
    return (x / scale[..., None]).to(dtype), scale


def wide(rows: Tensor) -> tuple[Tensor, AbstractContextManager[Any]]:
    """Return rows in the accumulator dtype, of the values that the products see, and the context to make these in.

    So 16-bit rows that several problems or a problem and a composition share have their gradients added in float32 and
    rounded once.
    """
    dtype, device = product_dtype(rows), rows.device.type
    acc = accumulator(dtype)
    if rows.dtype == acc and dtype != acc:  # float32 rows under autocast
        with torch.no_grad():
            narrow, scale = cast(rows, dtype)
            change = (narrow.to(acc) if scale is None else narrow.to(acc) * scale[..., None]) - rows
        return rows + change, torch.autocast(device, dtype=dtype)
    return rows.to(dtype).to(acc), without_autocast(device) if dtype == acc else torch.autocast(device, dtype=dtype)


def all_wide(tensors: Sequence[Tensor]) -> tuple[list[Tensor], AbstractContextManager[Any]]:
    """Return `wide` of each tensor, and the context of all; a tensor that is there twice stays one."""
    found = each_once(wide, tensors)
    return [rows for rows, _ in found], found[-1][1] if found else nullcontext()


def each_once(function: Callable[[Tensor], T], tensors: Sequence[Tensor]) -> list[T]:
    """Return the function of each tensor, called once for one that is there several times.

    They are told apart by `is`: of an `id` a recording of `torch.compile` would hold for these tensors alone.
    """
    found: list[T] = []
    for i, x in enumerate(tensors):
        before = [j for j in range(i) if tensors[j] is x]
        found.append(found[before[0]] if before else function(x))
    return found


def times(grad: Tensor | None, upstream: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the product in `dtype`, with one rounding and no copy."""
    if grad is None or grad.dtype == dtype:
        return None if grad is None else grad * upstream
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))
