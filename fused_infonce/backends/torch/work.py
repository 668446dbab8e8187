"""A problem made ready for PyTorch: chunks of rows, tiles of scores, and softmax states that merge.

Logits are in base 2, exp2 being the cheaper exponential. A state is (m, l, s) with l = sum 2^(logit - m) and
s = sum 2^(logit - m) logit over some columns; m is None, for 0, where every exponential fits as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import LN2, LOG2E, KeySet, Problem, RowStatistics
from ..indexing import add_rows, part_of
from ..plan import Plan
from ..precision import EXPONENT_ROOM
from ..rows import Rows
from .bias import Bias
from .keys import Guide, IndexedKeys, Keys, PairedKeys, SharedKeys

State = tuple[Any, ...]  # (m, l) or (m, l, s)
FLOOR = -1e4  # of a score that is left out: its exponential is 0 in float64 too, and unlike -inf it may be multiplied
Scale = Tensor | float  # one for all rows, as a number where that is free to read or a (1,) tensor; or (R,)


class Chunk(NamedTuple):
    """A chunk of the rows of the problem. `alpha scaled` are the queries times log2(e) / t."""

    rows: slice
    queries: Rows
    scaled: Tensor  # (R, D)
    alpha: float
    inv_t: Scale


class Tile(NamedTuple):
    """A chunk's rows against some columns of one set of keys."""

    chunk: Chunk
    keys: Keys
    cols: slice

    def scores(self, out: Tensor) -> Tensor:
        """Return the logits in base 2, in a flat buffer."""
        chunk = self.chunk
        return self.keys.scores(chunk.scaled, chunk.alpha, chunk.rows, self.cols, self.shaped(out))

    def shaped(self, flat: Tensor) -> Tensor:
        r, c = self.chunk.rows.stop - self.chunk.rows.start, self.cols.stop - self.cols.start
        return flat[: r * c].view(r, c)

    def exclude(self, scores: Tensor, value: float) -> None:
        self.keys.exclude(scores, value, self.chunk.rows, self.cols)

    def add_gradients(self, w: Tensor, grad_x: Tensor | None) -> None:
        self.keys.add_gradients(w, self.chunk.queries.unit, self.chunk.rows, self.cols, grad_x)


