"""This rank's rows against those of all ranks, with what both directions share made once.

With n rows on this rank and N on all, one n x N block of scores serves

    both directions     8 n N D: the states of its columns go to the ranks whose rows these are and are merged there in
                        rank order; what is merged comes back for the gradients, and those of the keys are added up
    rows of one set     6 n N D: a column is another rank's row, whose statistics are all that is gathered, and
                        the gradients of rows are whole where the rows are

in place of the two blocks of 6 or 8 n N D each that two directions would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Options
from ..backends.contract import LN2, KeySet, Problem, RowStatistics, Statistics, Upstream
from ..backends.plan import Plan
from ..backends.precision import without_autocast
from ..backends.registry import plan_of, resolve
from ..backends.row_losses import temperature_gradient
from ..contrast import bind, differentiable_once, given, unscale
from .call import Call


def fits(problem: Problem, options: Options) -> bool:
    """Return whether a rank's own problem is one of those above: a single set of keys, each the target of one row."""
    both = problem.columns or problem.self_similar
    alone = len(problem.keys) == 1 and problem.in_batch and not problem.added and problem.ceiling is None
    targets = problem.target is None or problem.two_views
    known = problem.temperature.shared and resolve(options.backend, problem.query.rows) != "reference"
    return both and alone and targets and known and not torch.compiler.is_compiling()


def statistics(problem: Problem, options: Options, call: Call, counts: Sequence[int]) -> Statistics:
    """Return the statistics of this rank's rows, and of its columns where asked for, among the rows of all ranks.

    problem: this rank's own, which `fits`. counts: the numbers of rows of all ranks.
    """
    plan = plan_of(_shapes(problem, sum(counts)), options, reduced=False)
    inputs = problem.inputs
    return Statistics.of(_Block.apply(problem, plan, call, counts, problem.temperature.values, *inputs))


def _shapes(problem: Problem, every: int) -> Problem:
    """Return a problem of the shapes of the block, over rows without values of their own, for a plan."""
    key = problem.keys[0].rows
    rows = key[:1].expand(every, -1) if len(key) else key.new_empty(0, key.shape[1]).expand(0, -1)
    return replace(problem, keys=(KeySet(rows),), columns=True, self_similar=False, two_views=False, target=None)


