"""The oracle of a problem's statistics: dense, differentiable any number of times, in the inputs' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.contract import Problem, Statistics
from .backends.reference import unit_rows


def statistics(problem: Problem) -> Statistics:
    """As `contrast.statistics`, but for `mean` and `softmax`, which are NaN."""
    p, acc = problem, problem.temperature.dtype
    query, key, *negatives = (unit_rows(x) if p.normalize else x for x in p.inputs)
    n, m, device = len(query), len(key), query.device
    t = p.temperature.to(query.dtype)[:, None]  # (1, 1) or (N, 1)
    row, column = torch.arange(n, device=device)[:, None], torch.arange(m, device=device)
    target = row if p.target is None else p.target[:, None]
    cosine = query @ key.T
    picked = cosine.gather(1, target.clamp(0, m - 1)) if m else cosine.new_zeros(n, 1)
    pos = torch.where(target == -1, 0, picked / t)[:, 0]

    left_out = target == column
    if p.self_similar:
        left_out = left_out | (row == column)
    if p.row_ids is not None and p.key_ids is not None:
        left_out = left_out | (p.row_ids[:, None] == p.key_ids)
    scores, masks = ([cosine / t], [left_out]) if p.in_batch else ([], [])
    for keys, ids in zip(negatives, p.negative_ids, strict=True):
        scores.append((query @ keys.T if keys.dim() == 2 else torch.einsum("nd,nhd->nh", query, keys)) / t)
        same = torch.zeros_like(scores[-1], dtype=torch.bool)
        masks.append(same if ids is None or p.row_ids is None else p.row_ids[:, None] == ids)
    neg = log_sum(torch.cat(scores, 1), torch.cat(masks, 1)).to(acc)
    mean, softmax = torch.full_like(neg, torch.nan), neg.new_full((2, n), torch.nan)
    if not p.columns:
        return Statistics(pos.to(acc), neg, mean, softmax)
    column_neg = log_sum((cosine / t.T).T, left_out.T).to(acc)  # column j has the temperature of row j
    return Statistics(pos.to(acc), neg, mean, softmax, column_neg, mean, softmax)


def log_sum(scores: Tensor, left_out: Tensor) -> Tensor:
    """(N,) logsumexp over what is not left out; -inf, without a gradient, where that is all."""
    none = left_out.all(1)
    kept = scores.masked_fill(left_out & ~none[:, None], -torch.inf)
    return torch.where(none, -torch.inf, torch.logsumexp(kept, dim=1))
