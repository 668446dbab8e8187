"""Small problems in PyTorch, all scores at once: there calls of operators are the cost, and not their arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import LN2, LOG2E, OnePass, Problem
from ..plan import Plan
from ..precision import EXPONENT_ROOM
from ..row_losses import ROW_LOSSES
from .keys import Rows


def onepass(problem: Problem, plan: Plan, loss: str, weight: Tensor, wanted: Sequence[bool]) -> OnePass:
    """Compute what `Backend.onepass` does, for plain problems with one temperature and one weight, on a CPU.

    E (N, M) holds 2^(score - shift) in base 2, then the coefficients W; x, y are the rows as the logits see them.

        one direction   dX = W Y, dY = W' X        W = f E        f_i = u_i / sum_j E_ij
        both            the same                   W = (f + f') E      columns' f' beside the rows' f
        Q is K          dX = W X                   W = (f + f^T) E     E being symmetric
    """
    same, n = problem.self_similar, problem.query.rows.shape[0]
    rows = _stacked(problem)
    x, y = (rows.unit, rows.unit) if same else (rows.unit[:n], rows.unit[n:])
    inv_t = 1 / problem.temperature.values.item()
    e = x.new_empty(n, n).addmm_(x, y.T, beta=0, alpha=LOG2E * inv_t)
    own, target = e.diagonal(), None if problem.target is None else problem.target.unsqueeze(1)
    pos = own.clone() if target is None else e.gather(1, target).squeeze(1)
    own.fill_(-torch.inf)
    if target is not None:
        e.scatter_(1, target, -torch.inf)
    dims = [1, 0] if problem.columns else [1]
    if plan.bounded or _fits(rows.longest(), inv_t, problem):
        e.exp2_()
        exponentials: list[Tensor] = [e] * len(dims)
        shifts: Sequence[Tensor | None] = [None] * len(dims)
    else:
        pos, exponentials, shifts = _shifted(e, pos, dims, left_out=1 if target is None else 2)
    sums = [exponential.sum(dim) for exponential, dim in zip(exponentials, dims, strict=True)]
    value_of, slope_of = ROW_LOSSES[loss]
    # neg - pos, natural: pos is in base 2
    margins = [_log_sum(total, m).sub_(pos).mul_(LN2) for total, m in zip(sums, shifts, strict=True)]
    values = [value_of(margin) for margin in margins]
    share = weight.item() / len(margins)
    total = (values[0] if len(values) == 1 else values[0] + values[1]).sum().mul_(share)
    if not any(wanted):
        return OnePass(total, [None, None], None)

    slopes = [slope_of(margin) for margin in margins]
    row, *column = [slope / total for slope, total in zip(slopes, sums, strict=True)]  # two rows or more: no sum is 0
    other = row if same else column[0] if column else None
    if shifts[0] is None:  # one exponential serves both directions
        e.mul_(row.unsqueeze(1) if other is None else row.unsqueeze(1) + other)
    else:
        e.mul_(row.unsqueeze(1))
        if same:
            e.add_(e.T.clone())
        elif other is not None:
            e.addcmul_(exponentials[1], other)
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
    logits = None
    if wanted[-1]:  # x_i . G_i = u_i mean_i + v_i pos_i; where the keys are the queries, that of both sides
        logits = torch.linalg.vecdot(sides[0], x)
        logits = logits.div_(2) if same else logits
    rows.finish(grad)
    return OnePass(total, [sides[0] if wanted[0] else None, sides[1] if wanted[1] else None], logits)


def _stacked(problem: Problem) -> Rows:
    """Return the queries' rows and after them, unless they are the same, the keys', as the logits see them."""
    query, (key,) = problem.query, problem.keys
    if problem.self_similar:
        return Rows(query.rows, problem.normalize, query.scale, problem.acc_dtype)
    scale = None
    if query.scale is not None or key.scale is not None:  # autocast divided the rows of one or of both
        scale = torch.cat([s.rows.new_ones(len(s.rows), dtype=problem.acc_dtype) if s.scale is None else s.scale
                           for s in (query, key)])  # fmt: skip
    return Rows(torch.cat([query.rows, key.rows]), problem.normalize, scale, problem.acc_dtype)


def _fits(longest: float, inv_t: float, problem: Problem) -> bool:
    return longest * longest * inv_t * LOG2E <= EXPONENT_ROOM[problem.acc_dtype]


def _shifted(
    e: Tensor, pos: Tensor, dims: Sequence[int], left_out: int
) -> tuple[Tensor, list[Tensor], Sequence[Tensor | None]]:
    """Return the positives and, for each of `dims`, exponentials less the maxima along it, and these; `e` is reused.

    left_out: how many scores of a row are -inf because they are no negatives. An infinite logit is never legitimate:
    its row's positive becomes NaN.
    """
    shifts = [e.amax(dim) for dim in dims]
    lost = (e == -torch.inf).sum(1) > left_out
    pos = (pos + (pos - pos)).masked_fill_(lost, torch.nan)
    exponentials = [torch.sub(e, m.unsqueeze(dim)).exp2_() for m, dim in zip(shifts[1:], dims[1:], strict=True)]
    return pos, [e.sub_(shifts[0].unsqueeze(dims[0])).exp2_(), *exponentials], shifts


def _log_sum(total: Tensor, shift: Tensor | None) -> Tensor:
    """Return the logsumexp in base 2."""
    return total.log2() if shift is None else total.log2().add_(shift)
