"""A model that embeds vectors, and its temperature through a training as plain code has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fused_infonce import FusedInfoNCELoss
from fused_infonce.temperature import CosineTemperature, HeldOutTemperature

STEPS, BATCH, WIDTH = 6, 16, 8


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(STEPS * BATCH, WIDTH, generator=generator)
    return query, query + torch.randn(len(query), WIDTH, generator=generator)


def held_out() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(60, WIDTH, generator=generator)
    return query, query + 2 * torch.randn(60, WIDTH, generator=generator)


def encoder() -> nn.Module:
    """Return a model with dropout, which held-out pairs must be embedded without."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))


def pairs(model) -> tuple[Tensor, Tensor]:
    """Embed the held-out pairs by a model, which must then be one that is evaluated without gradients."""
    assert not torch.is_grad_enabled()
    assert not any(module.training for module in model.modules())
    return tuple(model(x) for x in held_out())


def source(kind: str):
    """Return a loss and what sets its temperature: a schedule, held-out pairs or nothing."""
    loss = FusedInfoNCELoss(temperature=0.3, record=True)
    steppers = {
        "schedule": lambda: CosineTemperature(loss, low=0.1, high=0.9, period=8),
        "held out": lambda: HeldOutTemperature(loss, every=2),
        "loss": lambda: loss,
    }
    return loss, steppers[kind]()


def scheduled() -> list[float]:
    """Return the temperatures of the steps by the schedule of `source`."""
    return [0.1 + 0.8 * (1 + math.cos(2 * math.pi * step / 8)) / 2 for step in range(STEPS)]
