"""Reduction of the rows' statistics to a loss: directions, weights, "mean", "sum" and "none"."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from contextlib import nullcontext

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import Options, Reduction, plan_of
from ..backends.contract import Problem, RowStatistics, Statistics
from ..backends.recording import record_weight
from ..backends.registry import user_level
from ..backends.row_losses import ROW_LOSSES, weighted
from ..distributed import block, gather
from .across import across, counted, in_block, meet
from .repeated import Made, made
from .rows import widened

# A loss of rows: a name in ROW_LOSSES, or a function of a direction's problem and statistics that returns (N,). Of the
# problem's rows it may take the numbers of negatives alone, since the rows of other ranks are not there for it.
Loss = str | Callable[[Problem, RowStatistics], Tensor]


def reduced(
    problem: Problem, options: Options, loss: Loss, weight: Tensor | None = None, alike: Collection[int] = (),
    gathered: bool = False,
) -> Tensor:  # fmt: skip
    """Return a loss of rows, or with `problem.columns` its mean with that of the columns, reduced as `options` say.

    "mean" divides by the sum of the weights, and is NaN where that is 0. Rows without a target are ignored. Over
    several processes the problem is this rank's own; alike: as in `across`. gathered: it is one that `across` has made.
    """
    if options.call is not None and not gathered:
        return _over_ranks(problem, options, loss, weight, alike)
    if len(problem.keys) == 1 and problem.keys[0].rows.shape[0] == 1 + problem.self_similar and problem.in_batch:
        _say_lonely()
    plan = None
    if isinstance(loss, str) and closed_form(problem, options, weight):
        even = weight is None and _every_row_counts(problem)
        plan = plan_of(problem, options, reduced=True, weighted=not even)
        if plan.one_pass and not contrast.is_explaining():
            w, aside = factors(problem, options, weight, even)
            total = contrast.onepass(problem, plan, loss, w)
            if made.wanted:
                made.here.append(Made(total, problem, plan, loss, w))
            if weight is not None:
                _record(problem, weight)
            return whole(total, aside, options)
    problem, context = widened(problem) if problem.apart and not gathered else (problem, nullcontext())
    with context:
        losses = of_statistics(problem, contrast.statistics(problem, options, plan=plan), loss)
    return reduced_rows(losses, problem, options, weight)


def _over_ranks(
    problem: Problem, options: Options, loss: Loss, weight: Tensor | None, alike: Collection[int]
) -> Tensor:  # fmt: skip
    """Return what `reduced` does, of a problem of this rank's own among those of all."""
    met = meet(problem, options, alike)
    if block.fits(problem, options):
        found = in_block(problem, options, met)
        every = problem if isinstance(loss, str) else counted(problem, options, met)
        return reduced_rows(of_statistics(every, found, loss), problem, options, weight)
    problem, context = across(problem, options, alike, met)
    with context:
        return reduced(problem, options, loss, weight, gathered=True)


def of_statistics(problem: Problem, found: Statistics, loss: Loss) -> Tensor:
    """Return the losses of rows, or with `problem.columns` their means with those of the columns."""
    losses = _of_direction(problem, found.rows, loss)
    if found.columns is None:
        return losses
    return (losses + _of_direction(problem.swapped(), found.columns, loss)) / 2


def reduced_sigmoids(problem: Problem, bias: Tensor, options: Options, weight: Tensor | None = None) -> Tensor:
    """Return the losses of sigmoids that `contract.Sigmoids` defines, with this (1,) bias, reduced as `options` say."""
    problem, context = across(problem, options)
    with context:
        at_once = closed_form(problem, options, weight)
        plan = plan_of(problem, options, reduced=at_once, bias=bias)
        if not at_once:
            return reduced_rows(contrast.sigmoids(problem, plan, bias), problem, options, weight)
        w, aside = factors(problem, options, weight, weight is None and _every_row_counts(problem))
        return whole(contrast.sigmoids(problem, plan, bias, w), aside, options)


def closed_form(problem: Problem, options: Options, weight: Tensor | None) -> bool:
    """Return whether a loss in ROW_LOSSES and its gradients may be made at once, which is for the plan to decide."""
    return options.reduction != "none" and not problem.apart and (weight is None or not weight.requires_grad)


