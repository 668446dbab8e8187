"""Pairs, losses and optimizers of which a diagnosis warns, one thing at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_infonce import FusedInfoNCELoss

N, D = 300, 32


def pairs(noise: float = 1.2) -> tuple[Tensor, Tensor]:
    query = torch.randn(N, D)
    return query, query + noise * torch.randn(N, D)


class Planted(NamedTuple):
    """Arguments of `diagnose`; factor: of the fitted temperature, where none is given."""

    query: Tensor
    key: Tensor
    temperature: float | None = None
    options: dict[str, Any] = {}  # noqa: RUF012
    factor: float = 1.0


def good() -> Planted:
    return Planted(*pairs())


def cold() -> Planted:
    return Planted(*pairs(), factor=1 / 1.8)


def warm() -> Planted:
    return Planted(*pairs(), factor=1.8)


def at_cosine(query: Tensor, mean: float, spread: float) -> Tensor:
    """Return unit rows at about this cosine of unit rows."""
    other = torch.randn_like(query)
    other = F.normalize(other - (other * query).sum(1, keepdim=True) * query, dim=-1)
    cosine = mean + spread * torch.randn(len(query), 1)
    return cosine * query + (1 - cosine**2).sqrt() * other


def one_negative() -> Planted:
    """Each query has a negative of its own that is nearly as good as its positive."""
    query = F.normalize(torch.randn(N, 256), dim=-1)
    positive, negative = at_cosine(query, 0.6, 0.06), at_cosine(query, 0.45, 0.06)
    return Planted(query, positive, options={"negatives": negative[:, None]})


def all_negatives() -> Planted:
    """Pairs that are none, at a temperature above the spread of their cosines."""
    query, key = torch.randn(2, N, 512)
    return Planted(query, key, 0.5)


def collapse() -> Planted:
    """All rows near one direction."""
    query = 0.15 * torch.randn(N, D) + 1
    return Planted(query, query + 0.15 * torch.randn(N, D))


def low_rank() -> Planted:
    """Four directions of 64."""
    few, directions = torch.randn(N, 4), torch.randn(4, 64)
    return Planted(few @ directions, (few + 0.15 * torch.randn(N, 4)) @ directions)


def duplicates() -> Planted:
    """A fifth of the keys are copies of another fifth."""
    query, key = pairs()
    key[:60] = key[60:120]
    return Planted(query, key)


def false_negatives() -> Planted:
    """A fifth of the pairs are noisy copies of another fifth."""
    query, key = pairs()
    for x in (query, key):
        x[:60] = x[60:120] + 0.1 * torch.randn(60, D)
    return Planted(query, key)


def modality_gap() -> Planted:
    """Both sides are shifted, in opposite directions."""
    query, key = pairs()
    shift = 7 * F.normalize(torch.randn(D), dim=0)
    return Planted(query + shift, key - shift)


def rounded() -> Planted:
    """Pairs so far from all others that every probability is nearly 1."""
    query = torch.randn(N, 256)
    return Planted(query, query + 0.7 * torch.randn(N, 256), 0.05)


def with_loss(loss: FusedInfoNCELoss, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> Planted:
    return Planted(*pairs(), options={"loss": loss, "optimizer": optimizer, **options})


def learned(**options: Any) -> FusedInfoNCELoss:
    return FusedInfoNCELoss(0.05, learnable_temperature=True, **options)


def clamped() -> Planted:
    """It stands still at its maximum, which is not called stuck."""
    return with_loss(learned(max_logit_scale=20), history=[0.05] * 80)


def decayed() -> Planted:
    loss = learned()
    return with_loss(loss, torch.optim.AdamW(loss.parameters()))


def stuck() -> Planted:
    return with_loss(learned(max_logit_scale=100), history=[0.05] * 80)


def without_optimizer() -> Planted:
    return with_loss(learned(), torch.optim.Adam(nn.Linear(2, 2).parameters()))


def frozen() -> Planted:
    return with_loss(learned().requires_grad_(requires_grad=False))


PLANTED = {
    good: None, cold: "cold", warm: "warm", one_negative: "one negative", all_negatives: "all negatives",
    collapse: "collapse", low_rank: "collapse", duplicates: "duplicates", false_negatives: "false negatives",
    modality_gap: "modality gap", rounded: "16 bits lose it", clamped: "clamped", decayed: "decayed", stuck: "stuck",
    without_optimizer: "stuck", frozen: "stuck",
}  # fmt: skip


def called(query: Tensor, key: Tensor) -> FusedInfoNCELoss:
    loss = FusedInfoNCELoss(0.05, record=True)
    loss(query, key)
    return loss
