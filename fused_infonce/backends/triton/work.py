"""A problem made ready for the kernels: its sides as tile passes read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ..contract import Problem, Statistics, Upstream
from . import paired
from .launch import Excluded, Side, contiguous
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
                diagonal = self.target is None or self.problem.self_similar
                yield index, keys, Excluded(self.target, diagonal) if index == 1 else Excluded()


def prepare(
    problem: Problem, statistics: Statistics | None = None, upstream: Upstream | None = None, positives: bool = False,
) -> tuple[Work, Tensor | None]:  # fmt: skip
    """Return the problem made ready, for gradients with statistics and their upstream, and with `positives` the logits
    of the targets."""
    t, target, normalize = problem.temperature.values, contiguous(problem.target), problem.normalize
    (first, *others), rows, columns = problem.keys, None, None
    slope = column_slope = None
    if statistics is not None and upstream is not None:
        (rows, columns), slope, column_slope = statistics, upstream.neg, upstream.column_neg
    query, pos = side(
        problem.query, normalize, t, statistics=rows, u=slope, positive=(first, target) if positives else None,
        ceiling=problem.ceiling,
    )  # fmt: skip
    if problem.self_similar:  # in a backward C + C^T serves both sides at once
        key = replace(query, ids=contiguous(first.ids), scale=query.scale if upstream else None)
    elif problem.columns:
        key, _ = side(first, normalize, t, statistics=columns, u=column_slope)
    else:
        key, _ = side(first, normalize)
    shared, pairs = {1: key}, {}
    for index, keys in enumerate(others, start=2):
        if keys.rows.dim() == 2:
            shared[index], _ = side(keys, normalize)
        else:
            pairs[index] = paired.paired_keys(query.rows, keys, normalize)
    return Work(problem, target, query, shared, pairs), pos
