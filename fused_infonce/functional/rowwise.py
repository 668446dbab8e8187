"""Losses of a row's statistics other than InfoNCE: of one direction or both, fused or dense, and their reduction."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from .. import contrast, reference_variants
from ..contrast import Options
from ..problem import Problem, Statistics
from .compose import columns_of, reduced_rows, wide


class Direction(NamedTuple):
    """Rows of a problem with their statistics, (N,) each."""

    problem: Problem
    pos: Tensor
    neg: Tensor


def directions(problem: Problem, options: Options, symmetric: bool) -> list[Direction]:
    """The queries against the keys, and with `symmetric` the keys against the queries."""
    stats = statistics(problem, options)
    found = [Direction(problem, stats.pos, stats.neg)]
    if symmetric:
        columns, neg = columns_of(problem), stats.column_neg
        found.append(Direction(columns, stats.pos, statistics(columns, options).neg if neg is None else neg))
    return found


def statistics(problem: Problem, options: Options) -> Statistics:
    if options.backend == "reference":
        return reference_variants.statistics(problem)
    return contrast.statistics(problem, options)


def composed(
    problem: Problem,
    options: Options,
    reduction: str,
    symmetric: bool,
    weight: Tensor | None,
    loss_of: Callable[[Direction], Tensor],
) -> Tensor:
    """(N,) losses of the rows, or with `symmetric` their mean with those of the columns, reduced as `info_nce` does."""
    context: AbstractContextManager[Any] = nullcontext()
    if symmetric and not problem.columns:  # two problems share rows, whose 16-bit gradients are rounded once
        (query, context), (key, _), *negatives = (wide(x) for x in problem.inputs)
        problem = replace(problem, query=query, key=key, negatives=tuple(x for x, _ in negatives))
    with context:
        losses = [loss_of(direction) for direction in directions(problem, options, symmetric)]
    return reduced_rows(losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2, problem, reduction, weight)
