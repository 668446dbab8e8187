"""The primitive in chunked PyTorch: any device, a bounded workspace, library GEMMs.

With x_i = a_i q_i and y_j = b_j k_j the rows as the logits see them:

    W_ij = u_i p_ij / t_i + u'_j p'_ij / t'_j         what multiplies y_j for the queries and x_i for the keys
    G_i  = sum_j W_ij y_j + v_i / t_i y_target(i)     dq_i = a_i (G_i - (G_i . x_i) x_i)
    H_j  = sum_i W_ij x_i + ...                       dk_j = b_j (H_j - (H_j . y_j) y_j)

Logits are in base 2, exp2 being the cheaper exponential. A state is (m, l, s) with l = sum 2^(logit - m) and
s = sum 2^(logit - m) logit over some columns; m is None, for 0, where every exponential fits as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import EXPONENT_ROOM, KEY, OnePass, Problem, Statistics, Upstream
from ..indexing import add_rows
from ..plan import Plan
from ..row_losses import LOSSES
from . import small
from .keys import Guide, RowKeys, Rows, Segment, SharedKeys, longest_row

LOG2E = math.log2(math.e)
LN2 = math.log(2)

State = tuple[Any, ...]  # (m, l) or (m, l, s)
Scale = Tensor | float  # one for all rows, as a number where that is free to read or a (1,) tensor; or (R,)


class Chunk(NamedTuple):
    """Some rows of the problem. `alpha scaled` are the queries times log2(e) / t."""

    rows: slice
    queries: Rows
    scaled: Tensor  # (R, D)
    alpha: float
    inv_t: Scale


class Tile(NamedTuple):
    """A chunk's rows against some columns of a segment."""

    chunk: Chunk
    segment: Segment
    cols: slice

    def scores(self, out: Tensor) -> Tensor:
        """Logits in base 2, in a flat buffer."""
        chunk = self.chunk
        return self.segment.scores(chunk.scaled, chunk.alpha, chunk.rows, self.cols, self.shaped(out))

    def shaped(self, flat: Tensor) -> Tensor:
        r, c = self.chunk.rows.stop - self.chunk.rows.start, self.cols.stop - self.cols.start
        return flat[: r * c].view(r, c)

    def exclude(self, scores: Tensor, value: float) -> None:
        self.segment.exclude(scores, value, self.chunk.rows, self.cols)

    def add_gradients(self, w: Tensor, grad_x: Tensor | None) -> None:
        self.segment.add_gradients(w, self.chunk.queries.unit, self.chunk.rows, self.cols, grad_x)


