"""A problem made ready for the kernels: its sides as tile passes read them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..contract import EPS, Problem, Statistics, Upstream
from ..plan import Plan
from . import paired
from .launch import Excluded, Side, contiguous, contiguous_rows, in_base_2
from .paired import Paired
from .rows import side


@dataclass(eq=False)
class Work:
    """A problem made ready: its sides as a tile pass reads them. Numbers are places in `Problem.inputs`."""

    problem: Problem
    target: Tensor | None
    query: Side
    shared: dict[int, Side]  # sets of keys that all queries have, the first of them the targets'
    paired: dict[int, Paired]  # sets of keys of one query each

    @property
    def segments(self) -> Iterator[tuple[int, Side, Excluded]]:
        """Yield (place, keys, pairs excluded besides equal ids) of each set of keys that a tile pass runs over."""
        for index, keys in self.shared.items():
            if len(keys) and (index > 1 or self.problem.in_batch):
                yield index, keys, self.excluded if index == 1 else Excluded()

    @property
    def excluded(self) -> Excluded:
        """Return the pairs of queries and keys of the first set that are no negatives."""
        if self.problem.two_views:
            return Excluded(diagonal=True, shift=len(self.query) // 2)
        return Excluded(self.target, self.target is None or self.problem.self_similar)


def unshifted(problem: Problem, plan: Plan) -> bool:
    """Return whether every exponential fits as it is and serves all directions, and nobody asks for a maximum.

    Paired keys always have one, and a guide needs one, because a pair that one tile's rounding leaves out and another's
    does not has a probability that only a maximum bounds.
    """
    shared = problem.temperature.is_shared() and not any(keys.is_paired() for keys in problem.keys)
    return plan.bounded and not plan.full and problem.ceiling is None and shared and not problem.biases


def prepare(
    problem: Problem, plan: Plan, statistics: Statistics | None = None, upstream: Upstream | None = None,
    positives: bool = False,
) -> tuple[Work, Tensor | None]:  # fmt: skip
    """Return the problem made ready, for gradients with statistics and their upstream, and with `positives` the logits
    of the targets."""
    t, target, normalize = problem.temperature.values, contiguous(problem.target), problem.normalize
    (first, *others), rows, columns = problem.keys, None, None
    slope = column_slope = None
    if statistics is not None and upstream is not None:
        (rows, columns), slope, column_slope = statistics, upstream.neg, upstream.column_neg
    shifted = not unshifted(problem, plan)
    queries = problem.query if problem.columns else problem.query._replace(bias=None)  # which are not scored then
    query, pos = side(
        queries, normalize, t, statistics=rows, u=slope, positive=(first, target) if positives else None,
        ceiling=problem.ceiling, shifted=shifted,
    )  # fmt: skip
    if problem.self_similar:  # a state serves a row and a column, and in a backward C + C^T both sides
        key = replace(query, ids=contiguous(first.ids))
    elif problem.columns:
        key, _ = side(first, normalize, t, statistics=columns, u=column_slope, shifted=shifted)
    else:
        key, _ = side(first, normalize)
    shared, pairs = {1: key}, {}
    for index, keys in enumerate(others, start=2):
        if keys.is_paired():
            pairs[index] = paired.paired_keys(query.rows, keys, normalize)
        else:
            shared[index], _ = side(keys, normalize)
    return Work(problem, target, query, shared, pairs), pos


def kept_sizes(problem: Problem, plan: Plan) -> list[int]:
    """Return the sizes of what `to_keep` returns: vectors of the queries, norms, dot products of paired keys."""
    if plan.name == "dense":  # its gradients are finished
        return []
    rows = [math.prod(s.rows.shape[:-1]) for s in problem.sets]
    n = rows[0]
    paired = [n * s.columns() for s in problem.sets if s.is_paired()]
    return [n, n, *(rows if problem.normalize else []), *([n, n, n, *paired] if paired else [])]


def to_keep(work: Work, v: Tensor, factor: Tensor) -> list[Tensor]:
    """Return what `restored` needs beside the problem and its sums."""
    query, pairs = work.query, work.paired
    sides: dict[int, Side | Paired] = {0: query, **work.shared, **pairs}
    norms = [sides[i].inverse for i in range(len(sides))] if work.problem.normalize else []
    weights = [query.scale, query.shift, query.weight, *(keys.dots for keys in pairs.values())] if pairs else []
    return [v, factor, *(x for x in (*norms, *weights) if x is not None)]


def restored(problem: Problem, kept: Sequence[Tensor]) -> tuple[Work, Tensor, Tensor]:
    """Return a problem made ready to finish its gradients, v and the queries' factor, from what `to_keep` returned."""
    v, factor, *rest = kept
    vectors = iter(rest)
    sets, zero_row = problem.sets, 1 / EPS if problem.normalize else math.inf
    inverse = [next(vectors) if problem.normalize else contiguous(s.scale) for s in sets]
    sides = {i: Side(contiguous_rows(s.rows), inverse[i], zero_row=zero_row) for i, s in enumerate(sets)}
    query, pairs = sides.pop(0), {}
    paired = [i for i, s in enumerate(sets) if s.is_paired()]
    if paired:
        scale, shift, weight = (next(vectors) for _ in range(3))
        query = replace(query, ids=contiguous(problem.query.ids), scale=scale, shift=shift, weight=weight)
    for i in paired:
        rows = sides.pop(i).rows
        ids, indices, bias = contiguous(sets[i].ids), contiguous(sets[i].indices), in_base_2(sets[i].bias)
        pairs[i] = Paired(rows, next(vectors), inverse[i], ids, zero_row, bias, indices)
    return Work(problem, contiguous(problem.target), query, sides, pairs), v, factor
