"""NT-Xent and SupCon with the logits of all rows of all views in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import per_row, reduce, unit_rows
from .info_nce import Direction


def direction(view_a: Tensor, view_b: Tensor, temperature: Any, normalize: bool) -> tuple[list[Direction], Tensor]:
    """Return the rows of two views, with the other view as the positive and the other samples' as negatives."""
    logits, same_sample, t = self_similarity([view_a, view_b], temperature, normalize)
    index = torch.arange(len(logits), device=logits.device)
    pos = logits[index, index.roll(len(view_a))]
    return [Direction(pos, logits.masked_fill(same_sample, -torch.inf), t)], torch.ones_like(index, dtype=torch.bool)


def self_similarity(views: Sequence[Tensor], temperature: Any, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of all rows of all views, which pairs are of one sample, and the temperatures."""
    rows = torch.cat(list(views))
    rows = unit_rows(rows) if normalize else rows
    t = per_row(temperature, rows, len(rows))
    sample = torch.arange(len(rows), device=rows.device) % max(len(views[0]), 1)
    return rows @ rows.T / t[:, None], sample == sample[:, None], t


def nt_xent(
    view_a: Tensor, view_b: Tensor, temperature: Any = 0.1, reduction: str = "mean", *,
    more_views: Sequence[Tensor] = (), normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Return the mean over the pairs of views, and over the rows, of -log(exp(s_ij) / (exp(s_ij) + exp(neg_i)))."""
    views = (view_a, view_b, *more_views)
    logits, same_sample, _ = self_similarity(views, temperature, normalize)
    neg = torch.logsumexp(logits.masked_fill(same_sample, -torch.inf), dim=1)
    positive = same_sample & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    pairs = -F.logsigmoid(logits - neg[:, None])
    return reduce(torch.where(positive, pairs, 0).sum(1) / (len(views) - 1), reduction)


def sup_con(
    features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, temperature: Any = 0.07,
    contrast_mode: str = "all", base_temperature: float | None = 0.07, reduction: str = "mean", *,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Return the loss of (N, V, ...) features, each anchor's mean over its weighted positives."""
    samples, views = features.shape[:2]
    rows = torch.cat(features.flatten(2).unbind(1))  # (V N, D)
    rows = unit_rows(rows) if normalize else rows
    t = per_row(temperature, rows, 1)
    if mask is None:
        classes = torch.arange(samples, device=rows.device) if labels is None else labels.flatten()
        mask = classes[:, None] == classes
    anchors = samples if contrast_mode == "one" else len(rows)
    index = torch.arange(len(rows), device=rows.device)
    itself = index[:anchors, None] == index
    weights = mask.to(rows.dtype).repeat(anchors // max(samples, 1), views).masked_fill(itself, 0)

    logits = rows[:anchors] @ rows.T / t
    others = logits.masked_fill(itself, -torch.inf)
    lse = torch.logsumexp(others, dim=1, keepdim=True)
    largest = others == (others.amax(1, keepdim=True) if len(rows) else others)
    largest &= largest.cumsum(1) == 1
    rest = torch.logsumexp(others.masked_fill(largest, -torch.inf), dim=1, keepdim=True)
    pairs = torch.where(largest, -F.logsigmoid(logits - rest), lse - logits)  # lse - the largest logit would cancel
    count = weights.sum(1)
    loss = torch.where(weights > 0, weights * pairs, 0).sum(1) / torch.where(count == 0, 1, count)
    factor = 1 if base_temperature is None else t.detach() / base_temperature  # a gradient of it would shrink t
    return reduce(loss * factor, reduction)
