"""A loss of one's own on `fused_infonce.statistics`: `python examples/custom_loss.py`, seconds on a CPU.

The focal loss on top of InfoNCE: a pair that is already told apart counts little. No matrix of logits is held. Before
the training it is compared with the dense formula. docs/own-loss.md has two more losses, and what to mind.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_infonce import statistics

WIDTH, HIDDEN, DIM = 64, 16, 32
BATCH, STEPS = 256, 100


class FocalInfoNCE(nn.Module):
    """The loss `-(1 - p_i)^gamma log p_i`, where p_i is the probability of row i's positive, with a learned scale."""

    def __init__(self, temperature: float = 0.07, gamma: float = 1.0):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))
        self.gamma = gamma

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns the mean of the rows' losses."""
        rows = statistics(query, key, temperature=torch.exp(-self.logit_scale))
        x = rows.neg - rows.pos  # p = sigmoid(-x): a difference first, and no `1 - p`, so that no digit is lost
        return (torch.exp(self.gamma * F.logsigmoid(x)) * -F.logsigmoid(-x)).mean()


def dense(query: Tensor, key: Tensor, temperature: float, gamma: float) -> Tensor:
    """Computes the loss from the whole matrix, as its formula reads."""
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / temperature
    p = torch.softmax(logits, dim=1).diagonal()
    return (-((1 - p) ** gamma) * torch.log(p)).mean()


def encoder() -> nn.Module:
    """Makes an encoder; put your own model in its place."""
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, DIM))


class Pairs:
    """A source of pairs: two noisy views of one hidden vector each."""

    def __init__(self) -> None:
        self.maps = torch.randn(2, HIDDEN, WIDTH)

    def sample(self, pairs: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(pairs, HIDDEN)
        query, key = (torch.tanh(hidden @ mixing) + 0.3 * torch.randn(pairs, WIDTH) for mixing in self.maps)
        return query, key


@torch.no_grad()
def recall(queries: nn.Module, keys: nn.Module, query: Tensor, key: Tensor) -> float:
    """Returns the share of queries whose own key is the nearest."""
    similarity = F.normalize(queries(query), dim=-1) @ F.normalize(keys(key), dim=-1).T
    return (similarity.argmax(dim=1) == torch.arange(len(query))).float().mean().item()


def main() -> None:
    """Compares the loss with its formula, trains two encoders with it, and prints what they learned."""
    torch.manual_seed(0)
    pairs, loss = Pairs(), FocalInfoNCE()
    query, key = torch.randn(2, BATCH, DIM, dtype=torch.float64)
    both = loss(query, key).item(), dense(query, key, 0.07, loss.gamma).item()
    print(f"focal InfoNCE of random rows: {both[0]:.7f}, by the dense formula {both[1]:.7f}")

    queries, keys = encoder(), encoder()
    parameters: list[dict[str, Any]] = [
        {"params": [*queries.parameters(), *keys.parameters()]},
        {"params": loss.parameters(), "weight_decay": 0.0},  # weight decay would pull the scale towards 1
    ]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    held_out = pairs.sample(1000)
    print(f"R@1 among 1000 unseen pairs, before: {recall(queries, keys, *held_out):.3f}")
    for step in range(1, STEPS + 1):
        query, key = pairs.sample(BATCH)
        value = loss(queries(query), keys(key))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step}: loss {value.item():.4f}, scale {loss.logit_scale.exp().item():.1f}")
    print(f"R@1 among 1000 unseen pairs, after: {recall(queries, keys, *held_out):.3f}")


if __name__ == "__main__":
    main()
