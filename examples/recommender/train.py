"""Training of the two towers by one of the losses that the demo compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_infonce import info_nce

from .data import Ratings
from .model import Scores, Tower, evaluate


@dataclass(frozen=True)
class Options:
    """What a training is made with; the defaults are those of the demo."""

    epochs: int = 10
    batch: int = 1024
    dim: int = 64
    temperature: float = 0.1
    learning_rate: float = 3e-3


class Losses:
    """The losses that are compared, by name: of the users and items of some pairs, given by their numbers."""

    def __init__(self, users: Tower, items: Tower, ratings: Ratings, temperature: float):
        self.users, self.items, self.temperature = users, items, temperature
        self.bias = -ratings.log_frequency

    def in_batch(self, user: Tensor, item: Tensor, **more: Any) -> Tensor:
        """Returns InfoNCE against the batch's other items; the row's own item, drawn twice, is no negative."""
        return info_nce(self.users(user), self.items(item), temperature=self.temperature, key_ids=item, **more)

    def corrected(self, user: Tensor, item: Tensor) -> Tensor:
        """Returns InfoNCE with log q_j taken off every logit.

        An item is drawn into a batch as often as it is seen, q_j. Without the correction it is pushed away as often,
        and the popular are recommended too seldom.
        """
        return self.in_batch(user, item, key_bias=self.bias[item])

    def full(self, user: Tensor, item: Tensor) -> Tensor:
        """Returns the softmax over all items, which the other two estimate."""
        return info_nce(self.users(user), self.items.all(), temperature=self.temperature, target=item)


NAMES = {"in-batch": "in_batch", "in-batch, corrected": "corrected", "full softmax": "full"}


def train(name: str, ratings: Ratings, options: Options, seed: int, progress: Callable[[], None]) -> Scores:
    """Returns the metrics of two towers after a training with one of NAMES; `progress` is called after every epoch."""
    torch.manual_seed(seed)
    users, items = (Tower(count, options.dim) for count in ratings.names)
    loss = getattr(Losses(users, items, ratings, options.temperature), NAMES[name])
    optimizer = torch.optim.AdamW([*users.parameters(), *items.parameters()], options.learning_rate, weight_decay=1e-4)
    for _ in range(options.epochs):
        for pairs in torch.randperm(len(ratings.users)).split(options.batch):
            optimizer.zero_grad()
            loss(ratings.users[pairs], ratings.items[pairs]).backward()
            optimizer.step()
        progress()
    return evaluate(users, items, ratings)
