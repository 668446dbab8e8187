"""The primitive in chunked PyTorch: any device, a bounded workspace, library GEMMs.

With x_i = a_i q_i and y_j = b_j k_j the rows as the logits see them:

    W_ij = u_i p_ij / t_i + u'_j p'_ij / t'_j         what multiplies y_j for the queries and x_i for the keys
    G_i  = sum_j W_ij y_j + v_i / t_i y_target(i)     dq_i = a_i (G_i - (G_i . x_i) x_i)
    H_j  = sum_i W_ij x_i + ...                       dk_j = b_j (H_j - (H_j . y_j) y_j)

Logits are in base 2, exp2 being the cheaper exponential. A state is (m, l, s) with l = sum 2^(logit - m) and
s = sum 2^(logit - m) logit over some columns; m is 0 throughout where every exponential fits as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Plan
from .problem import KEY, Problem, Statistics, Upstream
from .row_loss import LOSSES
from .segments import RowKeys, Rows, Segment, SharedKeys, longest_row

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# 2^(a logit up to this), summed over a million columns, divided by a million rows, and its inverse stay normal numbers
EXPONENT_ROOM = {torch.float32: 90.0, torch.float64: 900.0}

State = tuple[Tensor, ...]


class Chunk(NamedTuple):
    """Some rows of the problem."""

    rows: slice
    queries: Rows
    scaled: Tensor  # (R, D): the queries times log2(e) / t
    inv_t: Tensor  # (R, 1)


Tile = tuple[Chunk, Segment, slice]  # the chunk's rows against some columns of a segment


class Work:
    """A problem made ready: the keys as the logits see them, their gradients' accumulators, scratch for tiles."""

    def __init__(self, problem: Problem, plan: Plan, dtypes: Sequence[torch.dtype | None]):
        self.problem, self.plan, self.acc = problem, plan, problem.acc_dtype
        self.key = SharedKeys(problem, KEY, plan.cols, dtypes[KEY] is not None)
        self.negatives = [
            RowKeys(problem, i, plan.limit, dtypes[i])
            if keys.dim() == 3
            else SharedKeys(problem, i, plan.cols, dtypes[i] is not None)
            for i, keys in enumerate(problem.negatives, start=2)
        ]
        self.segments: list[Segment] = [*([self.key] if problem.in_batch else []), *self.negatives]
        self.shift = not self._fits_without_shift()

    def _fits_without_shift(self) -> bool:
        """Whether exp2 of every logit fits the accumulator as it is: a bound that only a CPU reads for free."""
        p = self.problem
        if p.query.device.type != "cpu" or not len(p.query) or not self.segments:
            return False
        longest = 1.0 if p.normalize else longest_row(Rows(p.query, False, p.scale(0), self.acc).unit)
        bound = longest * max(segment.longest() for segment in self.segments)
        return bound * LOG2E / p.temperature.min().item() <= EXPONENT_ROOM[self.acc]

    def chunks(self) -> Iterator[Chunk]:
        p = self.problem
        for start in range(0, len(p.query), self.plan.rows):
            rows = slice(start, min(start + self.plan.rows, len(p.query)))
            scale = p.scale(0)
            queries = Rows(p.query[rows], p.normalize, None if scale is None else scale[rows], self.acc)
            inv_t = (1 / (p.temperature if len(p.temperature) == 1 else p.temperature[rows]))[:, None]
            yield Chunk(rows, queries, queries.unit * (inv_t * LOG2E), inv_t)

    def tiles(self) -> Iterator[tuple[Segment, slice]]:
        return ((segment, cols) for segment in self.segments for cols in segment.tiles())

    def buffer(self, cols: int | None = None) -> Tensor:
        """A flat buffer for a tile of so many columns, or for any."""
        if cols is None:
            cols = max((cols.stop - cols.start for _, cols in self.tiles()), default=0)
        size = min(self.plan.rows, len(self.problem.query)) * cols
        return torch.empty(size, dtype=self.acc, device=self.problem.query.device)

    def scores(self, chunk: Chunk, segment: Segment, cols: slice, out: Tensor) -> Tensor:
        """The tile's logits in base 2; `out` is flat."""
        tile = shaped(out, chunk, cols)
        return segment.scores(chunk.scaled, chunk.rows, cols, tile)

    def exclude(self, tile: Tensor, value: float, chunk: Chunk, segment: Segment, cols: slice) -> None:
        segment.exclude(tile, value, chunk.rows, cols)

    def column_logits(self, tile: Tensor, chunk: Chunk, cols: slice) -> Tensor:
        """s'_ij = s_ij t_i / t'_j: the same dot product at the temperature of key j's own row."""
        t = self.problem.temperature
        return tile if len(t) == 1 else tile / chunk.inv_t / t[cols]

    def exponentials(self, tile: Tensor, dim: int, where: Tile, out: Tensor) -> State:
        """(m, l) of the tile along `dim`, and in `out`, which may be the tile, 2^(tile - m) with 0 where excluded."""
        self.exclude(tile, -torch.inf, *where)
        if self.shift:
            m = tile.amax(dim)
            e = torch.sub(tile, finite(m).unsqueeze(dim), out=out).exp2_()
        else:
            m = tile.new_zeros(tile.shape[1 - dim])
            e = torch.exp2(tile, out=out)
        return m, e.sum(dim)

    def moments(self, tile: Tensor, dim: int, where: Tile, scratch: Tensor) -> State:
        """(m, l, s) of the tile along `dim`."""
        m, total = self.exponentials(tile, dim, where, scratch)
        self.exclude(tile, 0.0, *where)  # 0 * -inf is NaN: only a logit that really is infinite may do that
        return m, total, scratch.mul_(tile).sum(dim)

    def target_keys(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """(index, rows, inside): each row's target among the keys, its row there, and whether it is one."""
        target, m = self.problem.target, len(self.problem.key)
        if target is None:
            index = torch.arange(chunk.rows.start, chunk.rows.stop, device=self.problem.query.device)
            return index, self.key.rows.unit[chunk.rows], torch.ones_like(index, dtype=torch.bool)
        target = target[chunk.rows]
        inside = (target >= 0) & (target < m)
        index = target.clamp(0, max(m - 1, 0))
        rows = self.key.rows.unit[index] if m else torch.zeros_like(chunk.queries.unit)
        return index, rows, inside

    def positives(self, chunk: Chunk) -> Tensor:
        _, keys, inside = self.target_keys(chunk)
        pos = torch.linalg.vecdot(chunk.queries.unit, keys) * chunk.inv_t[:, 0]
        if self.problem.target is None:
            return pos
        missing = torch.where(self.problem.target[chunk.rows] == -1, 0.0, torch.nan).to(self.acc)
        return torch.where(inside, pos, missing)

    def add_positives(self, chunk: Chunk, v: Tensor, grad_x: Tensor | None) -> None:
        """v_i / t_i y_target(i) to the query, v_i / t_i x_i to its target."""
        index, keys, inside = self.target_keys(chunk)
        w = torch.where(inside, v * chunk.inv_t[:, 0], 0)[:, None]
        if grad_x is not None:
            grad_x.addcmul_(keys, w)
        if self.key.grad is None or not len(self.key.grad):
            return
        if self.problem.target is None:
            self.key.grad[chunk.rows].addcmul_(chunk.queries.unit, w)
        else:  # sorted inside, hence in the same order every time
            self.key.grad.index_put_((index,), chunk.queries.unit * w, accumulate=True)

    def finish(self, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
        """The gradients of the keys and negatives; `dtypes` of all inputs."""
        return [segment.finish(dtype) for segment, dtype in zip([self.key, *self.negatives], dtypes[1:], strict=True)]


def shaped(flat: Tensor, chunk: Chunk, cols: slice) -> Tensor:
    r, c = chunk.rows.stop - chunk.rows.start, cols.stop - cols.start
    return flat[: r * c].view(r, c)


def finite(m: Tensor) -> Tensor:
    """A maximum that can be subtracted: 0 where there was nothing to maximise over."""
    return m.masked_fill(m == -torch.inf, 0)


def empty_state(like: Tensor, sums: int) -> State:
    return torch.full_like(like, -torch.inf), *(torch.zeros_like(like) for _ in range(sums))


def merge(a: State, b: State) -> State:
    m = torch.maximum(a[0], b[0])
    wa, wb = torch.exp2(a[0] - finite(m)), torch.exp2(b[0] - finite(m))
    return m, *(x * wa + y * wb for x, y in zip(a[1:], b[1:], strict=True))


def log_sum(state: State) -> Tensor:
    """In natural units; -inf where there is nothing."""
    return (state[0] + torch.log2(state[1])) * LN2


def finish(state: State) -> tuple[Tensor, Tensor]:
    """(neg, mean)."""
    mean = torch.where(state[1] == 0, 0, state[2] / state[1]) * LN2
    return torch.where(mean.isnan(), torch.nan, log_sum(state)), mean


def shift_of(neg: Tensor) -> Tensor:
    """What turns a base-2 logit into log2 of its probability when subtracted; +inf where there are no negatives."""
    return torch.where(neg == -torch.inf, torch.inf, neg * LOG2E)


def statistics(problem: Problem, plan: Plan) -> Statistics:
    work = Work(problem, plan, [None] * len(problem.inputs))
    first, second = work.buffer(), work.buffer()
    n = len(problem.query)
    pos, neg, mean = (torch.empty(n, dtype=work.acc, device=problem.query.device) for _ in range(3))
    columns = empty_state(neg, 2) if problem.columns else None
    for chunk in work.chunks():
        state = empty_state(neg[chunk.rows], 2)
        for segment, cols in work.tiles():
            where = (chunk, segment, cols)
            tile = work.scores(*where, out=first)
            state = merge(state, work.moments(tile, 1, where, shaped(second, chunk, cols)))
            if columns is not None and segment is work.key:
                tile = work.column_logits(tile, chunk, cols)
                part = work.moments(tile, 0, where, shaped(second, chunk, cols))
                for whole, merged in zip(columns, merge(tuple(x[cols] for x in columns), part), strict=True):
                    whole[cols] = merged
        pos[chunk.rows] = work.positives(chunk)
        neg[chunk.rows], mean[chunk.rows] = finish(state)
    if columns is None:
        return Statistics(pos, neg, mean)
    return Statistics(pos, neg, mean, *finish(columns))


def gradients(
    problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    work = Work(problem, plan, dtypes)
    first, second = work.buffer(), work.buffer()
    grad_query = torch.empty_like(problem.query, dtype=dtypes[0]) if dtypes[0] else None
    neg = shift_of(statistics.neg)
    column_neg = None if statistics.column_neg is None else shift_of(statistics.column_neg)
    for chunk in work.chunks():
        grad = torch.zeros_like(chunk.queries.unit) if grad_query is not None else None
        for segment, cols in work.tiles():
            where = (chunk, segment, cols)
            tile = work.scores(*where, out=first)
            work.exclude(tile, -torch.inf, *where)
            w = torch.sub(tile, neg[chunk.rows, None], out=shaped(second, chunk, cols)).exp2_()
            w.mul_(upstream.neg[chunk.rows, None] * chunk.inv_t)
            if column_neg is not None and upstream.column_neg is not None and segment is work.key:
                t = problem.temperature if len(problem.temperature) == 1 else problem.temperature[cols]
                e = work.column_logits(tile, chunk, cols).sub_(column_neg[cols]).exp2_()
                w.addcmul_(e, (upstream.column_neg[cols] / t))
            segment.add_gradients(w, chunk.queries.unit, chunk.rows, cols, grad)
        work.add_positives(chunk, upstream.pos[chunk.rows], grad)
        if grad_query is not None and grad is not None:
            grad_query[chunk.rows] = chunk.queries.finish(grad)
    return [grad_query, *work.finish(dtypes)]


class OnePass(NamedTuple):
    """A reduced loss and its gradients: inputs' aligned with `Problem.inputs`, temperature's one a row."""

    loss: Tensor
    inputs: list[Tensor | None]
    temperature: Tensor


def onepass(problem: Problem, plan: Plan, kind: str, weight: Tensor, wanted: Sequence[bool]) -> OnePass:
    """`sum_i weight_i loss_i` and its gradients, in the accumulator dtype, from one product of the scores.

    A chunk of rows sees every column, so its statistics, and with them its coefficients, are final at once.
    wanted: of each input, then of the temperature.
    """
    loss_of, slope_of = LOSSES[kind]
    work = Work(problem, plan, [problem.acc_dtype if w else None for w in wanted[:-1]])
    tiles = list(work.tiles())
    buffers = [work.buffer(cols.stop - cols.start) for _, cols in tiles]
    loss, dt = torch.empty_like(weight), torch.zeros_like(weight)
    grad_query = torch.empty_like(problem.query, dtype=work.acc) if wanted[0] else None
    for chunk in work.chunks():
        state, shifts, exponentials = empty_state(loss[chunk.rows], 1), [], []
        for (segment, cols), buffer in zip(tiles, buffers, strict=True):
            tile = work.scores(chunk, segment, cols, out=buffer)
            # unit rows cannot give -inf; a raw row's must not pass for a probability of 0
            poison = 0 if problem.normalize else torch.where(tile.amin(1) == -torch.inf, torch.nan, 0)
            part = work.exponentials(tile, 1, (chunk, segment, cols), out=tile)
            state = merge(state, (part[0], part[1] + poison))
            shifts.append(part[0])
            exponentials.append(tile)

        w = weight[chunk.rows]
        x = log_sum(state) - work.positives(chunk)
        loss[chunk.rows] = torch.where(w == 0, 0, w * loss_of(x))
        u = torch.where(w == 0, 0, w * slope_of(x))
        coefficient, shift = u * chunk.inv_t[:, 0], shift_of(log_sum(state))

        grad = torch.zeros_like(chunk.queries.unit) if wanted[0] or wanted[-1] else None
        for (segment, cols), e, m in zip(tiles, exponentials, shifts, strict=True):
            e.mul_((coefficient * torch.exp2(m - shift))[:, None])
            segment.add_gradients(e, chunk.queries.unit, chunk.rows, cols, grad)
        work.add_positives(chunk, -u, grad)
        if grad is not None:  # x_i . G_i = u_i mean_i + v_i pos_i
            dt[chunk.rows] = -torch.linalg.vecdot(grad, chunk.queries.unit) * chunk.inv_t[:, 0]
        if grad_query is not None and grad is not None:
            grad_query[chunk.rows] = chunk.queries.finish(grad)
    return OnePass(loss.sum(), [grad_query, *work.finish([work.acc] * len(problem.inputs))], dt)
