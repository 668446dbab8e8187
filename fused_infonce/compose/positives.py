"""Pairs of rows and keys of equal ids, and the logits of chosen pairs, without the N x M matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Options
from ..backends.indexing import slices
from ..contrast import differentiable_once


def members(row_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys sorted by id, (M,), and for each row the first key of its id among them and their number, (N,).

    Keys of one id keep their order.
    """
    ordered, order = torch.sort(key_ids, stable=True)
    first, end = (torch.searchsorted(ordered, row_ids, right=right) for right in (False, True))
    return order, first, end - first


def equal_pairs(row_ids: Tensor, key_ids: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the rows and the keys, (P,) int64 each, of the P pairs of one id, ordered by row, then by key.

    own: (N,) the key that makes no pair with row i; -1 for none.
    """
    order, first, count = members(row_ids, key_ids)
    rows = torch.arange(len(row_ids), device=row_ids.device).repeat_interleave(count)
    start = count.cumsum(0) - count  # where a row's pairs begin
    keys = order[torch.arange(len(rows), device=rows.device) + (first - start)[rows]]
    if own is None:
        return rows, keys
    others = keys != own[rows]
    return rows[others], keys[others]


def pair_margins(
    neg: Tensor, x: Tensor, y: Tensor, rows: Tensor, keys: Tensor, workspace_limit: int | None = None
) -> Tensor:
    """Compute (P,) `neg_i - x_i . y_j` of the pairs (i, j), differentiable in neg (N,), x (N, D) and y (M, D).

    Rows are gathered in parts that fit the workspace limit. Gradients are always added in the same order.
    """
    return _Margins.apply(neg, x, y, rows, keys, Options(workspace_limit=workspace_limit).limit(x.device))


class _Margins(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, neg: Tensor, x: Tensor, y: Tensor, rows: Tensor, keys: Tensor, limit: int) -> Tensor:
        ctx.save_for_backward(x, y, rows, keys)
        margins = neg[rows]
        step = limit // max(3 * x.shape[1] * x.element_size(), 1)  # for rows, keys and their products
        for part in slices(len(rows), step):
            margins[part] -= torch.linalg.vecdot(x[rows[part]], y[keys[part]])
        return margins

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x, y, rows, keys = ctx.saved_tensors
        grad_neg = grad_x = grad_y = None
        if ctx.needs_input_grad[0]:
            grad_neg = sums(rows, len(x), torch.zeros_like(keys), upstream, x.new_ones(1, 1))[:, 0]
        if ctx.needs_input_grad[1]:
            grad_x = sums(rows, len(x), keys, -upstream, y)
        if ctx.needs_input_grad[2]:
            grad_y = sums(keys, len(y), rows, -upstream, x)
        return grad_neg, grad_x, grad_y, None, None, None


def sums(place: Tensor, count: int, index: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Compute (count, D) sums of `weight_k rows[index_k]` over the k of each place, without a copy of the rows."""
    ordered, order = torch.sort(place, stable=True)
    first = torch.searchsorted(ordered, torch.arange(count, device=place.device))
    return F.embedding_bag(index[order], rows, first, mode="sum", per_sample_weights=weight[order])
