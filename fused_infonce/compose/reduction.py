"""What the losses share: options of a call, reductions, and logits of given pairs in O(N D)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, contrast, reference_variants
from ..backends.contract import Problem, Statistics, accumulator
from ..backends.indexing import add_rows, take_rows
from ..backends.reference import unit_rows
from ..backends.row_losses import infonce
from ..contrast import Options


def call_options(backend: str, workspace_limit: int | None, temperature: float | Tensor, normalize: bool) -> Options:
    lowest = checks.lowest_temperature(temperature) if normalize else None
    return Options(backend, checks.workspace_limit(workspace_limit), 1 / lowest if lowest else math.inf)


def reduced(
    problem: Problem,
    options: Options,
    reduction: str,
    symmetric: bool,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """InfoNCE of a problem. Smoothing adds eps (pos_i - mean of the allowed logits) to a row's loss."""
    context: AbstractContextManager[Any] = nullcontext()
    if label_smoothing or (symmetric and not problem.columns):
        problem, context = widened(problem)
    with context:
        return _reduced(problem, options, reduction, symmetric, weight, label_smoothing)


def _reduced(
    problem: Problem, options: Options, reduction: str, symmetric: bool, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    apart = symmetric and not problem.columns
    if reduction == "none" or apart or (weight is not None and weight.requires_grad):
        rows = mean_of([infonce(x.neg - x.pos) for x in directions(problem, options, symmetric)])
        rows = rows + label_smoothing * _pull(problem, symmetric) if label_smoothing else rows
        return reduced_rows(rows, problem, reduction, weight)
    loss = at_once(problem, options, reduction, "infonce", weight)
    if label_smoothing:
        loss = loss + label_smoothing * reduced_rows(_pull(problem, symmetric), problem, reduction, weight)
    return loss


def at_once(problem: Problem, options: Options, reduction: str, kind: str, weight: Tensor | None) -> Tensor:
    """A row loss in `row_loss.LOSSES`, or with `problem.columns` its mean with that of columns, as "mean" or "sum": its
    gradients may be made in the forward. Not for a weight that has a gradient, which needs the rows."""
    w, empty = row_weights(problem, reduction, weight)
    loss = contrast.reduced_loss(problem, options, kind, w)
    return loss if empty is None else torch.where(empty, torch.nan, loss)


def reduced_rows(rows: Tensor, problem: Problem, reduction: str, weight: Tensor | None) -> Tensor:
    """Of (N,) losses; those of rows that are ignored are 0."""
    if reduction == "none":
        rows = rows if weight is None else weight * rows
        return rows if problem.target is None else torch.where(problem.target == -1, 0, rows)
    w, empty = row_weights(problem, reduction, weight)
    loss = weighted(rows, w, problem)
    return loss if empty is None else torch.where(empty, torch.nan, loss)


def weighted(rows: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    """sum_i weight_i rows_i; a row of weight 0 counts for nothing."""
    if not weight.requires_grad:
        return contrast.weighted_sum(rows, weight)
    rows = weight * rows  # the loss of a row of weight 0 is the gradient of its weight
    return (rows if problem.target is None else torch.where(problem.target == -1, 0, rows)).sum()


def row_weights(problem: Problem, reduction: str, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What each row's loss is multiplied by, (1,) or (N,); and where rows may be none, whether a mean has no rows."""
    n, t = problem.query.shape[0], problem.temperature
    every_row = problem.target is None or problem.self_similar  # none is ignored
    if every_row and weight is None:
        uniform = t.new_full((1,), 1 / max(n, 1) if reduction == "mean" else 1.0)
        return uniform, uniform[0] > 0 if reduction == "mean" and n == 0 else None
    weight = t.new_ones(n) if weight is None else weight
    if problem.target is not None and not every_row:
        weight = torch.where(problem.target == -1, 0, weight)
    if reduction == "sum":
        return weight, None
    total = weight.sum()
    empty = total == 0
    return weight / torch.where(empty, 1, total), empty


class Direction(NamedTuple):
    """Rows of a problem with their statistics, (N,) each."""

    problem: Problem
    pos: Tensor
    neg: Tensor
    softmax: Tensor  # (2, N), without a gradient


def directions(problem: Problem, options: Options, symmetric: bool) -> list[Direction]:
    """The queries against the keys, and with `symmetric` the keys against the queries: a problem apart where explicit
    negatives replaced the in-batch ones in the rows."""
    stats = statistics(problem, options)
    found = [Direction(problem, stats.pos, stats.neg, stats.softmax)]
    if symmetric:
        columns, neg, softmax = columns_of(problem), stats.column_neg, stats.column_softmax
        if neg is None or softmax is None:
            _, neg, _, softmax, *_ = statistics(columns, options)
        found.append(Direction(columns, stats.pos, neg, softmax))
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
    """Any loss of the rows' statistics, or with `symmetric` its mean with that of the columns, reduced as `info_nce`
    does."""
    context: AbstractContextManager[Any] = nullcontext()
    if symmetric and not problem.columns:
        problem, context = widened(problem)
    with context:
        rows = mean_of([loss_of(direction) for direction in directions(problem, options, symmetric)])
    return reduced_rows(rows, problem, reduction, weight)


def mean_of(losses: Sequence[Tensor]) -> Tensor:
    """Of one direction or two."""
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


def widened(problem: Problem) -> tuple[Problem, AbstractContextManager[Any]]:
    """Where problems share rows: over rows whose 16-bit gradients are added in float32 and rounded once; see `wide`."""
    (query, context), (key, _), *negatives = (wide(x) for x in problem.inputs)
    return replace(problem, query=query, key=key, negatives=tuple(x for x, _ in negatives)), context


def columns_of(problem: Problem) -> Problem:
    """The keys against the queries: what `symmetric` adds."""
    return replace(
        problem,
        query=problem.key,
        key=problem.query,
        negatives=(),
        negative_ids=(),
        row_ids=problem.key_ids,
        key_ids=problem.row_ids if problem.key_ids is not None else None,
        in_batch=True,
        columns=False,
    )


def _pull(problem: Problem, symmetric: bool) -> Tensor:
    """(N,) pos_i - mean_j s_ij over the positive and the negatives of row i, or with that of columns: O((N + M) D)."""
    if symmetric:
        return (_pull(problem, False) + _pull(columns_of(problem), False)) / 2
    with contrast.products(problem.query.device.type):
        return _row_pull(problem)


def _row_pull(problem: Problem) -> Tensor:
    t = problem.temperature
    x, y = (unit(rows, problem.normalize, t.dtype) for rows in (problem.query, problem.key))
    n, m = len(x), len(y)
    target = problem.target
    if target is not None:
        target = target.clamp(0, max(m - 1, 0))
    positive = x.new_zeros(x.shape) if m == 0 else y if target is None else take_rows(y, target)
    total, count = positive, t.new_ones(n)
    row_ids = problem.row_ids
    if problem.in_batch and m:
        total, count = y.sum(0).expand_as(x), count * m
        if row_ids is not None and problem.key_ids is not None:  # all of the row's id are left out, but its positive
            same, times = class_sums(problem.key_ids, y, row_ids)
            kept = problem.key_ids if target is None else problem.key_ids[target]
            again = (kept == row_ids).to(t.dtype)
            total, count = total - same + again[:, None] * positive, count - times + again
    for keys, ids in zip(problem.negatives, problem.negative_ids, strict=True):
        z = unit(keys, problem.normalize, t.dtype)
        if z.dim() == 3:
            left = z.new_ones(z.shape[:2]) if ids is None or row_ids is None else (ids != row_ids[:, None]).to(t.dtype)
            total, count = total + torch.bmm(left[:, None], z)[:, 0], count + left.sum(1)
            continue
        total, count = total + z.sum(0), count + len(z)
        if ids is not None and row_ids is not None:
            same, times = class_sums(ids, z, row_ids)
            total, count = total - same, count - times
    return (dots(x, positive) - dots(x, total) / count) / t


def reduced_mean(loss: Tensor, reduction: str) -> Tensor:
    """Of rows that all count."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)); -inf, and no gradient, where both are: there that of torch.logaddexp is NaN."""
    none = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(none, 0), b.masked_fill(none, 0)).masked_fill(none, -torch.inf)


def unit(x: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """The rows as the logits see them, differentiable."""
    return unit_rows(x.to(dtype)) if normalize else x.to(dtype)


def dots(x: Tensor, y: Tensor) -> Tensor:
    """x_i . y_i."""
    return torch.linalg.vecdot(x, y)


def class_sums(classes: Tensor, x: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each class in `wanted` (default: of each row) the sum of its rows of x, (K, D), and their number, (K,).

    Added in one order, and without a synchronisation.
    """
    wanted = classes if wanted is None else wanted
    ordered, _ = torch.sort(classes)
    place = torch.searchsorted(ordered, classes)  # of the class's first row: the same for all of it
    sums = add_rows(x.new_zeros(len(x) + 1, x.shape[1]), place, x)
    first, end = (torch.searchsorted(ordered, wanted, right=right) for right in (False, True))
    return take_rows(sums, torch.where(end > first, first, len(x))), end - first


def wide(rows: Tensor) -> tuple[Tensor, torch.autocast]:
    """Rows in the accumulator dtype, of the values that the products see, and the context in which to make these.

    So 16-bit rows that a primitive and a composition share have their gradients added in float32 and rounded once.
    """
    dtype, device = contrast.compute_dtype([rows]), rows.device.type
    acc = accumulator(dtype)
    if rows.dtype == acc and dtype != acc:  # float32 rows under autocast
        with torch.no_grad():
            narrow, scale = contrast.cast(rows, dtype)
            change = (narrow.to(acc) if scale is None else narrow.to(acc) * scale[..., None]) - rows
        return rows + change, torch.autocast(device, dtype=dtype)
    return rows.to(dtype).to(acc), torch.autocast(device, dtype=dtype, enabled=dtype != acc)
