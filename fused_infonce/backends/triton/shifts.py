"""What is subtracted from the logits of a row before one pass makes their exponentials, where keys have biases.

With cosines z_ij = s_ij - c_j of at most R bits, `EXPONENT_ROOM`, the row's exponentials are 2^(s_ij - n_i), where

    n_i = max(max_j c_j - ABOVE, e_i - R)        j over the row's negatives, e_i a logit known before: its positive's

No exponential is above 2^(R + ABOVE) then. What makes coefficients of them is u_i 2^(n_i - m_i) r_i, which is at most
2^R times the row's weight, and small only where the coefficients are. So biases take next to none of the range that
cosines alone have with n_i = 0, whatever their size is, which on a GPU is not known without reading them: shifts are
made on the device. A block's least number, 2^-126 RAISE, is 2^(ABOVE + 13) times less than the largest exponential of a
row at 1 / t = R ln 2 whose key with the largest bias has a cosine of -1, and less than any other row's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..contract import LOG2E
from ..plan import Plan
from ..precision import EXPONENT_ROOM
from .launch import Side
from .statistics import merged, row_states, unwritten
from .work import Work

ABOVE = 7  # bits that sums of a million exponentials times their logits leave in float32


def with_shifts(work: Work, plan: Plan, positives: Sequence[Tensor], paired: Sequence[Tensor] = ()) -> Work:
    """Return the problem with shifts of its queries, and with `columns` of its keys, where exponentials need them.

    positives: the logits of the rows' targets and, with `columns`, those of the columns', with their biases
    paired: the states of the queries over keys of their own
    """
    problem, query, key = work.problem, work.query, work.shared[1]
    if not problem.biases and (problem.offset is None or plan.bounded):
        return work
    known = [pos * LOG2E for pos in positives]
    if problem.target is not None:  # the positive of a row without one is 0, and no logit
        known = [pos.masked_fill(problem.target == -1, -torch.inf) for pos in known]
    for states in paired:
        known[0] = torch.fmax(known[0], states[0, 0])  # which of a NaN takes the other
    room = EXPONENT_ROOM[query.rows.dtype]
    most = largest_biases(work, plan, positives)
    shifts = [torch.fmax(bias - ABOVE, logit - room) for bias, logit in zip(most, known, strict=True)]
    shared = work.shared if len(shifts) == 1 else work.shared | {1: replace(key, shift=shifts[1])}
    return replace(work, query=replace(query, shift=shifts[0]), shared=shared)


def largest_biases(work: Work, plan: Plan, positives: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest bias of the shared keys that are a row's negatives, in base 2, and likewise of the columns.

    Logits of rows without components are their biases alone, whose largest a pass over statistics finds.
    """
    if all(side.bias is None for side in (work.query, *work.shared.values())):
        return [torch.zeros_like(pos) for pos in positives]
    columns = unwritten(positives[1]) if len(positives) > 1 else None
    states = [
        row_states(_bare(work.query), _bare(keys), excluded, columns, plan.limit, unshifted=False, mean=False)
        for _, keys, excluded in work.segments
    ]
    rows = merged(states[0] if len(states) == 1 else torch.cat(states), positives[0])
    return [statistics.maximum for statistics in (rows, columns) if statistics is not None]


def _bare(side: Side) -> Side:
    return replace(side, rows=side.rows[:, :0])
