"""Losses whose sums over negatives are moving averages over the batches of a training, kept as logarithms."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Problem, RowStatistics
from .rows import last_of_each, log_add, negative_counts


class Estimate(NamedTuple):
    """What a batch says of its rows, (N,) each.

    losses: t (log u + b - pos + rho), whose gradient is that of the moving average's estimator
    log_u: the logarithms of the moving averages, this batch included; -inf for a row that never had negatives
    slope: of the loss in the row's temperature
    """

    losses: Tensor
    log_u: Tensor
    slope: Tensor


def estimate(problem: Problem, rows: RowStatistics, old: Tensor, gamma: float, rho: float, relative: bool) -> Estimate:
    """Return the estimate of a direction, from the moving averages before, (N,), -inf where there is none.

        log g = neg - log M - b,    u = (1 - gamma) u_old + gamma g,    b = pos if `relative` else 0

    A gradient flows as through log g, times g / u: a moving average has that of its last term over its own value. The
    slope needs `rows.mean`: dL/dt = log u + rho - g / u (mean - b).
    """
    t, none = problem.temperature.values, rows.neg == -torch.inf
    b = rows.pos if relative else torch.zeros_like(rows.pos)
    count = negative_counts(problem).clamp(min=1).to(t.dtype)
    log_g = rows.neg.masked_fill(none, 0) - torch.log(count) - b
    with torch.no_grad():
        kept = old + (math.log1p(-gamma) if gamma < 1 else -math.inf)
        fresh = old == -torch.inf
        log_u = torch.where(fresh, log_g, log_add(kept, log_g + math.log(gamma)))
        ratio = torch.exp(log_g - log_u)  # g / u, at most 1 / gamma
        slope = log_u + rho - ratio * (rows.mean - b)
    losses = t * (log_u + ratio * (log_g - log_g.detach()) + b - rows.pos + rho)
    return Estimate(losses.masked_fill(none, 0), torch.where(none, old, log_u), slope.masked_fill(none, torch.nan))


@torch.no_grad()
def put_last(table: Tensor, index: Tensor, new: Tensor) -> None:
    """Write values of samples, (N,), into their places of a table in place.

    Of a sample that is there twice the last counts, and one whose value is not finite stays as it is.
    """
    new = new[last_of_each(index)].to(table.dtype)
    table.index_copy_(0, index, torch.where(new.isfinite(), new, table[index]))
