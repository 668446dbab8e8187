"""SogCLR and iSogCLR with every logit and every exponential in memory, in float64, as the papers write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class GlobalContrast:
    """The state of the samples, and a training's steps of it; a sample has 0, 1 or 2 temperatures of its own."""

    def __init__(
        self, samples: int, temperature: float, gamma: float, rho: float, two_towers: bool, tables: int, *, lr: float,
        bounds: tuple[float, float], clip: float, beta: float = 0.9,
    ):  # fmt: skip
        self.gamma, self.rho, self.two_towers, self.tables = gamma, rho, two_towers, tables
        self.lr, self.beta, self.bounds, self.clip = lr, beta, bounds, clip
        self.u = torch.zeros(2, samples, dtype=torch.float64)  # of two views both rows are the same
        self.tau = torch.full((2, samples), temperature, dtype=torch.float64)
        self.average = torch.zeros(2, samples, dtype=torch.float64)

    def step(self, a: Tensor, b: Tensor, index: Tensor, temperature: Any = None) -> tuple[Tensor, Tensor]:
        """Return the values of the rows, (2, N), and the mean of what their gradients are those of; move the state."""
        a, b = F.normalize(a.double(), dim=1), F.normalize(b.double(), dim=1)
        n = len(a)
        t = self.tau[:, index] if temperature is None else torch.as_tensor(temperature).double().expand(2, n)
        pos = (a * b).sum(1)
        others = ~torch.eye(n, dtype=torch.bool)
        values, surrogates, fresh, slopes = [], [], [], []
        for side, (x, y) in enumerate([(a, b), (b, a)]):
            keys = y if self.two_towers else torch.cat([y, x])
            kept = others if self.two_towers else others.repeat(1, 2)
            lead = x @ keys.T - pos[:, None] * self.two_towers
            e = torch.where(kept, (lead / t[side][:, None]).exp(), 0)
            g = e.sum(1).detach() / kept.sum(1)
            old = self.u[side, index]
            u = torch.where(old == 0, g, (1 - self.gamma) * old + self.gamma * g)
            p = e.detach() / u[:, None] / kept.sum(1, keepdim=True)  # which add up to g / u
            rest = pos * (not self.two_towers)
            values.append(t[side] * (u.log() + self.rho) - rest)
            surrogates.append((p * lead).sum(1) - rest)
            fresh.append(u)
            slopes.append(u.log() + self.rho - (p * lead / t[side][:, None]).sum(1))
        self._move(index, torch.stack(fresh), torch.stack(slopes).detach())
        return torch.stack(values), torch.stack(surrogates).mean()

    def _move(self, index: Tensor, u: Tensor, slopes: Tensor) -> None:
        self.u[:, index] = u if self.two_towers else u.mean(0)
        if not self.tables:
            return
        slopes = slopes if self.tables == 2 else slopes.mean(0).expand(2, -1)
        slopes = slopes.clamp(-self.clip, self.clip)
        self.average[:, index] = (1 - self.beta) * self.average[:, index] + self.beta * slopes
        self.tau[:, index] = (self.tau[:, index] - self.lr * self.average[:, index]).clamp(*self.bounds)