class _Block(torch.autograd.Function):
    """The statistics, whose backward exchanges what the gradients of columns need."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, plan: Plan, call: Call, counts: Sequence[int], temperature: Tensor, *inputs: Tensor
    ) -> Any:
        ctx.dtypes = [x.dtype if needed else None for x, needed in zip(inputs, ctx.needs_input_grad[5:], strict=True)]
        own = bind(problem, temperature, inputs)
        block = _block(own, call, counts)
        with without_autocast(inputs[0].device.type):
            part = block if own.columns else block.of_rows()
            found = backends.get(plan.backend).statistics(part, plan)
        rows = found.rows
        merged = None
        if found.columns is not None:
            merged = _merged(call.communicator.all_to_all(_states(found.columns, plan.mean), counts), rows.pos)
        ctx.plan, ctx.call, ctx.counts, ctx.own = plan, call, counts, own.with_tensors([None] * len(own.tensors()))
        ctx.set_materialize_grads(False)
        results = Statistics(rows, merged).tensors()
        ctx.inputs, ctx.block = len(own.tensors()), block.with_tensors([None] * len(block.tensors()))
        ctx.save_for_backward(*own.tensors(), *results, *block.tensors())
        ctx.mark_non_differentiable(*rows[2:], *(() if merged is None else merged[2:]))
        return tuple(results)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        tensors, call, width = ctx.saved_tensors, ctx.call, len(RowStatistics._fields)
        own = ctx.own.with_tensors(tensors[: ctx.inputs])
        both = own.columns
        end = ctx.inputs + (2 * width - 1 if both else width)
        rows, columns = Statistics.of(tensors[ctx.inputs : end])
        block = ctx.block.with_tensors(tensors[end:])
        v, u = (given(slope, rows.pos) for slope in upstream[:2])
        column_u = given(upstream[width], rows.pos) if both else u
        state = rows if columns is None else columns  # of which a column's exponentials are made, on its own rank
        sent = torch.stack([state.maximum, column_u * state.scale], 1)
        shift, factor = call.communicator.all_gather(sent, ctx.counts).unbind(1)
        seen = RowStatistics(factor, factor, factor, shift.contiguous(), torch.ones_like(factor))
        # the pair of rows i and y_i is both the positive of i and that of y_i
        twice = v if both else v + v[own.target]
        query_dtype, key_dtype = ctx.dtypes[0], block.acc_dtype if both and ctx.dtypes[1] is not None else None
        with without_autocast(block.query.rows.device.type):
            of_query, of_keys = backends.get(ctx.plan.backend).gradients(
                block, ctx.plan, Statistics(rows, seen), Upstream(twice, u, factor.contiguous()),
                [query_dtype, key_dtype],
            )  # fmt: skip
        of_key = None
        if of_keys is not None:
            of_key = call.communicator.reduce_scatter(of_keys, ctx.counts)
        of_query, of_key = unscale(own, [of_query, of_key])
        dt = None
        if ctx.needs_input_grad[4]:
            logits = u * rows.mean + v * rows.pos + (0 if columns is None else column_u * columns.mean)
            dt = temperature_gradient(logits, own.temperature)
        return None, None, None, None, dt, of_query, None if of_key is None else of_key.to(ctx.dtypes[1])


def _block(own: Problem, call: Call, counts: Sequence[int]) -> Problem:
    """Return the problem of this rank's queries against the keys of all ranks, which are gathered as they are."""
    query, key, gathered = own.query, own.keys[0], call.communicator.all_gather
    start, n = call.start(counts), query.rows.shape[0]
    place = torch.arange(start, start + n, device=query.rows.device)
    ids, every_ids = query.ids, None if key.ids is None else gathered(key.ids, counts)
    if own.self_similar:  # a row has the id of its place, so that it is not its own negative
        ids, every_ids = place, torch.arange(sum(counts), device=place.device)
    scale = None if key.scale is None else gathered(key.scale, counts)
    keys = KeySet(gathered(key.rows.contiguous(), counts), every_ids, scale=scale)
    target = place if own.target is None else own.target + start
    return Problem(
        query._replace(ids=ids), (keys,), own.temperature, target, columns=True, normalize=own.normalize
    )  # fmt: skip


def _states(columns: RowStatistics, mean: bool) -> Tensor:
    """Return (N, 2) maxima and sums of exponentials, or with `mean` (N, 3) the sums of their products too."""
    empty = columns.scale == 0
    total = (1 / columns.scale.masked_fill(empty, 1)).masked_fill(empty, 0)
    parts = [columns.maximum, total, *([columns.mean * total / LN2] if mean else [])]
    return torch.stack(parts, 1)


def _merged(states: Tensor, pos: Tensor) -> RowStatistics:
    """Return the statistics of this rank's columns from the states of all ranks, (W, n, 2) or (W, n, 3)."""
    m, total, *products = states.unbind(2)
    largest = m.masked_fill(total == 0, -torch.inf).amax(0)
    none = largest == -torch.inf
    largest = largest.masked_fill(none, 0)
    factor = torch.exp2(m - largest).masked_fill(total == 0, 0)
    whole = (total * factor).sum(0)
    scale = whole.reciprocal().masked_fill(none, 0)
    neg = torch.where(none, -torch.inf, (whole.log2() + largest) * LN2)
    mean = (products[0] * factor).sum(0) * scale * LN2 if products else torch.full_like(neg, torch.nan)
    return RowStatistics(pos, neg, mean, largest, scale)
