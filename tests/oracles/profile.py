"""A profile from the list of each row's products, one row and one temperature at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .row_lists import rows_of

Dense = dict[str, Tensor]  # by the names of a sweep's attributes


def profile(query: Tensor, key: Tensor, temperatures: Tensor, negatives: Tensor | None = None, **options: Any) -> Dense:
    """Return what a sweep holds, with ranks by exact comparison; options: those of `rows_of`."""
    mode = "paired" if negatives is not None and negatives.dim() == 3 else "unpaired"
    rows = rows_of(
        query, key, negatives, 1.0, negative_mode=mode, in_batch_negatives=True, **options
    )  # fmt: skip
    columns = []
    for row in rows:
        assert row is not None
        d = row.others
        found = {"pos": row.pos, "above": (d > row.pos).sum(), "ties": (d == row.pos).sum()}
        found["hardest"] = d.max() if len(d) else torch.full_like(row.pos, -math.inf)
        at = [_at(d, t) for t in temperatures.tolist()]
        columns.append(found | {name: torch.stack(x) for name, x in zip(NAMES, zip(*at, strict=True), strict=True)})
    return {name: torch.stack([column[name] for column in columns], -1) for name in columns[0]}


NAMES = ("log_z", "mean", "variance")


def _at(d: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    if not len(d):
        return d.new_tensor(-math.inf), d.new_zeros(()), d.new_zeros(())
    p = torch.softmax(d / t, 0)
    mean = (p * d).sum()
    return torch.logsumexp(d / t, 0), mean, (p * (d - mean) ** 2).sum()
