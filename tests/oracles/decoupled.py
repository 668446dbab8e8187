"""The decoupled contrastive loss (DCL) with every logit in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import info_nce, views


def decoupled_info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.1,
    reduction: str = "mean", negative_mode: str = "unpaired", *, positive_weight: Tensor | None = None,
    weight: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Return log(sum of the negatives' exponentials) less the weighted logit of the positive, reduced over the rows."""
    found = info_nce.directions(query, positive_key, negative_keys, temperature, negative_mode, **options)
    return info_nce.reduced(lambda rows: loss_of(rows, positive_weight), found, reduction, weight)


def decoupled_nt_xent(
    view_a: Tensor, view_b: Tensor, temperature: Any = 0.1, reduction: str = "mean", *,
    positive_weight: Tensor | None = None, normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Return the decoupled loss of two views, each row of both against the views of the other samples."""
    found = views.direction(view_a, view_b, temperature, normalize)
    return info_nce.reduced(lambda rows: loss_of(rows, positive_weight), found, reduction, None)


def loss_of(rows: info_nce.Direction, positive_weight: Tensor | None) -> Tensor:
    """Return (N,) losses, 0 for a row without negatives."""
    pos = rows.pos if positive_weight is None else positive_weight * rows.pos
    none = rows.count == 0
    return torch.where(none, 0, torch.where(none, 0, rows.neg) - torch.where(none, 0, pos))