class Work:
    """A problem made ready: the keys as the logits see them, their gradients' accumulators, scratch for tiles."""

    def __init__(self, problem: Problem, plan: Plan, dtypes: Sequence[torch.dtype | None]):
        self.problem, self.plan, self.acc = problem, plan, problem.acc_dtype
        self.device, self.n = problem.query.device, problem.query.shape[0]
        view = problem.guide(0)
        guide = None if view is None or problem.ceiling is None else Guide(view, problem.ceiling)
        self.key = SharedKeys(problem, KEY, plan.cols, dtypes[KEY] is not None, guide)
        self.negatives = [
            RowKeys(problem, i, plan.limit, dtypes[i])
            if negatives.dim() == 3
            else SharedKeys(problem, i, plan.cols, dtypes[i] is not None, guide)
            for i, negatives in enumerate(problem.negatives, start=2)
        ]
        self.segments: list[Segment] = [*([self.key] if problem.in_batch else []), *self.negatives]
        self.columns = [(segment, cols) for segment in self.segments for cols in segment.tiles()]
        t = problem.temperature
        self.uniform = t.shape[0] == 1
        self.inv_t: Scale = 1 / t.item() if self.uniform and self.device.type == "cpu" else t.reciprocal()
        self.shift = not (plan.bounded or self._fits_without_shift())
        self.triangular = plan.name == "triangular"  # tiles are square, and those under the diagonal left out

    def _fits_without_shift(self) -> bool:
        """The same where only the tensors say so: a bound that only a CPU reads for free."""
        p = self.problem
        if self.device.type != "cpu" or not self.n or not self.segments:
            return False
        longest = 1.0 if p.normalize else longest_row(Rows(p.query, False, p.scale(0), self.acc).unit)
        bound = longest * max(segment.longest() for segment in self.segments)
        return bound * LOG2E / p.temperature.min().item() <= EXPONENT_ROOM[self.acc]

    def part(self, x: Any, rows: slice) -> Any:
        """Those rows of a number, or a (1,) or (N, ...) tensor."""
        return x if isinstance(x, float) or x.shape[0] == 1 or rows.stop - rows.start == self.n else x[rows]

    def chunks(self) -> Iterator[Chunk]:
        p = self.problem
        for start in range(0, self.n, self.plan.rows):
            rows = slice(start, min(start + self.plan.rows, self.n))
            if p.self_similar:
                queries = self.key.rows[rows]
            else:
                scale = p.scale(0)
                scale = None if scale is None else self.part(scale, rows)
                queries = Rows(self.part(p.query, rows), p.normalize, scale, self.acc)
            inv_t = self.part(self.inv_t, rows)
            if isinstance(inv_t, float):
                yield Chunk(rows, queries, queries.unit, LOG2E * inv_t, inv_t)
            else:
                yield Chunk(rows, queries, queries.unit * (inv_t * LOG2E)[:, None], 1.0, inv_t)

    def tiles(self, chunk: Chunk) -> Iterator[Tile]:
        tiles = (Tile(chunk, segment, cols) for segment, cols in self.columns)
        if not self.triangular:
            return tiles
        return (tile for tile in tiles if tile.segment is not self.key or tile.cols.start >= chunk.rows.start)

    def two_way(self, tile: Tile) -> bool:
        """Whether the tile serves its columns too: asked for, or because it stands for its transpose as well."""
        if tile.segment is not self.key:
            return False
        return tile.cols.start > tile.chunk.rows.start if self.triangular else self.problem.columns

    def buffers(self, count: int) -> list[Tensor]:
        """Flat buffers, each for any tile."""
        widest = max((cols.stop - cols.start for _, cols in self.columns), default=0)
        return [self.buffer(widest) for _ in range(count)]

    def buffer(self, cols: int) -> Tensor:
        return torch.empty(min(self.plan.rows, self.n) * cols, dtype=self.acc, device=self.device)

    def probabilities(self, softmax: Tensor, u: Tensor) -> tuple[Tensor | None, Tensor]:
        """(shift, factor): u / t times a probability is 2^(score - shift) factor, without a shift where it fits."""
        shift, r = softmax
        factor = u * self.inv_t * r
        return (shift, factor) if self.shift else (None, factor * torch.exp2(-shift))

    def column_scores(self, scores: Tensor, tile: Tile) -> Tensor:
        """s'_ij = s_ij t_i / t'_j, the same dot product at the temperature of key j's own row, in place of s_ij."""
        if isinstance(self.inv_t, float) or isinstance(tile.chunk.inv_t, float) or self.uniform:
            return scores
        return scores.div_(tile.chunk.inv_t[:, None]).mul_(self.inv_t[tile.cols])

    def exponentials(self, scores: Tensor, tile: Tile, dim: int, out: Tensor) -> State:
        """(m, l) along `dim`, and in `out`, which may be the scores, 2^(score - m) with 0 where excluded."""
        tile.exclude(scores, -torch.inf)
        if not self.shift:
            return None, torch.exp2(scores, out=out).sum(dim)
        m = scores.amax(dim)
        return m, torch.sub(scores, finite(m).unsqueeze(dim), out=out).exp2_().sum(dim)

    def moments(self, scores: Tensor, tile: Tile, dims: Sequence[int], scratch: Tensor) -> list[State]:
        """(m, l, s), or (m, l) for a forward alone, along each of `dims`. Without shifts they share one exponential."""
        if self.shift and len(dims) > 1:
            return [state for dim in dims for state in self.moments(scores, tile, [dim], scratch)]
        states = [self.exponentials(scores, tile, dims[0], scratch), *((None, scratch.sum(dim)) for dim in dims[1:])]
        if not self.plan.gradients:
            return states
        tile.exclude(scores, 0.0)  # 0 * -inf is NaN: only a logit that really is infinite may do that
        scratch.mul_(scores)
        return [(m, total, scratch.sum(dim)) for (m, total), dim in zip(states, dims, strict=True)]

    def target_keys(self, chunk: Chunk) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(index, rows, inside): each row's target among the keys, its row there, and whether there is one.

        Without a target the chunk's own rows, all of them there.
        """
        target, unit = self.problem.target, self.key.rows.unit
        if target is None:
            return None, self.part(unit, chunk.rows), None
        target = target[chunk.rows]
        m = unit.shape[0]
        index, inside = target.clamp(0, max(m - 1, 0)), (target >= 0) & (target < m)
        return index, unit[index] if m else torch.zeros_like(chunk.queries.unit), inside

    def positives(self, chunk: Chunk) -> Tensor:
        _, keys, inside = self.target_keys(chunk)
        pos = torch.linalg.vecdot(chunk.queries.unit, keys) * chunk.inv_t
        pos = pos if self.problem.normalize else pos + (pos - pos)  # an infinite logit is never legitimate: NaN
        if inside is None or self.problem.target is None:
            return pos
        missing = torch.where(self.problem.target[chunk.rows] == -1, 0.0, torch.nan).to(self.acc)
        return torch.where(inside, pos, missing)

    def add_positives(self, chunk: Chunk, v: Tensor, grad_x: Tensor | None) -> None:
        """v_i / t_i y_target(i) to the query, v_i / t_i x_i to its target."""
        index, keys, inside = self.target_keys(chunk)
        w = v * chunk.inv_t
        w = (w if inside is None else torch.where(inside, w, 0))[:, None]
        if grad_x is not None:
            grad_x.addcmul_(keys, w)
        if self.key.grad is None or not self.key.grad.shape[0]:
            return
        if index is None:
            self.part(self.key.grad, chunk.rows).addcmul_(chunk.queries.unit, w)
        else:
            add_rows(self.key.grad, index, chunk.queries.unit * w)

    def finish(self, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
        """The gradients of the keys and negatives in `dtypes`."""
        return [segment.finish(dtype) for segment, dtype in zip([self.key, *self.negatives], dtypes, strict=True)]


def finite(m: Tensor) -> Tensor:
    """A maximum that can be subtracted: 0 where there was nothing to maximise over."""
    return m.masked_fill(m == -torch.inf, 0)


def merge(a: State | None, b: State) -> State:
    if a is None:
        return b
    if a[0] is None:
        return None, *(x + y for x, y in zip(a[1:], b[1:], strict=True))
    m = torch.maximum(a[0], b[0])
    wa, wb = torch.exp2(a[0] - finite(m)), torch.exp2(b[0] - finite(m))
    return m, *(x * wa + y * wb for x, y in zip(a[1:], b[1:], strict=True))


def log_sum(state: State) -> Tensor:
    """In base 2; -inf where there is nothing."""
    return state[1].log2() if state[0] is None else state[0] + state[1].log2()


def finish(state: State | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(neg, mean, softmax); mean is 0 where the state holds none."""
    zero = torch.zeros_like(like)
    if state is None:
        return torch.full_like(like, -torch.inf), zero, torch.stack([zero, zero])
    m, total, *products = state
    none = total == 0
    neg, r = log_sum(state) * LN2, total.reciprocal().masked_fill_(none, 0)
    mean = zero
    if products:
        mean = (products[0] / total).masked_fill_(none, 0).mul_(LN2)
        lost = mean.isnan()
        neg, r = neg.masked_fill_(lost, torch.nan), r.masked_fill_(lost, torch.nan)
    return neg, mean, torch.stack([zero if m is None else finite(m), r])


