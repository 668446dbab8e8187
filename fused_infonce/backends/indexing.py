"""Rows taken and added by index. Sums are added in the order of the index, so that no result depends on timing: on a
CPU with several threads `index_put_` has no such order, on a GPU `index_add_` has none."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def part_of(x: Any, rows: slice) -> Any:
    """Return those rows of x (N, ...), or x itself where they are all, or it is a number or (1, ...), one for all."""
    whole = isinstance(x, float) or x.shape[0] == 1 or rows.stop - rows.start == x.shape[0]
    return x if whole else x[rows]


def slices(n: int, step: int) -> list[slice]:
    """Return slices of n rows, one after another, of at most `step` rows and at least one."""
    step = max(step, 1)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def same_ids(rows: Tensor, columns: Tensor) -> Tensor:
    """Return (N, M) or (N, H): whether a row agrees with a column in any of its ids.

    rows: (N,), or (N, I) of several ids a row. columns: (M,) or (N, H), or with one dimension more for several.
    """
    if rows.dim() == 1:
        return rows[:, None] == columns
    pairs = zip(rows.unbind(1), columns.unbind(-1), strict=True)
    first, *others = (row[:, None] == column for row, column in pairs)
    for same in others:
        first |= same
    return first


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return x[index], differentiable."""
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]


def add_rows(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Compute out[index] += rows in place, differentiable in rows."""
    if out.device.type == "cpu":
        return out.index_add_(0, index, rows)
    return out.index_put_((index,), rows, accumulate=True)


def add_uses(out: Tensor, index: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Compute out[index_ih] += weight_ih x_i in place, index and weight (N, H), x (N, D)."""
    return add_rows(out, index.flatten(), (weight[..., None] * x[:, None]).flatten(0, 1))
