"""The primitive in chunked PyTorch: any device, a bounded workspace, library products.

With x_i = a_i q_i and y_j = b_j k_j the rows as the logits see them:

    W_ij = u_i p_ij / t_i + u'_j p'_ij / t'_j         what multiplies y_j for the queries and x_i for the keys
    G_i  = sum_j W_ij y_j + v_i / t_i y_target(i)     dq_i = a_i (G_i - (G_i . x_i) x_i)
    H_j  = sum_i W_ij x_i + ...                       dk_j = b_j (H_j - (H_j . y_j) y_j)
    dc_j = sum_i u_i p_ij                             of a bias, whose exponentials are those of `bias`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import OnePass, Problem, RowStatistics, Statistics, Upstream
from ..indexing import part_of
from ..plan import Plan
from ..row_losses import loss_and_slope, temperature_gradient
from . import small
from .work import Chunk, State, Tile, Work, finite, log_sum, merge, over_chunks, statistics_of


def statistics(problem: Problem, plan: Plan, keep: list[Tensor] | None = None) -> Statistics:
    if plan.name == "dense":
        return small.statistics(problem, plan, keep)
    work = Work(problem, plan, [None] * (len(problem.inputs) + len(problem.biases)))
    first, second = work.buffers(2)
    found: list[RowStatistics] = []
    columns: dict[int, State | None] = {cols.start: None for cols in work.key.tiles()}
    for chunk in work.chunks():
        state = columns[chunk.rows.start] if work.triangular else None
        for tile in work.tiles(chunk):
            scores, scratch = tile.scores(first), tile.shaped(second)
            two_way = work.two_way(tile)
            shared = two_way and work.shared_t
            row, *column = work.moments(scores, tile, [1, 0] if shared else [1], scratch)
            if two_way and not shared:
                column = work.moments(work.column_scores(scores, tile), tile, [0], scratch)
            state = merge(state, row)
            if column:
                columns[tile.cols.start] = merge(columns[tile.cols.start], column[0])
        found.append(statistics_of(state, work.positives(chunk)))
    rows = over_chunks(found) if found else statistics_of(None, problem.query.rows.new_empty(0, dtype=work.acc))
    if not problem.columns:
        return Statistics(rows)
    merged = [state for state in columns.values() if state is not None]
    whole = tuple(None if p[0] is None else torch.cat(p) for p in zip(*merged, strict=True)) if merged else None
    return Statistics(rows, statistics_of(whole, rows.pos, len(problem.keys[0].rows)))


def gradients(
    problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream, dtypes: Sequence[torch.dtype | None],
    kept: Sequence[Tensor] = (),
) -> list[Tensor | None]:  # fmt: skip
    if plan.name == "dense":
        return small.gradients(problem, plan, statistics, upstream, dtypes, kept)
    triangular = plan.name == "triangular"  # then both sides' gradients are one, in the accumulator of the keys
    query_dtype, *key_dtypes = dtypes[: len(problem.sets)]
    if triangular:
        query_dtype, key_dtypes = None, [query_dtype, *key_dtypes[1:]]
    work = Work(problem, plan, [query_dtype, *key_dtypes, *dtypes[len(problem.sets) :]])
    first, second = work.buffers(2)
    grad_query = torch.empty_like(problem.query.rows, dtype=query_dtype) if query_dtype else None
    row = column = work.probabilities(statistics.rows, upstream.neg)  # where columns are rows too they are the same
    if statistics.columns is not None and upstream.column_neg is not None:
        column = work.probabilities(statistics.columns, upstream.column_neg)
    for chunk in work.chunks():
        grad = torch.zeros_like(chunk.queries.unit) if grad_query is not None else None
        if triangular and work.key.grad is not None:
            grad = work.key.grad[chunk.rows]
        for tile in work.tiles(chunk):
            tile.add_gradients(_coefficients(work, tile, row, column, first, second), grad)
        work.add_positives(chunk, upstream.pos[chunk.rows], grad)
        if grad_query is not None and grad is not None:
            grad_query[chunk.rows] = chunk.queries.finish(grad)
    grad_keys = work.finish(key_dtypes)
    found = [grad_keys[0], None, *grad_keys[1:]] if triangular else [grad_query, *grad_keys]
    return [*found, *(bias.finish() for bias in work.biases)]


Probabilities = tuple[Tensor | None, Tensor]  # of `Work.probabilities`


def _coefficients(
    work: Work, tile: Tile, row: Probabilities, column: Probabilities, first: Tensor, second: Tensor
) -> Tensor:
    """Return W of a tile in the second of two flat buffers."""
    rows, scores, w = tile.chunk.rows, tile.scores(first), tile.shaped(second)
    (shift, u), (column_shift, column_u) = row, column
    tile.exclude(scores, -torch.inf)
    two_way = work.two_way(tile)
    inv_t, column_t = tile.chunk.inv_t, part_of(work.inv_t, tile.cols)
    if two_way and shift is None and work.shared_t:  # one exponential for both directions
        e = scores.exp2_()
        work.add_bias_gradient(tile, 1, e, u[rows], inv_t)
        work.add_bias_gradient(tile, 0, e, column_u[tile.cols], column_t)
        return work.both(tile, u[rows], column_u[tile.cols], out=w).mul_(e)
    w = _exponentials(work, tile, 1, scores, None if shift is None else shift[rows, None], w)
    work.add_bias_gradient(tile, 1, w, u[rows], inv_t)
    work.with_factors(w, tile, 1).mul_(u[rows, None])
    if two_way:
        scores = work.column_scores(scores, tile)
        e = _exponentials(work, tile, 0, scores, None if column_shift is None else column_shift[tile.cols], scores)
        work.add_bias_gradient(tile, 0, e, column_u[tile.cols], column_t)
        w.addcmul_(work.with_factors(e, tile, 0), column_u[tile.cols])
    return w


def _exponentials(work: Work, tile: Tile, dim: int, scores: Tensor, shift: Tensor | None, out: Tensor) -> Tensor:
    """Write the exponentials of one direction into `out`, as those that its statistics were made of."""
    if shift is None:
        return torch.exp2(scores, out=out)
    return torch.sub(work.logits(scores, tile, dim, out), shift, out=out).exp2_()


def onepass(problem: Problem, plan: Plan, loss: str, weight: Tensor | float, wanted: Sequence[bool]) -> OnePass:
    """Compute a reduced loss and its gradients from one product of the scores; see `Backend.onepass`.

    A chunk of rows sees every column, so its statistics, and with them its coefficients, are final at once. With
    `problem.columns` it is the mean of both directions: there the plan has one chunk, one temperature and no shift.
    """
    if plan.name == "dense":
        return small.onepass(problem, plan, loss, weight, wanted)
    *inputs, temperature = wanted
    work = Work(problem, plan, [problem.acc_dtype if want else None for want in inputs])
    buffers = [work.buffer(cols.stop - cols.start) for _, cols in work.columns]
    losses, logits, slopes, found = [], [], [], []
    moments = plan.record and (problem.columns or not inputs[0])  # else means are those of x_i . G_i
    grad_query = torch.zeros_like(problem.query.rows, dtype=work.acc) if inputs[0] else None
    for chunk in work.chunks():
        scored = _Scored(work, chunk, buffers, moments)
        values, row, column, u = scored.losses(loss, part_of(weight, chunk.rows))
        losses.append(values)
        slopes.append(u)
        grad = None if grad_query is None else part_of(grad_query, chunk.rows)
        if temperature and grad is None:
            grad = torch.zeros_like(chunk.queries.unit)
        scored.add_gradients(row, column, grad)
        work.add_positives(chunk, -(u if u.dim() == 1 else u.sum(0)), grad)
        if grad is not None and (temperature or plan.record):  # x_i . G_i = u_i mean_i + v_i pos_i, of both directions
            logits.append(torch.linalg.vecdot(grad, chunk.queries.unit))
        if plan.record:
            found.append(scored.statistics() if moments else [scored.from_gradient(logits[-1], u)])
        if grad_query is not None and grad is not None:
            chunk.queries.finish(grad)
    grads = [grad_query, *work.finish([work.acc] * len(problem.keys))]
    total = torch.cat(losses).sum() if len(losses) > 1 else losses[0].sum()
    offset = None if problem.offset is None else -torch.cat(slopes, -1)
    rows = [[torch.cat(vectors) for vectors in zip(*parts, strict=True)] for parts in zip(*found, strict=True)]
    of_t = None
    if temperature:
        of_t = temperature_gradient(logits[0] if len(logits) == 1 else torch.cat(logits), problem.temperature)
    return OnePass(total, grads, of_t, (), [bias.finish() for bias in work.biases], offset, rows)


class _Scored:
    """The exponentials of a chunk of rows against every column, a buffer for each tile, and their sums.

    moments: whether the sums of exponentials times scores are made too.
    """

    def __init__(self, work: Work, chunk: Chunk, buffers: Sequence[Tensor], moments: bool = False):
        self.work, self.chunk = work, chunk
        self.parts: list[tuple[Tile, Tensor, Tensor | None]] = []  # (tile, exponentials, the maximum subtracted)
        columns, state = [], None
        for tile, buffer in zip(work.tiles(chunk), buffers, strict=True):
            scores = tile.scores(buffer)
            copy = scores.clone() if moments else None
            m, *sums = work.exponentials(scores, tile, 1, out=scores)
            if copy is not None:
                sums.append(work.sum(copy.mul_(scores), tile, 1))
            state = merge(state, (m, *sums))
            self.parts.append((tile, scores, m))
            if work.two_way(tile):
                columns.append([work.sum(x, tile, 0) for x in (scores, copy) if x is not None])
        assert state is not None  # the plan is for problems with columns
        self.state = state
        self.column: list[Tensor] = [torch.cat(sums) for sums in zip(*columns, strict=True)]
        self.column_sum = self.column[0] if self.column else None

    def statistics(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return pos, neg and mean of the rows and of columns, of sums that have been made."""
        pos = self.work.positives(self.chunk)
        states = [self.state, *([(None, *self.column)] if self.column else [])]
        return [statistics_of(state, pos)[:3] for state in states]

    def from_gradient(self, products: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pos, neg and mean of the rows from x_i . G_i = u_i (mean_i - pos_i), NaN where u is too small."""
        pos, neg = self.work.positives(self.chunk), log_sum(self.state)
        limits = torch.finfo(u.dtype)
        mean = torch.where(u > limits.tiny / limits.eps, products / u + pos, torch.nan)
        return pos, neg, mean.masked_fill_(neg == -torch.inf, 0)

    def losses(self, loss: str, weight: Tensor | float) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return the weighted losses of the rows, u / t / sum of rows and of columns, and u = -dL/dpos, (N,) or with
        columns (2, N)."""
        inv_t, tiny = self.chunk.inv_t, torch.finfo(self.work.acc).tiny  # nothing to divide where nothing is negative
        pos = column_pos = self.work.positives(self.chunk)
        offset = self.work.problem.offset
        if offset is not None:
            offsets = offset[..., self.chunk.rows]
            pos, column_pos = (pos + offsets, pos) if self.column_sum is None else (pos + offsets[0], pos + offsets[1])
        weight = weight if self.column_sum is None else weight / 2
        values, u = loss_and_slope(loss, log_sum(self.state).sub_(pos), weight)
        row = u * inv_t / self.state[1].clamp_min(tiny)
        if self.column_sum is None:
            return values, row, None, u
        column_values, column_u = loss_and_slope(loss, log_sum((None, self.column_sum)).sub_(column_pos), weight)
        column = column_u * inv_t / self.column_sum.clamp_min_(tiny)
        return values + column_values, row, column, torch.stack([u, column_u])

    def add_gradients(self, row: Tensor, column: Tensor | None, grad: Tensor | None) -> None:
        """Turn the exponentials into coefficients, in place, and add their products to the gradients."""
        work, inv_t = self.work, self.chunk.inv_t
        for tile, e, m in self.parts:
            factor = row if m is None else row * torch.exp2(m - finite(self.state[0]))
            work.add_bias_gradient(tile, 1, e, factor, inv_t)
            if column is not None and work.two_way(tile):
                work.add_bias_gradient(tile, 0, e, column[tile.cols], inv_t)
                w = e.mul_(work.both(tile, factor, column[tile.cols]))
            else:
                w = work.with_factors(e, tile, 1).mul_(factor[:, None])
            tile.add_gradients(w, grad)
