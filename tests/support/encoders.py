"""Encoders with dropout for the tests of gradient caching, and the step that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, D = 6, 16, 4


class Encoder(nn.Module):
    """Rows (n, WIDTH) to embeddings (n, D), with dropout."""

    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.3):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, dtype=dtype), nn.Linear(HIDDEN, D, dtype=dtype)
        self.dropout = dropout

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(F.dropout(F.gelu(self.up(rows)), self.dropout, self.training))


class Text(nn.Module):
    """Token ids (n, L) to embeddings (n, D), as a model of transformers does it, and blind to padding."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.table = nn.Embedding(20, D, dtype=dtype)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        self.seen.append(tuple(input_ids.shape))
        hidden = self.table(input_ids)
        weight = attention_mask.to(hidden.dtype)[..., None]
        return {"last_hidden_state": hidden, "pooler_output": (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)}


def softmax_loss(query: Tensor, key: Tensor, scale: float | Tensor = 5.0) -> Tensor:
    """The dense InfoNCE of unit rows."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return F.cross_entropy(scale * query @ key.T, torch.arange(len(query)))


def by_hand(criterion: Callable[..., Any], *towers: Any, chunk_size: int, seed: int = 1, **arguments: Any) -> Any:
    """The step without caching: the same chunks and random numbers, and the graphs of all chunks kept."""
    torch.manual_seed(seed)
    embeddings = [torch.cat([model(rows) for rows in inputs.split(chunk_size)]) for model, inputs in towers]
    return criterion(*embeddings, **arguments)


def gradients(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a step by hand, zeros where there is none."""
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(parameters, found, strict=True)]


def assert_gradients(parameters: Sequence[Tensor], wanted: Sequence[Tensor], bound: float = 1e-12) -> None:
    """Every gradient within `bound` of the wanted ones, relative to their largest norm."""
    largest = max(w.norm().item() for w in wanted)
    assert largest > 0
    for x, w in zip(parameters, wanted, strict=True):
        found = torch.zeros_like(x) if x.grad is None else x.grad
        error = (found - w).norm().item()
        assert error <= bound * largest, (tuple(x.shape), error, largest)


@dataclass
class Images:
    pixels: Tensor
    kind: str


class Outputs(nn.Module):
    """A model whose embeddings are kept as they come."""

    def __init__(self, model):
        super().__init__()
        self.model, self.found = model, []

    def forward(self, rows):
        y = self.model(rows)
        self.found.append(y.detach().clone())
        return y


def pair(dtype=torch.float64, n=150):
    """Return two towers, of n rows each, and their parameters."""
    torch.manual_seed(0)
    models = Encoder(dtype), Encoder(dtype)
    rows = torch.randn(2, n, WIDTH, dtype=dtype)
    return list(zip(models, rows, strict=True)), [x for model in models for x in model.parameters()]


def parameters_of(*modules):
    """Return the parameters of all modules."""
    return [x for module in modules for x in module.parameters()]
