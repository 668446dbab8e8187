"""This rank's rows against those of all ranks, as one block of scores or part by part.

With n rows on this rank and N on all, one n x N block of scores serves

    both directions     8 n N D: the states of its columns go to the ranks whose rows these are and are merged there in
                        rank order; what is merged comes back for the gradients, and those of the keys are added up
    rows of one set     6 n N D: a column is another rank's row, whose statistics are all that is gathered, and
                        the gradients of rows are whole where the rows are
    one direction       8 n N D, for a stream alone: all at once is a problem like any other

Parts of the columns are gathered while the part before is worked on, and the gradients of the part before are on their
way back, so that no more than two parts of rows and of gradients are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends, contrast
from ..backends import Options
from ..backends.contract import LN2, KeySet, Problem, RowStatistics, Statistics, Upstream
from ..backends.plan import Plan
from ..backends.precision import without_autocast
from ..backends.recording import record, recordings
from ..backends.registry import plan_of, resolve
from ..backends.row_losses import temperature_gradient
from ..backends.rows import as_held
from ..contrast import bind, differentiable_once, given, unscale, with_offset
from .call import ROWS, Call
from .communicator import Pending
from .exchange import Exchange


def fits(problem: Problem, options: Options) -> bool:
    """Return whether a rank's own problem is one of those above: a single set of keys, each the target of one row.

    To be asked once the ranks have met, so that all say the same.
    """
    both = problem.columns or problem.self_similar or options.call.options.exchange == "stream"
    alone = len(problem.keys) == 1 and problem.in_batch and problem.ceiling is None
    targets = problem.target is None or problem.two_views
    one = problem.temperature.is_shared() and options.call.temperatures != ROWS
    known = one and resolve(options.backend, problem.query.rows) != "reference"
    return both and alone and targets and known and not torch.compiler.is_compiling()


def statistics(problem: Problem, options: Options, exchange: Exchange, full: bool = False) -> Statistics:
    """Return the statistics of this rank's rows, and of its columns where asked for, among the rows of all ranks.

    problem: this rank's own, which `fits`. full: as in `Plan`.
    """
    widest = max(sum(part.counts) for part in exchange.parts)
    plan = plan_of(_shapes(problem, widest, options.call), options, reduced=False, full=full)
    if contrast.is_explaining():
        contrast.explain(exchange)
        contrast.explain(plan)
        return contrast.zeros(problem)
    own = problem if problem.offset is None else replace(problem, offset=None)
    found = Statistics.of(
        _Block.apply(own, plan, options.call, exchange, own.temperature.values, *own.inputs, *own.biases)
    )
    if problem.offset is not None:
        found = with_offset(found, problem.offset)
    if recordings.wanted:
        record(problem, [rows[:3] for rows in found if rows is not None], [sum(exchange.counts)] * 2)
    return found


def _shapes(problem: Problem, columns: int, call: Call) -> Problem:
    """Return a problem of the shapes of a part, over rows without values of their own, for a plan."""
    key = problem.keys[0].rows
    first = KeySet(key[:1], bias=None if problem.keys[0].bias is None else problem.keys[0].bias[:1])
    held = as_held(first, problem, call.takes_unit_rows)._replace(rows=first.rows)
    keys = KeySet._make(
        None if x is None else x.expand(columns, *x.shape[1:]) if len(key) else x.new_empty(0, *x.shape[1:])
        for x in held
    )
    return replace(
        problem, keys=(keys,), offset=None, columns=_two_way(problem), self_similar=False, two_views=False, target=None,
        bias_bound=None,
    )  # fmt: skip


def _two_way(problem: Problem) -> bool:
    """Return whether a score has a gradient through its column too."""
    return problem.columns or problem.self_similar


Coming = list[Pending | None]  # the fields of the keys of all ranks in one part of the columns, on their way


class _Columns:
    """The parts of the columns of a problem, whose keys are gathered one ahead of what is worked on."""

    def __init__(self, own: Problem, call: Call, exchange: Exchange):
        self.own, self.call, self.exchange = own, call, exchange
        n, device = own.query.rows.shape[0], own.query.rows.device
        self.every = sum(exchange.counts)
        start = call.start(exchange.counts)
        self.place = torch.arange(start, start + n, device=device)  # of this rank's rows among all
        self.query = own.query._replace(ids=self.place) if own.self_similar else own.query

    def begin(self, index: int) -> Coming:
        part, gather = self.exchange.parts[index], self.call.communicator.all_gather
        own = KeySet._make(None if x is None else x[part.own] for x in self.own.keys[0])
        keys = as_held(own, self.own, self.call.takes_unit_rows)
        return [None if x is None else gather(x, part.counts) for x in keys]

    def block(self, index: int, coming: Coming) -> Problem:
        """Return the problem of this rank's queries against the keys of a part, with both directions."""
        part, own = self.exchange.parts[index], self.own
        keys = KeySet._make(None if pending is None else pending() for pending in coming)
        if own.self_similar:  # a row has the id of its place, so that it is not its own negative
            starts = [sum(self.exchange.counts[:rank]) + first for rank, first in enumerate(part.firsts)]
            spans = zip(starts, part.counts, strict=True)
            ids = torch.cat([torch.arange(start, start + n, device=self.place.device) for start, n in spans])
            keys = keys._replace(ids=ids)
        row = torch.arange(len(self.place), device=self.place.device) if own.target is None else own.target
        inside = (row >= part.own.start) & (row < part.own.stop)
        target = torch.where(inside, row + (self.call.start(part.counts) - part.own.start), -1)
        return Problem(self.query, (keys,), own.temperature, target, columns=_two_way(own), normalize=own.normalize)

    def blocks(self, kept: Problem | None = None) -> Any:
        """Yield every part's problem; kept: that of the only part, made before."""
        if kept is not None:
            yield kept
            return
        coming = self.begin(0)
        for index in range(len(self.exchange.parts)):
            here = coming
            if index + 1 < len(self.exchange.parts):
                coming = self.begin(index + 1)
            yield self.block(index, here)


