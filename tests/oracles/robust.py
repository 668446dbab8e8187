"""The robust contrastive loss with every exponential in memory: in float64 they fit for temperatures above 0.003."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import info_nce


def robust_info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.1,
    reduction: str = "mean", negative_mode: str = "unpaired", *, rho: float = 0.3, weight: Tensor | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Return t times the logarithm of the mean exponential lead of the negatives over the positive, plus t rho."""
    found = info_nce.directions(query, positive_key, negative_keys, temperature, negative_mode, **options)
    return info_nce.reduced(lambda rows: loss_of(rows, rho), found, reduction, weight)


def loss_of(rows: info_nce.Direction, rho: float) -> Tensor:
    """Return (N,) losses, 0 for a row without negatives."""
    none = rows.count == 0
    mean = (rows.negatives - rows.pos[:, None]).exp().sum(1) / rows.count.clamp(min=1)
    return torch.where(none, 0, rows.t * (torch.where(none, 1, mean).log() + rho))
