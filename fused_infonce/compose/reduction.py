"""Reduction of the rows' statistics to a loss: directions, weights, "mean", "sum" and "none"."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import Options, Reduction, plan_of
from ..backends.contract import Problem, RowStatistics
from ..backends.precision import all_wide
from ..backends.registry import user_level
from ..backends.row_losses import ROW_LOSSES, weighted

# A loss of rows: a name in ROW_LOSSES, or a function of a direction's problem and statistics that returns (N,).
Loss = str | Callable[[Problem, RowStatistics], Tensor]


def reduced(problem: Problem, options: Options, loss: Loss, weight: Tensor | None = None) -> Tensor:
    """Return a loss of rows, or with `problem.columns` its mean with that of the columns, reduced as `options` say.

    "mean" divides by the sum of the weights, and is NaN where that is 0. Rows without a target are ignored.
    """
    if len(problem.keys) == 1 and problem.keys[0].rows.shape[0] == 1 + problem.self_similar and problem.in_batch:
        _say_lonely()
    plan = None
    if isinstance(loss, str) and closed_form(problem, options, weight):
        weighted_rows = weight is not None or not _every_row_counts(problem)
        plan = plan_of(problem, options, reduced=True, weighted=weighted_rows)
        if plan.one_pass and not contrast.is_explaining():
            w, empty = row_weights(problem, options.reduction, weight)
            total = contrast.onepass(problem, plan, loss, w)
            return total if empty is None else torch.where(empty, torch.nan, total)
    problem, context = widened(problem) if apart(problem) else (problem, nullcontext())
    with context:
        rows, columns = contrast.statistics(problem, options, plan=plan)
        losses = _of_direction(problem, rows, loss)
        if columns is not None:
            losses = (losses + _of_direction(problem.swapped(), columns, loss)) / 2
    return reduced_rows(losses, problem, options.reduction, weight)


def reduced_sigmoids(problem: Problem, bias: Tensor, options: Options, weight: Tensor | None = None) -> Tensor:
    """Return the losses of sigmoids that `contract.Sigmoids` defines, with this (1,) bias, reduced as `options` say."""
    at_once = closed_form(problem, options, weight)
    plan = plan_of(problem, options, reduced=at_once, bias=bias)
    if not at_once:
        return reduced_rows(contrast.sigmoids(problem, plan, bias), problem, options.reduction, weight)
    w, empty = row_weights(problem, options.reduction, weight)
    total = contrast.sigmoids(problem, plan, bias, w)
    return total if empty is None else torch.where(empty, torch.nan, total)


def closed_form(problem: Problem, options: Options, weight: Tensor | None) -> bool:
    """Return whether a loss in ROW_LOSSES and its gradients may be made at once, which is for the plan to decide."""
    return options.reduction != "none" and not apart(problem) and (weight is None or not weight.requires_grad)


def apart(problem: Problem) -> bool:
    """Return whether the direction of the columns is a problem apart, because only rows have explicit negatives."""
    return problem.columns and not problem.in_batch


def _of_direction(problem: Problem, rows: RowStatistics, loss: Loss) -> Tensor:
    return ROW_LOSSES[loss].value(rows.neg - rows.pos) if isinstance(loss, str) else loss(problem, rows)


def reduced_rows(rows: Tensor, problem: Problem, reduction: Reduction, weight: Tensor | None = None) -> Tensor:
    """Return (N,) losses reduced; those of rows that are ignored are 0."""
    if reduction == "none":
        return _counted(rows if weight is None else _times(weight, rows), problem)
    w, empty = row_weights(problem, reduction, weight)
    total = _counted(_times(w, rows), problem).sum()
    return total if empty is None else torch.where(empty, torch.nan, total)


def _times(weight: Tensor | float, rows: Tensor) -> Tensor:
    """Return weighted losses. A row of weight 0 counts for nothing, but where weights have a gradient the row's loss is
    the gradient."""
    return weight * rows if isinstance(weight, Tensor) and weight.requires_grad else weighted(rows, weight)


def _counted(rows: Tensor, problem: Problem) -> Tensor:
    target = problem.target
    return rows if target is None or _every_row_counts(problem) else rows.masked_fill(target == -1, 0)


def _every_row_counts(problem: Problem) -> bool:
    """Return whether no row is without a target, as far as that is known or free to read."""
    target = problem.target
    if target is None or problem.every_row_counts:
        return True
    return len(target) > 0 and checks.values_are_free(target) and target.min().item() >= 0


def row_weights(problem: Problem, reduction: Reduction, weight: Tensor | None) -> tuple[Tensor | float, Tensor | None]:
    """Return the factors of the rows' losses, (N,), or one for all; and where there may be no rows, whether a mean has
    none."""
    n, t = problem.query.rows.shape[0], problem.temperature.values
    if weight is None and _every_row_counts(problem):
        if reduction == "sum":
            return 1.0, None
        return 1 / max(n, 1), t.new_ones((), dtype=torch.bool) if n == 0 else None
    weight = _counted(t.new_ones(n) if weight is None else weight, problem)
    if reduction == "sum":
        return weight, None
    total = weight.sum()
    empty = total == 0
    return weight / torch.where(empty, 1, total), empty


def reduced_mean(loss: Tensor, reduction: Reduction) -> Tensor:
    """Return (N,) losses reduced, of rows that all count."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def widened(problem: Problem) -> tuple[Problem, AbstractContextManager[Any]]:
    """Return a problem whose 16-bit gradients are added in float32 and rounded once, and the context; see `wide`."""
    (query, *keys), context = all_wide(problem.inputs)
    sets = [s._replace(rows=rows) for s, rows in zip(problem.keys, keys, strict=True)]
    return replace(problem, query=problem.query._replace(rows=query), keys=tuple(sets)), context


def _say_lonely() -> None:
    """Warn, once in a process, that a batch of one pair is compared with nothing."""
    if not torch.compiler.is_compiling() and not _said:
        _said.append(True)
        warnings.warn(
            "a batch of one pair has no negatives, so that its loss is 0 and has no gradient: give more pairs or "
            "explicit negatives; a DataLoader leaves out a last, smaller batch with drop_last=True",
            stacklevel=user_level(),
        )


_said: list[bool] = []