def statistics(problem: Problem, plan: Plan) -> Statistics:
    work = Work(problem, plan, [None] * len(problem.inputs))
    first, second = work.buffers(2)
    pos, neg, mean = (torch.empty(work.n, dtype=work.acc, device=work.device) for _ in range(3))
    softmax = torch.empty(2, work.n, dtype=work.acc, device=work.device)
    columns: dict[int, State | None] = {cols.start: None for cols in work.key.tiles()}
    for chunk in work.chunks():
        state = columns[chunk.rows.start] if work.triangular else None
        for tile in work.tiles(chunk):
            scores, scratch = tile.scores(first), tile.shaped(second)
            two_way = work.two_way(tile)
            shared = two_way and work.uniform
            row, *column = work.moments(scores, tile, [1, 0] if shared else [1], scratch)
            if two_way and not shared:
                column = work.moments(work.column_scores(scores, tile), tile, [0], scratch)
            state = merge(state, row)
            if column:
                columns[tile.cols.start] = merge(columns[tile.cols.start], column[0])
        pos[chunk.rows] = work.positives(chunk)
        neg[chunk.rows], mean[chunk.rows], softmax[:, chunk.rows] = finish(state, neg[chunk.rows])
    if not problem.columns:
        return Statistics(pos, neg, mean, softmax)
    merged = [state for state in columns.values() if state is not None]
    whole = tuple(None if p[0] is None else torch.cat(p) for p in zip(*merged, strict=True)) if merged else None
    return Statistics(pos, neg, mean, softmax, *finish(whole, neg))


