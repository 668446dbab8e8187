"""InfoNCE with dual temperature, its weights taken from the softmaxes, with every logit in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import info_nce


def dual_temperature_info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.1,
    reduction: str = "mean", negative_mode: str = "unpaired", *, inter_temperature: Any = 1.0,
    weight: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Return -W log(P), where W, the ratio of 1 - P at the second temperature to that at the first, has no gradient."""
    rows = query, positive_key, negative_keys
    cold, counted = info_nce.directions(*rows, temperature, negative_mode, **options)
    warm, _ = info_nce.directions(*rows, inter_temperature, negative_mode, **options)
    ratios = iter([(others(b) / others(a).clamp(min=1e-300)).detach() for a, b in zip(cold, warm, strict=True)])
    return info_nce.reduced(lambda rows: next(ratios) * loss_of(rows), (cold, counted), reduction, weight)


def others(rows: info_nce.Direction) -> Tensor:
    """Return 1 - P, (N,), from the negatives' share."""
    return torch.exp(rows.neg - torch.logaddexp(rows.pos, rows.neg))


def loss_of(rows: info_nce.Direction) -> Tensor:
    """Return -log(P), (N,), 0 for a row without negatives."""
    none = rows.count == 0
    return torch.where(none, 0, torch.log1p(torch.exp(torch.where(none, 0, rows.neg) - torch.where(none, 0, rows.pos))))
