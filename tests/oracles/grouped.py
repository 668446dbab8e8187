"""Grouped InfoNCE and its distillations in one matrix of scores, passages that do not count masked with -inf."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import IGNORED, per_row, reduce, unit_rows


def grouped_info_nce(
    query: Tensor, passages: Tensor, group_size: int, temperature: Any = 0.02, reduction: str = "mean", *,
    teacher_scores: Tensor | None = None, normalize: bool = True, in_batch_negatives: bool = True,
    target: Tensor | None = None, offset: int = 0, key_bias: Tensor | None = None, positive_bias: bool = True,
    distillation: str | None = None,
) -> Tensor:  # fmt: skip
    """Return the loss of queries against groups of passages, of which the first is the positive."""
    if normalize:
        query, passages = unit_rows(query), unit_rows(passages)
    scores = query @ passages.T / per_row(temperature, query, len(query))[:, None]
    row = torch.arange(len(query), device=query.device)
    first = row * group_size + offset if target is None else target
    if key_bias is not None:
        positive = torch.arange(len(passages), device=query.device) == first[:, None]
        scores = torch.where(positive & (not positive_bias), scores, scores + key_bias)
    if target is None:
        group = first[:, None] + torch.arange(group_size, device=query.device)
        local = scores.gather(1, group)
    if in_batch_negatives:
        rows = F.cross_entropy(scores, first, reduction="none", ignore_index=IGNORED)
    else:
        rows = F.cross_entropy(local, torch.zeros_like(row), reduction="none")
    if distillation is not None:
        weight = F.softmax(teacher_scores, dim=1).detach()
    if distillation == "kl_div":
        rows = rows - (F.log_softmax(local, dim=1) * weight).sum(1)
    if distillation == "m3_kd_loss":
        rows = torch.zeros_like(rows)
        for k in range(group_size):
            left_out = torch.zeros_like(scores, dtype=torch.bool).scatter(1, group[:, :k], True)
            terms = F.cross_entropy(scores.masked_fill(left_out, -torch.inf), group[:, k], reduction="none")
            rows = rows + weight[:, k] * terms
    return reduce(rows, reduction, (first != IGNORED).sum())
