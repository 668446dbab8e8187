"""Small problems in PyTorch, all scores at once: there calls of operators are the cost, and not their arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import OnePass, Problem
from ..row_losses import LOSSES
from .keys import Rows

LOG2E, LN2 = math.log2(math.e), math.log(2)


def onepass(problem: Problem, kind: str, weight: Tensor, wanted: Sequence[bool]) -> OnePass:
    """As `backend_torch.onepass`, for normalised queries and keys with one temperature, no ids and no negatives apart,
    whose exponentials fit as they are. E (N, M) holds 2^score in base 2, then the coefficients W; X, Y the unit rows.

    one direction   dX = W Y, dY = W' X        W = f E        f_i = u_i / sum_j E_ij
    both            the same                   W = (f + f') E      columns' f' beside the rows' f
    Q is K          dX = W X                   W = (f + f^T) E     E being symmetric
    """
    loss_of, slope_of = LOSSES[kind]
    same = problem.self_similar
    stacked = problem.query if same else torch.cat([problem.query, problem.key])  # as many keys: there are no targets
    rows = Rows(stacked, True, None, problem.acc_dtype)
    n = len(problem.query)
    x, y = (rows.unit, rows.unit) if same else (rows.unit[:n], rows.unit[n:])
    inv_t = 1 / problem.temperature.item()
    e = x.new_empty(n, n).addmm_(x, y.T, beta=0, alpha=LOG2E * inv_t)
    own, target = e.diagonal(), None if problem.target is None else problem.target.unsqueeze(1)
    pos = own.clone() if target is None else e.gather(1, target).squeeze(1)
    own.fill_(-torch.inf)
    if target is not None:
        e.scatter_(1, target, -torch.inf)
    e.exp2_()
    sums = [e.sum(1), e.sum(0)] if problem.columns else [e.sum(1)]
    margins = [torch.sub(total.log(), pos, alpha=LN2) for total in sums]  # neg - pos
    losses = [loss_of(margin) for margin in margins]
    share = weight.item() / len(margins)
    loss = (losses[0] if len(losses) == 1 else losses[0] + losses[1]).sum().mul_(share)
    if not any(wanted):
        return OnePass(loss, [None, None], None)

    slopes = [slope_of(margin) for margin in margins]
    factors = [slope / total for slope, total in zip(slopes, sums, strict=True)]  # more than one row, so no sum is 0
    both = same or problem.columns
    factor = factors[0].unsqueeze(1)
    e.mul_(factor + factors[-1] if both else factor)
    v = slopes[0] + slopes[1] if problem.columns else slopes[0]
    if target is None or problem.target is None:
        torch.neg(v, out=own)
    else:
        e.scatter_(1, target, (v + v.index_select(0, problem.target)).neg_().unsqueeze(1))
    grad, scale = torch.empty_like(rows.unit), share * inv_t
    sides = [grad] if same else [grad[:n], grad[n:]]
    if wanted[0] or wanted[-1]:
        sides[0].addmm_(e, y, beta=0, alpha=scale)
    if wanted[1]:
        sides[1].addmm_(e.T, x, beta=0, alpha=scale)
    dt = None
    if wanted[-1]:  # x_i . G_i = u_i mean_i + v_i pos_i, summed over i that of the other side too
        dt = torch.linalg.vecdot(sides[0], x) * (-inv_t / 2 if same else -inv_t)
    rows.finish(grad)
    grads = [sides[0] if wanted[0] else None, sides[1] if wanted[1] else None]
    return OnePass(loss, grads, dt)
