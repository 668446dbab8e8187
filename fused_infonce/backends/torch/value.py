"""The value alone of a small loss of pairs, in few operators: where nothing has a gradient a call costs nothing else.

The scores are products of the rows as they came, divided by their norms: rows have more components than scores. No
product overflows where no norm does, since |q_i . k_j| <= |q_i| |k_j|.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import LN2, Problem
from ..plan import Plan
from ..row_losses import ROW_LOSSES
from ..rows import norms


class Kind(NamedTuple):
    """What such a loss is besides its rows. Numbers are tensors, which PyTorch would make of them at every use."""

    acc: torch.dtype
    two_views: bool
    columns: bool
    bounded: bool  # whether every exponential fits as it is
    unit: Tensor  # (), t ln 2, by which scores are divided that are to be in base 2
    loss: str
    weight: Tensor  # (N,), of the loss of one row in one direction; with columns (2 N,)

    @staticmethod
    def of(problem: Problem, plan: Plan, loss: str, weight: float) -> Kind:
        rows, acc, columns = problem.query.rows, problem.acc_dtype, problem.columns
        unit = rows.new_full((), LN2 / problem.temperature.inverse, dtype=acc)
        each = rows.new_full((len(rows) * (1 + columns),), weight / (1 + columns), dtype=acc)
        return Kind(acc, problem.two_views, columns, plan.bounded, unit, loss, each)


def value(query: Tensor, key: Tensor | None, kind: Kind) -> Tensor:
    """Return the loss of `Backend.onepass` for a plan of the value alone, with one weight for all rows.

    key: None where the rows are compared with one another.
    """
    if query.dtype != kind.acc:
        query, key = query.to(kind.acc), None if key is None else key.to(kind.acc)
    of_query = norms(query)
    scores = torch.mm(query, query.T if key is None else key.T).div_(of_query)
    of_key = of_query.flatten() if key is None else norms(key, False)
    scores.div_(of_key.mul_(kind.unit))
    own = scores.diagonal()
    if kind.two_views:
        half = query.shape[0] // 2
        views = scores.diagonal(half), scores.diagonal(-half)
        pos = torch.cat(views)
        for view in views:
            view.fill_(-torch.inf)
    else:
        pos = own.clone()
    own.fill_(-torch.inf)
    if kind.bounded:
        e = scores.exp2_()
        sums = torch.stack((e.sum(1), e.sum(0))) if kind.columns else e.sum(1)
    elif kind.columns:
        sums, pos = map(torch.stack, zip(_shifted(scores, 1, pos), _shifted(scores, 0, pos), strict=True))
    else:
        sums, pos = _shifted(scores, 1, pos)
    losses = ROW_LOSSES[kind.loss].value(sums.log_().sub_(pos, alpha=LN2))
    return torch.dot(losses.flatten(), kind.weight)


def _shifted(scores: Tensor, dim: int, pos: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of exponentials along a dimension, and the positives, both less the maximum of the negatives."""
    m = scores.amax(dim, True)
    return torch.sub(scores, m).exp2_().sum(dim), pos - m.flatten()
