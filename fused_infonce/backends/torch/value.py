"""The value alone of a small loss of pairs, in few operators: where nothing has a gradient a call costs nothing else.

The scores are products of the rows as they came, divided by their norms: rows have more components than scores. No
product overflows where no norm does, since |q_i . k_j| <= |q_i| |k_j|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import LN2, Problem
from ..plan import Plan
from ..row_losses import ROW_LOSSES
from ..rows import norms


def value(problem: Problem, plan: Plan, loss: str, weight: float) -> Tensor:
    """Return the loss of `Backend.onepass` for a plan of the value alone, with one weight for all rows."""
    acc, query, key = problem.acc_dtype, problem.query.rows, problem.keys[0].rows
    if query.dtype != acc:
        query, key = query.to(acc), key.to(acc)
    of_query = norms(query)
    scores = torch.mm(query, key.T).div_(of_query)
    of_key = of_query.flatten() if problem.self_similar else norms(key, False)
    scores.div_(of_key.mul_(LN2 / problem.temperature.inverse))  # in base 2
    own = scores.diagonal()
    if problem.two_views:
        half = query.shape[0] // 2
        views = scores.diagonal(half), scores.diagonal(-half)
        pos = torch.cat(views)
        for view in views:
            view.fill_(-torch.inf)
    else:
        pos = own.clone()
    own.fill_(-torch.inf)
    if plan.bounded:
        e = scores.exp2_()
        sums = torch.stack((e.sum(1), e.sum(0))) if problem.columns else e.sum(1)
    elif problem.columns:
        sums, pos = map(torch.stack, zip(_shifted(scores, 1, pos), _shifted(scores, 0, pos), strict=True))
    else:
        sums, pos = _shifted(scores, 1, pos)
    losses = ROW_LOSSES[loss].value(sums.log_().sub_(pos, alpha=LN2))
    return losses.sum().mul_(weight / (1 + problem.columns))


def _shifted(scores: Tensor, dim: int, pos: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of exponentials along a dimension, and the positives, both less the maximum of the negatives."""
    m = scores.amax(dim, True)
    return torch.sub(scores, m).exp2_().sum(dim), pos - m.flatten()