def _of_direction(problem: Problem, rows: RowStatistics, loss: Loss) -> Tensor:
    return ROW_LOSSES[loss].value(rows.neg - rows.pos) if isinstance(loss, str) else loss(problem, rows)


def reduced_rows(rows: Tensor, problem: Problem, options: Options, weight: Tensor | None = None) -> Tensor:
    """Return (N,) losses reduced; those of rows that are ignored are 0."""
    if weight is not None:
        _record(problem, weight)
    if options.reduction == "none":
        rows = _counted(rows if weight is None else _times(weight, rows), problem)
        return rows if options.call is None else gather.rows(options.call, rows)
    w, aside = factors(problem, options, weight, weight is None and _every_row_counts(problem))
    return whole(_counted(_times(w, rows), problem).sum(), aside, options)


def _record(problem: Problem, weight: Tensor) -> None:
    """Note which of the rows that were noted for a problem have no weight."""
    record_weight(weight.detach(), 1 + problem.columns)


def factors(
    problem: Problem, options: Options, weight: Tensor | None, even: bool
) -> tuple[Tensor | float, Tensor | None]:  # fmt: skip
    """Return the factors of the rows' losses, (N,) or one for all, and what `whole` takes beside their sum.

    even: whether all rows count, and with one weight. Over several processes a mean divides after the sum, since the
    other ranks' weights are not known before.
    """
    if options.call is None:
        return row_weights(problem, options.reduction, weight, even)
    w, _ = row_weights(problem, "sum", weight, even)
    t = problem.temperature.values
    return w, t.new_full((), problem.query.rows.shape[0]) if isinstance(w, float) else w.sum()


def whole(total: Tensor, aside: Tensor | None, options: Options) -> Tensor:
    """Return the reduced loss from a sum of losses times their `factors`: NaN of no rows, and that of all ranks."""
    if options.call is None:
        return total if aside is None else torch.where(aside, torch.nan, total)
    assert aside is not None
    dtype = total.dtype
    total, count = gather.total(options.call, torch.stack([total.double(), aside.double()])).unbind()
    if options.reduction == "mean":
        empty = count == 0
        total = torch.where(empty, torch.nan, total / torch.where(empty, 1, count))
    return total.to(dtype)


def _times(weight: Tensor | float, rows: Tensor) -> Tensor:
    """Return weighted losses. A row of weight 0 counts for nothing, but where weights have a gradient the row's loss is
    the gradient."""
    return weight * rows if isinstance(weight, Tensor) and weight.requires_grad else weighted(rows, weight)


def _counted(rows: Tensor, problem: Problem) -> Tensor:
    if _every_row_counts(problem):
        return rows
    assert problem.target is not None
    return rows.masked_fill(problem.target == -1, 0)


def _every_row_counts(problem: Problem) -> bool:
    """Return whether no row is without a target, as far as that is known or free to read."""
    if problem.every_row_counts:
        return True
    target = problem.target
    assert target is not None
    return len(target) > 0 and checks.values_are_free(target) and target.min().item() >= 0


def row_weights(
    problem: Problem, reduction: Reduction, weight: Tensor | None, even: bool
) -> tuple[Tensor | float, Tensor | None]:  # fmt: skip
    """Return the factors of the rows' losses, (N,), or one for all; and where there may be no rows, whether a mean has
    none."""
    n = problem.query.rows.shape[0]
    if even:
        if reduction == "sum":
            return 1.0, None
        none = problem.temperature.values.new_ones((), dtype=torch.bool) if n == 0 else None
        return 1 / max(n, 1), none
    weight = _counted(problem.temperature.values.new_ones(n) if weight is None else weight, problem)
    if reduction == "sum":
        return weight, None
    total = weight.sum()
    empty = total == 0
    return weight / torch.where(empty, 1, total), empty


def reduced_mean(loss: Tensor, options: Options) -> Tensor:
    """Return (N,) losses reduced, of rows that all count; ranks that have not met, for want of common keys, do."""
    if options.call is not None:
        if not options.call.met:
            options.call.counts(f"rows by themselves, reduction={options.reduction!r}", "", [loss.shape[0]])
        if options.reduction == "none":
            return gather.rows(options.call, loss)
        return whole(loss.sum(), loss.new_full((), loss.shape[0]), options)
    if options.reduction == "none":
        return loss
    return loss.sum() if options.reduction == "sum" else loss.mean()


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
