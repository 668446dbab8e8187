"""The debiased contrastive loss with every exponential in memory: in float64 they fit for temperatures above 0.002."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import info_nce, views


def debiased_info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.5,
    reduction: str = "mean", negative_mode: str = "unpaired", *, tau_plus: float | Tensor = 0.1,
    weight: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Return the loss of queries against keys, each negative a positive with probability `tau_plus`."""
    found = info_nce.directions(query, positive_key, negative_keys, temperature, negative_mode, **options)
    return info_nce.reduced(lambda rows: loss_of(rows, tau_plus), found, reduction, weight)


def debiased_nt_xent(
    view_a: Tensor, view_b: Tensor, temperature: Any = 0.5, reduction: str = "mean", *, tau_plus: float | Tensor = 0.1
) -> Tensor:
    """Return the loss of two views, each row of both against the views of the other samples."""
    found = views.direction(view_a, view_b, temperature, True)
    return info_nce.reduced(lambda rows: loss_of(rows, tau_plus), found, reduction, None)


def loss_of(rows: info_nce.Direction, tau_plus: float | Tensor) -> Tensor:
    """Return (N,) log(1 + G / exp(pos)) with G = max((sum exp - n tau exp(pos)) / (1 - tau), n exp(-1 / t))."""
    return torch.log1p(torch.maximum(*terms(rows, tau_plus)) / rows.pos.exp())


def terms(rows: info_nce.Direction, tau_plus: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the two terms of G, (N,) each: the estimate and its floor."""
    n = rows.count.to(rows.pos.dtype)
    estimate = (rows.negatives.exp().sum(1) - n * tau_plus * rows.pos.exp()) / (1 - tau_plus)
    return estimate, n * torch.exp(-1 / rows.t)
