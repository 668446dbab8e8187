"""What is trained, apart from its temperature: embeddings of pairs to train on, to fit with, and to test with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, vstack
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ..retrieval.mining import Pair
from ..retrieval.model import Bags, Encoder, hashed_features
from ..retrieval.split import split_pairs

CPU = torch.device("cpu")
Embeddings = tuple[Tensor, Tensor]  # of the queries and of their keys, (N, D) each


@dataclass(frozen=True)
class Task:
    """A model and three sets of pairs.

    model: makes an untrained one, whose weights follow from PyTorch's seed. embed: the embeddings of these pairs, by
    index. train, fitting, test: the indices of the three sets.
    """

    title: str
    model: Callable[[], nn.Module]
    embed: Callable[[nn.Module, Tensor], Embeddings]
    train: Tensor
    fitting: Tensor
    test: Tensor
    batch: int
    epochs: int
    learning_rate: float

    @property
    def steps(self) -> int:
        """How many steps a training has."""
        return self.epochs * (len(self.train) // self.batch)


def docstrings(pairs: list[Pair], held_out: int, seed: int, dim: int, batch: int, epochs: int) -> Task:
    """Returns the retriever of `make demo`; a pair shows its query with or without the words of its name, at random."""
    split = split_pairs(pairs, 2 * held_out, seed)
    every = [*split.train, *split.held_out]
    queries = vstack([hashed_features([p.query for p in every]), hashed_features([p.strict_query for p in every])])
    queries, keys = queries.tocsr(), hashed_features([pair.key for pair in every])
    form = torch.randint(2, (len(every),), generator=torch.Generator().manual_seed(seed))

    def bags(rows: csr_matrix) -> Bags:
        return Bags.of(rows, CPU)

    def embed(model: nn.Module, chosen: Tensor) -> Embeddings:
        # a pair that is trained on shows both forms in turn, and the others one of them each time
        of_form = torch.randint(2, (len(chosen),)) if model.training else form[chosen]
        rows = (chosen + of_form * len(every)).numpy()
        return model(bags(queries[rows])), model(bags(keys[chosen.numpy()]))

    train, (fitting, test) = torch.arange(len(split.train)), torch.arange(len(split.train), len(every)).chunk(2)
    return Task(
        "docstrings and what they document", lambda: Encoder(dim), embed, train, fitting, test,
        min(batch, len(train)), epochs, 2e-3,
    )  # fmt: skip


class Halves(nn.Module):
    """A small network for each half of an image."""

    def __init__(self, pixels: int, dim: int = 32):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(pixels, 128), nn.GELU(), nn.Linear(128, dim)) for _ in range(2)
        )

    def forward(self, halves: Sequence[Tensor]) -> Embeddings:
        left, right = (tower(half) for tower, half in zip(self.towers, halves, strict=True))
        return left, right


def digits(seed: int, epochs: int) -> Task:
    """Returns the task of finding the right half of a handwritten digit by its left half, among those of 400 others."""
    images = torch.from_numpy(load_digits().images.astype(np.float32)) / 16  # (N, 8, 8)
    halves = [half.flatten(1) for half in images.split(4, dim=2)]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, fitting, test = order[:997], order[997:1397], order[1397:]
    return Task(
        "halves of handwritten digits", lambda: Halves(halves[0].shape[1]),
        lambda model, chosen: model([half[chosen] for half in halves]), train, fitting, test, 256, epochs, 2e-3,
    )  # fmt: skip


@torch.no_grad()
def embedded(task: Task, model: nn.Module, chosen: Tensor, batch: int = 2048) -> Embeddings:
    """Returns unit embeddings of these pairs as an evaluation sees them, and leaves the model training."""
    model.eval()
    parts = [task.embed(model, rows) for rows in chosen.split(batch)]
    model.train()
    query, key = (F.normalize(torch.cat(side), dim=-1) for side in zip(*parts, strict=True))
    return query, key
