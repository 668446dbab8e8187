"""Losses of a row's statistics other than InfoNCE: of one direction or both, fused or dense, and their reduction."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import contrast, reference_variants
from ..contrast import Options
from ..problem import Problem, Statistics
from .compose import _columns, _weighted, _weights, wide


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
        columns, neg = _columns(problem), stats.column_neg
        found.append(Direction(columns, stats.pos, statistics(columns, options).neg if neg is None else neg))
    return found


def statistics(problem: Problem, options: Options) -> Statistics:
    if options.backend == "reference":
        return reference_variants.statistics(problem)
    return contrast.statistics(problem, options)


def reduced_rows(
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
    return reduce(losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2, problem, reduction, weight)


def at_once(problem: Problem, options: Options, reduction: str, kind: str, weight: Tensor | None) -> Tensor:
    """`reduced_rows` of a row loss in `row_loss.LOSSES`, whose gradients may be made in the forward."""
    w, empty = _weights(problem, reduction, weight)
    loss = contrast.reduced_loss(problem, options, kind, w)
    return loss if empty is None else torch.where(empty, torch.nan, loss)


def reduce(rows: Tensor, problem: Problem, reduction: str, weight: Tensor | None) -> Tensor:
    """Of (N,) losses, those of rows that are ignored being 0."""
    if reduction == "none":
        rows = rows if weight is None else weight * rows
        return rows if problem.target is None else torch.where(problem.target == -1, 0, rows)
    w, empty = _weights(problem, reduction, weight)
    loss = _weighted(rows, w, problem)
    return loss if empty is None else torch.where(empty, torch.nan, loss)
