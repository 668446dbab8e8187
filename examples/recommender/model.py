"""Two towers, and how often they find the film that was held out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Ratings

TOP = 10


class Tower(nn.Module):
    """A table of embeddings, each changed by a small network: put your own features of a user or an item here."""

    def __init__(self, names: int, dim: int):
        super().__init__()
        self.table = nn.Embedding(names, dim)
        nn.init.normal_(self.table.weight, std=0.1)
        self.change = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, index: Tensor) -> Tensor:
        """Returns the (n, dim) embeddings of (n,) names."""
        rows = self.table(index)
        return rows + self.change(rows)

    def all(self) -> Tensor:
        """Returns the embeddings of all names."""
        return self(torch.arange(self.table.num_embeddings, device=self.table.weight.device))


@dataclass(frozen=True)
class Scores:
    """Metrics of a full ranking: every item that the user has not seen takes part.

    hit_rate: the share of users whose held-out item is among the first TOP
    ndcg: the mean of 1 / log2(1 + rank) over users, 0 for those whose item is not among the first TOP
    """

    hit_rate: float
    ndcg: float


def ranked(scores: Tensor, ratings: Ratings) -> Scores:
    """Returns the metrics of (U, I) scores. A tie counts as a miss: the held-out item comes after its equals."""
    scores = scores.masked_fill(ratings.seen, -math.inf)
    own = scores.gather(1, ratings.held_out[:, None])
    rank = (scores >= own).sum(1)
    found = rank <= TOP
    gain = torch.where(found, 1 / torch.log2(1 + rank.double()), 0.0)
    return Scores(found.double().mean().item(), gain.mean().item())


@torch.no_grad()
def evaluate(users: Tower, items: Tower, ratings: Ratings) -> Scores:
    """Returns the metrics of two towers, whose scores are cosines."""
    return ranked(F.normalize(users.all(), dim=1) @ F.normalize(items.all(), dim=1).T, ratings)
