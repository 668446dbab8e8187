"""The model-aware contrastive loss with every logit in memory, its weights taken from the softmax itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import info_nce, views
from .common import unit_rows


def at_alignment(cosines: Tensor, counted: Tensor, temperature: Any, alpha: float, threshold: float) -> Any:
    """Return the temperature by the mean cosine of the pairs that count."""
    alignment = torch.where(counted, cosines, 0).sum() / counted.sum() if counted.any() else torch.tensor(threshold)
    return temperature * (1 + alpha * (alignment.detach() - threshold))


def model_aware_info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.1,
    reduction: str = "mean", negative_mode: str = "unpaired", *, alpha: float = 0.5, threshold: float = 0.0,
    weight: Tensor | None = None, target: Tensor | None = None, normalize: bool = True, **options: Any,
) -> Tensor:  # fmt: skip
    """Return -log(P) / (1 - P), the divisor without a gradient, at the temperature of the alignment."""
    x, y = (unit_rows(z) if normalize else z for z in (query, positive_key))
    counted = torch.ones(len(x), dtype=torch.bool) if target is None else target != options.get("ignore_index", -100)
    positive = y if target is None else y[target.masked_fill(~counted, 0)] if len(y) else torch.zeros_like(x)
    t = at_alignment((x * positive).sum(1), counted.to(x.device), temperature, alpha, threshold)
    found = info_nce.directions(
        query, positive_key, negative_keys, t, negative_mode, target=target, normalize=normalize, **options
    )
    return info_nce.reduced(loss_of, found, reduction, weight)


def model_aware_nt_xent(
    view_a: Tensor, view_b: Tensor, temperature: Any = 0.1, reduction: str = "mean", *, alpha: float = 0.5,
    threshold: float = 0.0, normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Return the loss of two views, each row of both against the views of the other samples."""
    x, y = (unit_rows(z) if normalize else z for z in (view_a, view_b))
    counted = torch.ones(len(x), dtype=torch.bool, device=x.device)
    t = at_alignment((x * y).sum(1), counted, temperature, alpha, threshold)
    return info_nce.reduced(loss_of, views.direction(view_a, view_b, t, normalize), reduction, None)


def loss_of(rows: info_nce.Direction) -> Tensor:
    """Return (N,) losses, 0 for a row without negatives."""
    none = rows.count == 0
    neg = torch.where(none, rows.pos.detach(), rows.neg)
    both = torch.logaddexp(rows.pos, neg)
    others = torch.exp(neg - both).detach()  # 1 - P, from what is added up of it
    return torch.where(none, 0, torch.log1p(torch.exp(neg - rows.pos)) / others)
