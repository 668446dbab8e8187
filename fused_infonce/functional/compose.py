"""What the losses share: options of a call, reductions, and logits of given pairs in O(N D)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import contrast, validation
from ..contrast import Options
from ..problem import Problem
from ..reference import unit_rows
from ..row_loss import infonce


def call_options(backend: str, workspace_limit: int | None, temperature: float | Tensor, normalize: bool) -> Options:
    lowest = validation.lowest_temperature(temperature) if normalize else None
    return Options(backend, validation.workspace_limit(workspace_limit), 1 / lowest if lowest else math.inf)


def reduced(problem: Problem, options: Options, reduction: str, symmetric: bool) -> Tensor:
    """InfoNCE of a problem."""
    if reduction == "none":
        rows = _row_losses(problem, options, symmetric)
        return rows if problem.target is None else torch.where(problem.target == -1, 0, rows)
    weight, empty = _weights(problem, reduction)
    if symmetric and not problem.columns:  # the columns are a problem apart
        loss = (weight * _row_losses(problem, options, symmetric)).sum()
    else:
        loss = contrast.reduced_loss(problem, options, "infonce", weight)
    return loss if empty is None else torch.where(empty, torch.nan, loss)


def _weights(problem: Problem, reduction: str) -> tuple[Tensor, Tensor | None]:
    """What each row's loss is multiplied by, (1,) or (N,); and where rows may be none, whether a mean has no rows."""
    n = problem.query.shape[0]
    if problem.target is None or problem.self_similar:  # no row is ignored
        weight = problem.temperature.new_full((1,), 1 / max(n, 1) if reduction == "mean" else 1.0)
        return weight, weight[0] > 0 if reduction == "mean" and n == 0 else None
    valid = (problem.target != -1).to(problem.temperature.dtype)
    if reduction == "sum":
        return valid, None
    count = valid.sum()
    return valid / count.clamp_min(1), count == 0


def _row_losses(problem: Problem, options: Options, symmetric: bool) -> Tensor:
    """(N,) InfoNCE of every query, or its mean with that of every query's key."""
    stats = contrast.statistics(problem, options)
    rows = infonce(stats.neg - stats.pos)
    if not symmetric:
        return rows
    column_neg = stats.column_neg
    if column_neg is None:  # explicit negatives replaced the in-batch ones in the rows: the columns are a problem apart
        swapped = replace(
            problem,
            query=problem.key,
            key=problem.query,
            negatives=(),
            negative_ids=(),
            row_ids=problem.key_ids,
            key_ids=problem.row_ids if problem.key_ids is not None else None,
            in_batch=True,
        )
        column_neg = contrast.statistics(swapped, options).neg
    return (rows + infonce(column_neg - stats.pos)) / 2


def reduced_mean(loss: Tensor, reduction: str) -> Tensor:
    """Of rows that all count."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


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
    sums = torch.cat([torch.zeros_like(x), x.new_zeros(1, x.shape[1])]).index_put((place,), x, accumulate=True)
    first, end = (torch.searchsorted(ordered, wanted, right=right) for right in (False, True))
    return sums[torch.where(end > first, first, len(x))], end - first
