"""Losses of sigmoids in Triton kernels: blocks of coefficients, which no other block is needed for, and products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import LN2, Problem, Sigmoids
from ..indexing import slices
from ..plan import Plan
from ..row_losses import weighted
from .accumulate import Sums
from .backend import finished_sides, in_float16_range
from .coefficients import block_of, block_size, write_sigmoids
from .statistics import SLOTS
from .work import Work, prepare


def sigmoids(problem: Problem, plan: Plan, bias: Tensor, weight: Tensor | float, wanted: Sequence[bool]) -> Sigmoids:
    *inputs, of_temperature, of_bias = wanted
    with torch.cuda.device_of(problem.query.rows):
        work, pos = prepare(problem, plan, positives=True)
        assert pos is not None
        w = weighted(torch.ones_like(pos), weight)
        work = replace(work, query=replace(work.query, weight=w / problem.temperature.values))
        work, unscale = in_float16_range(work)
        sums = Sums(plan.limit)
        finite = problem.normalize  # unit rows have no infinite logits, which the sums of s_ij p_ij tell
        value, slope, logits = sums_of_rows(work, plan, bias, inputs, of_temperature or not finite, sums)
        positive = pos + bias
        v = -weighted(torch.sigmoid(-positive), w)
        losses = F.softplus(-positive, threshold=80) + value + (logits - logits)
        dtypes = [problem.acc_dtype if want else None for want in inputs]
        made = finished_sides(work, sums.of, v, unscale, dtypes)
        return Sigmoids(
            losses, [made.get(index) for index in range(len(inputs))],
            w * logits * LN2 + v * pos if of_temperature else None, weighted(slope, w) + v if of_bias else None,
        )  # fmt: skip


def sums_of_rows(
    work: Work, plan: Plan, bias: Tensor, wanted: Sequence[bool], mean: bool, sums: Sums
) -> tuple[Tensor, ...]:
    """Return the sums of each row that `write_sigmoids` makes, (N,) each, and add to the gradients' sums on the way."""
    query, segments = work.query, list(work.segments) if len(work.query) else []
    totals = torch.zeros((SLOTS, len(query)), dtype=work.problem.acc_dtype, device=query.rows.device)
    if segments:
        widest = max((keys for _, keys, _ in segments), key=len)
        height, width = block_size(query, widest, plan.rows, plan.cols)
        block = block_of(query, widest, height, width) if True in wanted else None
    for index, keys, excluded in segments:
        for rows in slices(len(query), height):
            for cols in slices(len(keys), width):
                totals[:, rows] += write_sigmoids(block, query, keys, rows, cols, excluded, bias, mean)
                if block is None:
                    continue
                c = block[: rows.stop - rows.start, : cols.stop - cols.start]
                if wanted[0]:
                    sums.add(0, query, rows, c, keys.rows[cols])
                if wanted[index]:
                    sums.add(index, keys, cols, c.T, query.rows[rows])
    return tuple(totals)