class _Block(torch.autograd.Function):
    """The statistics, whose backward exchanges what the gradients of columns need."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, plan: Plan, call: Call, exchange: Exchange, temperature: Tensor, *inputs: Tensor
    ) -> Any:
        ctx.dtypes = [x.dtype if needed else None for x, needed in zip(inputs, ctx.needs_input_grad[5:], strict=True)]
        own = bind(problem, temperature, inputs[: len(problem.sets)])
        backend, rows_parts, columns_parts, block = backends.get(plan.backend), [], [], None
        with without_autocast(inputs[0].device.type):
            for part, block in zip(exchange.parts, _Columns(own, call, exchange).blocks(), strict=True):
                found = backend.statistics(block if own.columns else block.of_rows(), plan)
                rows_parts.append(found.rows)
                if found.columns is not None:
                    columns_parts.append(call.communicator.all_to_all(_states(found.columns, plan.mean), part.counts))
        rows = rows_parts[0] if len(rows_parts) == 1 else _together(rows_parts, plan.mean)
        columns = None
        if own.columns:
            states = [pending() for pending in columns_parts]
            columns = _merged(states[0] if len(states) == 1 else torch.cat(states, 1), rows.pos)
        results = Statistics(rows, columns).tensors()
        kept = block if len(exchange.parts) == 1 and block is not None else None
        ctx.plan, ctx.call, ctx.exchange, ctx.inputs = plan, call, exchange, len(own.tensors())
        ctx.own = own.with_tensors([None] * ctx.inputs)
        ctx.block = None if kept is None else kept.with_tensors([None] * len(kept.tensors()))
        ctx.save_for_backward(*own.tensors(), *results, *([] if kept is None else kept.tensors()))
        ctx.mark_non_differentiable(*rows[2:], *(() if columns is None else columns[2:]))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        tensors, call, exchange, width = ctx.saved_tensors, ctx.call, ctx.exchange, len(RowStatistics._fields)
        own = ctx.own.with_tensors(tensors[: ctx.inputs])
        end = ctx.inputs + (2 * width - 1 if own.columns else width)
        rows, columns = Statistics.of(tensors[ctx.inputs : end])
        kept = None if ctx.block is None else ctx.block.with_tensors(tensors[end:])
        v, u = (given(slope, rows.pos) for slope in upstream[:2])
        column_u = given(upstream[width], rows.pos) if own.columns else u
        seen = None
        if _two_way(own):  # what a column's exponentials are made of, from its own rank
            state = rows if columns is None else columns
            sent = torch.stack([state.maximum, column_u * state.scale], 1)
            seen = [call.communicator.all_gather(sent[part.own], part.counts) for part in exchange.parts]
        # the pair of rows i and y_i is both the positive of i and that of y_i
        twice = v + v[own.target] if own.self_similar else v
        with without_autocast(own.query.rows.device.type):
            found = _gradients(ctx, own, _Columns(own, call, exchange).blocks(kept), rows, seen, twice, u)
        grads = unscale(own, found)
        dt = None
        if ctx.needs_input_grad[4]:
            logits = u * rows.mean + v * rows.pos + (0 if columns is None else column_u * columns.mean)
            dt = temperature_gradient(logits, own.temperature)
        grads = [None if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)]
        return None, None, None, None, dt, *grads


def _gradients(
    ctx: Any, own: Problem, blocks: Any, rows: RowStatistics, seen: Sequence[Pending] | None, v: Tensor, u: Tensor
) -> list[Tensor | None]:
    """Return the gradients of this rank's queries and keys and of their biases, in the accumulator dtype where there
    are several parts."""
    parts, backend = ctx.exchange.parts, backends.get(ctx.plan.backend)
    acc, (query_dtype, key_dtype, *bias_dtypes) = rows.pos.dtype, ctx.dtypes
    if query_dtype is not None and len(parts) > 1:
        query_dtype = acc
    key_dtype = None if key_dtype is None or own.self_similar else acc
    total: list[Tensor | None] = [None] * len(ctx.dtypes)
    # Gradients of keys and of their biases, of which those before the last have come
    columns_of = [1, *(place for place, side in enumerate(own.biased, 2) if side > 0)]
    coming: dict[int, list[Pending]] = {place: [] for place in columns_of}
    come: dict[int, list[Tensor]] = {place: [] for place in columns_of}
    for index, block in enumerate(blocks):
        columns, factor = None, None
        if seen is not None:
            shift, factor = (x.contiguous() for x in seen[index]().unbind(1))
            columns = RowStatistics(factor, factor, factor, shift, torch.ones_like(factor))
        found = backend.gradients(
            block, ctx.plan, Statistics(rows, columns), Upstream(v, u, factor), [query_dtype, key_dtype, *bias_dtypes]
        )
        for place in range(len(found)):
            grad, found[place] = found[place], None  # what has been sent is not held while the next part is made
            if grad is not None and place in coming:
                coming[place].append(ctx.call.communicator.reduce_scatter(grad, parts[index].counts))
                if len(coming[place]) > 1:
                    come[place].append(coming[place].pop(0)())
            elif grad is not None:
                before = total[place]
                total[place] = grad if before is None else before.add_(grad)
            grad = None
    for place in columns_of:
        each = come[place] + [pending() for pending in coming[place]]
        total[place] = (each[0] if len(each) == 1 else torch.cat(each)) if each else None
    return total


def _states(columns: RowStatistics, mean: bool) -> Tensor:
    """Return (M, 2) maxima and sums of exponentials, or with `mean` (M, 3) the sums of their products too."""
    empty = columns.scale == 0
    total = (1 / columns.scale.masked_fill(empty, 1)).masked_fill(empty, 0)
    parts = [columns.maximum, total, *([columns.mean * total / LN2] if mean else [])]
    return torch.stack(parts, 1)


def _together(parts: Sequence[RowStatistics], mean: bool) -> RowStatistics:
    """Return the statistics of rows from those over parts of the columns, one of which has a row's target."""
    return _merged(
        torch.stack([_states(part, mean) for part in parts]), torch.stack([part.pos for part in parts]).sum(0)
    )


def _merged(states: Tensor, pos: Tensor) -> RowStatistics:
    """Return the statistics of rows with these positives from parts of their states, (W, n, 2) or (W, n, 3)."""
    m, total, *products = states.unbind(2)
    empty = total == 0
    largest = m.masked_fill(empty, -torch.inf).amax(0)
    none = largest == -torch.inf
    largest = largest.masked_fill(none, 0)
    factor = torch.exp2(m - largest).masked_fill(empty, 0)
    whole = (total * factor).sum(0)
    scale = whole.reciprocal().masked_fill(none, 0)
    neg = torch.where(none, -torch.inf, (whole.log2() + largest) * LN2)
    mean = (products[0] * factor).sum(0) * scale * LN2 if products else torch.full_like(neg, torch.nan)
    return RowStatistics(pos, neg, mean, largest, scale)