def gradients(
    problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    triangular = plan.name == "triangular"  # then both sides' gradients are one, in the accumulator of the keys
    work = Work(problem, plan, [None, dtypes[0], *dtypes[2:]] if triangular else dtypes)
    first, second = work.buffers(2)
    grad_query = torch.empty_like(problem.query, dtype=dtypes[0]) if dtypes[0] and not triangular else None
    shift, u = work.probabilities(statistics.softmax, upstream.neg)
    column_shift, column_u = shift, u  # where columns are rows too; else unused
    if statistics.column_softmax is not None and upstream.column_neg is not None:
        column_shift, column_u = work.probabilities(statistics.column_softmax, upstream.column_neg)
    for chunk in work.chunks():
        rows = chunk.rows
        grad = torch.zeros_like(chunk.queries.unit) if grad_query is not None else None
        if triangular and work.key.grad is not None:
            grad = work.key.grad[rows]
        for tile in work.tiles(chunk):
            scores, w = tile.scores(first), tile.shaped(second)
            tile.exclude(scores, -torch.inf)
            two_way = work.two_way(tile)
            if two_way and shift is None and work.uniform:  # one exponential for both directions
                torch.add(u[rows, None], column_u[tile.cols], out=w).mul_(scores.exp2_())
            else:
                shifted = scores if shift is None else torch.sub(scores, shift[rows, None], out=w)
                torch.exp2(shifted, out=w).mul_(u[rows, None])
                if two_way:
                    e = work.column_scores(scores, tile)
                    e = e if column_shift is None else e.sub_(column_shift[tile.cols])
                    w.addcmul_(e.exp2_(), column_u[tile.cols])
            tile.add_gradients(w, grad)
        work.add_positives(chunk, upstream.pos[rows], grad)
        if grad_query is not None and grad is not None:
            grad_query[rows] = chunk.queries.finish(grad)
    if triangular:
        grad_key, *rest = work.finish([dtypes[0], *dtypes[2:]])
        return [grad_key, None, *rest]
    return [grad_query, *work.finish(dtypes[1:])]


def onepass(problem: Problem, plan: Plan, kind: str, weight: Tensor, wanted: Sequence[bool]) -> OnePass:
    """`sum_i weight_i loss_i` and its gradients, in the accumulator dtype, from one product of the scores.

    A chunk of rows sees every column, so its statistics, and with them its coefficients, are final at once. With
    `problem.columns` the mean of both directions: there the plan has one chunk, one temperature and no shift.
    weight: (1,) or (N,); a row of weight 0 counts for nothing. wanted: of each input, then of the temperature.
    """
    if plan.name == "dense":
        return small.onepass(problem, kind, weight, wanted)
    loss_of, slope_of = LOSSES[kind]
    work = Work(problem, plan, [problem.acc_dtype if w else None for w in wanted[:-1]])
    buffers = [work.buffer(cols.stop - cols.start) for _, cols in work.columns]
    tiny = torch.finfo(work.acc).tiny  # nothing to divide where there are no negatives
    losses, dts = [], []
    grad_query = torch.zeros_like(problem.query, dtype=work.acc) if wanted[0] else None

    def loss_and_slope(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        loss, u = loss_of(x).mul_(w), slope_of(x).mul_(w)
        if not w.shape[0] == 1 < x.shape[0]:  # one weight of many rows is not 0
            loss, u = (y.masked_fill(w == 0, 0) for y in (loss, u))
        return loss, u

    for chunk in work.chunks():
        state: State | None = None
        parts, column_sums = [], []
        for tile, buffer in zip(work.tiles(chunk), buffers, strict=True):
            scores = tile.scores(buffer)
            lost = None
            if not problem.normalize:  # unit rows cannot give -inf; a raw row's must not pass for a probability of 0
                tile.exclude(scores, 0.0)
                lost = scores.amin(1) == -torch.inf
            part = work.exponentials(scores, tile, 1, out=scores)
            if lost is not None:
                part = part[0], part[1].masked_fill(lost, torch.nan)
            state = merge(state, part)
            parts.append((tile, scores, part[0]))
            if work.two_way(tile):
                column_sums.append(scores.sum(0))
        assert state is not None  # the plan is for problems with columns

        w, pos = work.part(weight, chunk.rows), work.positives(chunk)
        w = w / 2 if problem.columns else w
        loss, u = loss_and_slope(log_sum(state).mul_(LN2).sub_(pos), w)
        v, column_factor = u, None
        if problem.columns:
            column_sum = torch.cat(column_sums)
            column_loss, column_u = loss_and_slope(log_sum((None, column_sum)).mul_(LN2).sub_(pos), w)
            loss, v = loss + column_loss, u + column_u
            column_factor = column_u * chunk.inv_t / column_sum.clamp_min_(tiny)
        losses.append(loss)
        grad = torch.zeros_like(chunk.queries.unit) if wanted[-1] and grad_query is None else None
        grad = grad if grad_query is None else work.part(grad_query, chunk.rows)
        per_exponential = u * chunk.inv_t / state[1].clamp_min(tiny)
        for tile, e, m in parts:
            factor = per_exponential if m is None else per_exponential * torch.exp2(m - finite(state[0]))
            factor = factor[:, None]
            if column_factor is not None and work.two_way(tile):
                factor = factor + column_factor[tile.cols]
            tile.add_gradients(e.mul_(factor), grad)
        work.add_positives(chunk, -v, grad)
        if wanted[-1] and grad is not None:  # x_i . G_i = u_i mean_i + v_i pos_i, summed over i that of columns too
            dts.append(torch.linalg.vecdot(grad, chunk.queries.unit) * -chunk.inv_t)
        if grad_query is not None and grad is not None:
            chunk.queries.finish(grad)
    grads = [grad_query, *work.finish([work.acc] * (len(problem.inputs) - 1))]
    loss = losses[0] if len(losses) == 1 else torch.cat(losses)
    return OnePass(loss.sum(), grads, torch.cat(dts) if dts else None)