class Work:
    """A problem made ready: the keys as the logits see them, their gradients' accumulators, scratch for tiles."""

    def __init__(self, problem: Problem, plan: Plan, dtypes: Sequence[torch.dtype | None]):
        self.problem, self.plan, self.acc = problem, plan, problem.acc_dtype
        self.device, self.n = problem.query.rows.device, problem.query.rows.shape[0]
        view, ceiling = problem.query.guide, problem.ceiling
        guide = None if view is None or ceiling is None else Guide(view, ceiling)
        (first, *others), (_, wanted, *rest) = problem.keys, dtypes[: len(problem.sets)]
        self.key = SharedKeys(problem, first, plan.cols, wanted is not None, guide, targets=True)
        self.others: list[Keys] = [
            self.own_keys(keys, dtype)
            if keys.is_paired()
            else SharedKeys(problem, keys, plan.cols, dtype is not None, guide)
            for keys, dtype in zip(others, rest, strict=True)
        ]
        self.sets: list[Keys] = [*([self.key] if problem.in_batch else []), *self.others]
        self.columns = [(keys, cols) for keys in self.sets for cols in keys.tiles()]
        t = problem.temperature
        self.shared_t = t.is_shared()
        self.inv_t: Scale = t.inverse if self.shared_t and self.device.type == "cpu" else t.values.reciprocal()
        self.shift = plan.full or not (plan.bounded or self.largest_logit * LOG2E <= EXPONENT_ROOM[self.acc])
        self.triangular = plan.name == "triangular"  # tiles are square, and those under the diagonal left out
        self.query_bias: Bias | None = None
        self.biases: list[Bias] = []  # aligned with `Problem.biases`
        for place, wanted_bias in zip(problem.biased, dtypes[len(problem.sets) :], strict=True):
            values = problem.sets[place].bias
            assert values is not None
            self.biases.append(Bias(values, self.shift, bool(wanted_bias), of_rows=place == 0))
            if place == 0:
                self.query_bias = self.biases[-1]
            else:
                (self.key, *self.others)[place - 1].bias = self.biases[-1]

    def own_keys(self, keys: KeySet, dtype: torch.dtype | None) -> PairedKeys:
        """Return keys of one query each."""
        kind = PairedKeys if keys.indices is None else IndexedKeys
        return kind(self.problem, keys, self.plan.limit, dtype)

    @cached_property
    def largest_logit(self) -> float:
        """The size of the largest logit by a bound that only the tensors give, which a CPU reads for free; infinite
        where reading them costs."""
        p = self.problem
        if self.device.type != "cpu" or not self.n or not self.sets:
            return math.inf
        longest = 1.0 if p.normalize else Rows(p.query.rows, False, p.query.scale, self.acc).longest()
        bound = longest * max(keys.longest() for keys in self.sets) / p.temperature.values.min().item()
        return bound + p.largest_added

    def chunks(self) -> Iterator[Chunk]:
        query = self.problem.query
        for start in range(0, self.n, self.plan.rows):
            rows = slice(start, min(start + self.plan.rows, self.n))
            if self.problem.self_similar:
                queries = self.key.rows[rows]
            else:
                scale = None if query.scale is None else part_of(query.scale, rows)
                queries = Rows(part_of(query.rows, rows), self.problem.normalize, scale, self.acc)
            inv_t = part_of(self.inv_t, rows)
            if isinstance(inv_t, float):
                yield Chunk(rows, queries, queries.unit, LOG2E * inv_t, inv_t)
            else:
                yield Chunk(rows, queries, queries.unit * (inv_t * LOG2E)[:, None], 1.0, inv_t)

    def tiles(self, chunk: Chunk) -> Iterator[Tile]:
        tiles = (Tile(chunk, keys, cols) for keys, cols in self.columns)
        if not self.triangular:
            return tiles
        return (tile for tile in tiles if tile.keys is not self.key or tile.cols.start >= chunk.rows.start)

    def two_way(self, tile: Tile) -> bool:
        """Return whether the tile serves its columns too: where asked for, or where it stands for its transpose."""
        if tile.keys is not self.key:
            return False
        return tile.cols.start > tile.chunk.rows.start if self.triangular else self.problem.columns

    def buffers(self, count: int) -> list[Tensor]:
        """Return flat buffers, each for any tile."""
        widest = max((cols.stop - cols.start for _, cols in self.columns), default=0)
        return [self.buffer(widest) for _ in range(count)]

    def buffer(self, cols: int) -> Tensor:
        return torch.empty(min(self.plan.rows, self.n) * cols, dtype=self.acc, device=self.device)

    def probabilities(self, statistics: RowStatistics, u: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return (shift, factor) with `2^(score - shift) factor = u p / t`; no shift where every exponential fits."""
        shift, factor = statistics.maximum, u * self.inv_t * statistics.scale
        return (shift, factor) if self.shift else (None, factor * torch.exp2(-shift))

    def column_scores(self, scores: Tensor, tile: Tile) -> Tensor:
        """Turn s_ij into s_ij t_i / t'_j in place, the same product at the temperature of key j's own row."""
        if isinstance(self.inv_t, float) or isinstance(tile.chunk.inv_t, float) or self.shared_t:
            return scores
        return scores.div_(tile.chunk.inv_t[:, None]).mul_(self.inv_t[tile.cols])

    def bias_of(self, tile: Tile, dim: int) -> tuple[Bias | None, slice]:
        """Return the biases of what a tile's rows (dim 1) or columns (dim 0) are scored against, and its part."""
        if dim == 0:
            return self.query_bias, tile.chunk.rows
        return tile.keys.bias, tile.keys.part(tile.chunk.rows, tile.cols)

    def sum(self, e: Tensor, tile: Tile, dim: int) -> Tensor:
        """Return the sum of exponentials, or of their products, along `dim`, each times the factor of its bias."""
        bias, part = self.bias_of(tile, dim)
        return e.sum(dim) if bias is None else bias.total(e, part)

    def logits(self, scores: Tensor, tile: Tile, dim: int, out: Tensor) -> Tensor:
        """Return scores with their biases, in `out` where there are some."""
        bias, part = self.bias_of(tile, dim)
        return scores if bias is None else bias.added(scores, part, out)

    def with_factors(self, e: Tensor, tile: Tile, dim: int) -> Tensor:
        """Multiply the exponentials of one direction by the factors of their biases, where they have none, in place."""
        bias, part = self.bias_of(tile, dim)
        return e if bias is None else bias.multiply(e, part)

    def both(self, tile: Tile, row: Tensor, column: Tensor, out: Tensor | None = None) -> Tensor:
        """Return (R, T), what turns the one exponential of both directions into W: row_i 2^c_j + column_j 2^c'_i.

        c are the biases of keys, c' those of queries.
        """
        key, query = tile.keys.bias, self.query_bias
        if query is not None and query.factor is not None:
            column = torch.mul(query.factor[tile.chunk.rows, None], column, out=out)
        if key is None or key.factor is None:
            return torch.add(row[:, None], column, out=out)
        return torch.addcmul(column, row[:, None], key.factor[tile.cols], out=out)

    def add_bias_gradient(self, tile: Tile, dim: int, e: Tensor, factor: Tensor, inv_t: Scale) -> None:
        """Add dc_j = sum_i u_i p_ij, of exponentials with `factor e = u p / t`, to the gradient of what is scored."""
        bias, part = self.bias_of(tile, dim)
        if bias is not None and bias.grad is not None:
            bias.add_gradient(e, factor / inv_t, part)

    def exponentials(self, scores: Tensor, tile: Tile, dim: int, out: Tensor, final: bool = True) -> State:
        """Return (m, l) along `dim`, and in `out`, which may be the scores, 2^(score - m) with 0 where excluded.

        With a shift a score has its bias, without one l has the factors of the biases. A logit of -inf makes l NaN, or
        is left to (m, l, s) where that is not `final`.
        """
        lost = None
        if final and self.shift and not self.problem.normalize:  # unit rows cannot give -inf
            tile.exclude(scores, 0.0)
            lost = scores.amin(dim) == -torch.inf
        tile.exclude(scores, -torch.inf if self.shift else FLOOR)
        if not self.shift:
            return None, self.sum(torch.exp2(scores, out=out), tile, dim)
        logits = self.logits(scores, tile, dim, out)
        m = logits.amax(dim)
        total = torch.sub(logits, finite(m).unsqueeze(dim), out=out).exp2_().sum(dim)
        return m, total if lost is None else total.masked_fill_(lost, torch.nan)

    def moments(self, scores: Tensor, tile: Tile, dims: Sequence[int], scratch: Tensor) -> list[State]:
        """Return (m, l, s) along each of `dims`, or (m, l) where the plan needs no mean.

        Unshifted they share an exponential.
        """
        if self.shift and len(dims) > 1:
            return [state for dim in dims for state in self.moments(scores, tile, [dim], scratch)]
        states = [self.exponentials(scores, tile, dims[0], scratch, final=not self.plan.mean)]
        states += [(None, self.sum(scratch, tile, dim)) for dim in dims[1:]]
        if not self.plan.mean:
            return states
        if self.shift:
            tile.exclude(scores, 0.0)  # 0 * -inf is NaN: only a logit that really is infinite may do that
        scratch.mul_(scores)
        # which makes the whole state NaN
        return [
            (m, total.add_(product, alpha=0) if self.shift else total, product)
            for (m, total), dim in zip(states, dims, strict=True)
            for product in [self.sum(scratch, tile, dim)]
        ]

    def target_keys(self, chunk: Chunk) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return (index, rows, inside): each row's target among the keys, its unit row, and whether there is one.

        Where the problem has no targets they are the chunk's own rows, all of them there.
        """
        target, rows, m = self.problem.target, self.key.rows, len(self.problem.keys[0].rows)
        if target is None:
            return None, rows.units(chunk.rows), None
        target = target[chunk.rows]
        index, inside = target.clamp(0, max(m - 1, 0)), (target >= 0) & (target < m)
        return index, rows.taken(index) if m else torch.zeros_like(chunk.queries.unit), inside

    def positives(self, chunk: Chunk) -> Tensor:
        """Return the (R,) logits of the targets."""
        _, keys, inside = self.target_keys(chunk)
        pos = torch.linalg.vecdot(chunk.queries.unit, keys) * chunk.inv_t
        pos = pos if self.problem.normalize else pos + (pos - pos)  # an infinite logit is never legitimate: NaN
        if inside is None or self.problem.target is None:
            return pos
        missing = torch.where(self.problem.target[chunk.rows] == -1, 0.0, torch.nan).to(self.acc)
        return torch.where(inside, pos, missing)

    def add_positives(self, chunk: Chunk, v: Tensor, grad_x: Tensor | None) -> None:
        """Add v_i / t_i y_target(i) to the query's gradient and v_i / t_i x_i to its target's."""
        index, keys, inside = self.target_keys(chunk)
        w = v * chunk.inv_t
        w = (w if inside is None else torch.where(inside, w, 0))[:, None]
        if grad_x is not None:
            grad_x.addcmul_(keys, w)
        if self.key.grad is None or not self.key.grad.shape[0]:
            return
        if index is None:
            part_of(self.key.grad, chunk.rows).addcmul_(chunk.queries.unit, w)
        else:
            del keys  # (R, D), as what is added
            add_rows(self.key.grad, index, chunk.queries.unit * w)

    def finish(self, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
        """Return the gradients of all sets of keys in `dtypes`."""
        return [keys.finish(dtype) for keys, dtype in zip([self.key, *self.others], dtypes, strict=True)]


def finite(m: Tensor) -> Tensor:
    """Return a maximum that can be subtracted: 0 where there was nothing to maximise over."""
    return m.masked_fill(m == -torch.inf, 0)


def merge(a: State | None, b: State) -> State:
    """Return the softmax state over the columns of two states."""
    if a is None:
        return b
    if a[0] is None:
        return None, *(x + y for x, y in zip(a[1:], b[1:], strict=True))
    m = torch.maximum(a[0], b[0])
    wa, wb = torch.exp2(a[0] - finite(m)), torch.exp2(b[0] - finite(m))
    return m, *(x * wa + y * wb for x, y in zip(a[1:], b[1:], strict=True))


def log_sum(state: State) -> Tensor:
    """Return the natural logsumexp of a state; -inf for one of no columns."""
    total: Tensor = state[1].log()
    return total if state[0] is None else total.add_(state[0], alpha=LN2)


def statistics_of(state: State | None, pos: Tensor, size: int | None = None) -> RowStatistics:
    """Return the statistics of rows with these positives; those of no columns for a state of None.

    The mean is NaN where nobody asked for it: no gradient needs it, and it is no result. size: of what has statistics,
    if they are not as many as positives.
    """
    zero = pos.new_zeros(len(pos) if size is None else size)
    if state is None:
        return RowStatistics(pos, torch.full_like(zero, -torch.inf), zero, zero, zero)
    m, total, *products = state
    scale = total.reciprocal().masked_fill_(total == 0, 0)
    mean = (products[0] * scale).mul_(LN2) if products else torch.full_like(zero, torch.nan)
    return RowStatistics(pos, log_sum(state), mean, zero if m is None else finite(m), scale)


def over_chunks(parts: Sequence[RowStatistics]) -> RowStatistics:
    """Return the statistics of all rows from those of their chunks."""
    return parts[0] if len(parts) == 1 else RowStatistics(*map(torch.cat, zip(*parts, strict=True)))
