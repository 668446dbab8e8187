"""Sums of dot products of rows with keys of their own, a few rows at a time, so that these are never there at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import KeySet, Problem
from ..backends.indexing import add_uses, slices, take_rows
from ..backends.rows import Rows, norms
from ..contrast import differentiable_once
from .rows import dots, negative_counts, negative_sums, own_left, unit
from .sums import SumOf, pair_dots, summed

TAKEN = 2**21  # components of keys that are there at a time: 8 MiB in fp32


def scored_dots(problem: Problem, recorded: bool, limit: int) -> tuple[Problem, Tensor, Tensor, Tensor]:
    """Return the problem to go on with, x_i . y_i of each row's target, the sum of x_i . y_j over its negatives j, and
    the number of these, (N,).

    Of a row without a target the first is of any value. limit: as in `summed`. recorded: as in `own_dots`. Unit rows
    are made, and held until the backward, only where all rows have some keys in common.
    """
    (first, *others), target, acc = problem.keys, problem.target, problem.acc_dtype
    own = [keys for keys in others if keys.is_paired()]
    if problem.in_batch or len(own) < len(others):
        x = unit(problem.query.rows, problem.normalize, acc)
    if problem.handles and (problem.in_batch or len(own) < len(others)):
        problem, positive, sums = _of_all_ranks(problem, x, limit)
        total, count = dots(x, sums), negative_counts(problem)
    elif problem.in_batch or len(own) < len(others):
        sets = [s.rows if s.is_paired() else unit(s.rows, problem.normalize, acc) for s in problem.keys]
        there, positives = len(sets[0]), sets[0]
        if target is not None:
            positives = take_rows(positives, target.clamp(0, there - 1)) if there else torch.zeros_like(x)
        sums, count = negative_sums(problem, sets)
        positive, total = dots(x, positives), dots(x, sums)
    else:
        keys = KeySet(first.rows[:, None]) if target is None else KeySet(first.rows, indices=target[:, None])
        positive = own_dots(problem, keys, torch.ones_like(own_left(keys, None)), recorded)
        total, count = torch.zeros_like(positive), negative_counts(problem)
    for keys in own:
        total = total + own_dots(problem, keys, own_left(keys, problem.query.ids), recorded)
    return problem, positive, total, count


def _of_all_ranks(problem: Problem, x: Tensor, limit: int) -> tuple[Problem, Tensor, Tensor]:
    """Return the problem to go on with, x_i . y_i of each row's target, and the sum of its negatives among the keys of
    all rows; x: the rows as the logits see them."""
    n, m, device = len(x), len(problem.keys[0].rows), x.device
    row = torch.arange(n, device=device)
    target = row if problem.target is None else problem.target
    positive, sums = x.new_zeros(n), torch.zeros_like(x)
    if m:
        problem, positive = pair_dots(problem, x, row, target.clamp(0, m - 1), limit)
    for place, keys in enumerate(problem.keys, 1):
        if not keys.is_paired() and (place > 1 or problem.in_batch):
            positives = target if place == 1 else torch.full_like(target, -1)
            problem, more = summed(problem, _sums_of(problem, keys.ids, positives), limit, place)
            sums = sums + more
    return problem, positive, sums


def _sums_of(problem: Problem, key_ids: Tensor | None, target: Tensor) -> SumOf:
    """Return what makes the sums of negatives, (N, D), of a part of the keys."""
    query, t = KeySet(problem.query.rows.detach(), problem.query.ids), problem.temperature

    def of(y: Tensor, part: slice) -> Tensor:
        place = target - part.start
        place = torch.where((place >= 0) & (place < len(y)), place, -1)
        here = Problem(query, (KeySet(y, None if key_ids is None else key_ids[part]),), t, place)
        return negative_sums(here, [y])[0]

    return of


def own_dots(problem: Problem, keys: KeySet, left: Tensor, recorded: bool = False) -> Tensor:
    """Return sum_h x_i . y_ih over the keys of row i alone, (N,), of unit rows with `problem.normalize`.

    left: (N, H), which of the keys count. recorded: to be differentiated any number of times, with all keys at once.
    """
    x, y, index, acc = problem.query.rows, keys.rows, keys.indices, problem.acc_dtype
    if index is not None and not len(y):
        return x.new_zeros(len(x), dtype=acc)
    if not recorded:
        return _OwnDots.apply(x, y, index, left, problem.normalize)
    x, y = (unit(rows, problem.normalize, acc) for rows in (x, y))
    own = y if index is None else y[index.clamp(0, len(y) - 1)]
    return dots(x, torch.bmm(left[:, None].to(acc), own)[:, 0])


class _OwnDots(torch.autograd.Function):
    """The sums of `own_dots`, whose keys are taken again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, index: Tensor | None, left: Tensor, normalize: bool) -> Tensor:
        ctx.save_for_backward(x, y, index, left)
        ctx.normalize = normalize
        found = x.new_empty(len(x))  # now: what is kept of a part would lie in the room that its keys leave to the next
        for some, queries, keys, b, _ in _parts(x, y, index, normalize):
            found[some] = dots(queries.unit, torch.bmm((left[some] * b)[:, None], keys)[:, 0])
        return found

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x, y, index, left = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_y = torch.zeros_like(y) if ctx.needs_input_grad[1] else None
        for some, queries, keys, b, places in _parts(x, y, index, ctx.normalize):
            w = left[some] * upstream[some, None]
            if grad_x is not None:
                grad_x[some] = queries.finish(torch.bmm((w * b)[:, None], keys)[:, 0])
            if grad_y is not None and places is not None:
                add_uses(grad_y, places, w, queries.unit)
            elif grad_y is not None:
                grad_y[some] = w[..., None] * queries.unit[:, None]
        if grad_y is not None:
            for some in slices(len(y), TAKEN // max(y[:1].numel(), 1)):
                Rows(y[some], ctx.normalize, None, y.dtype).finish(grad_y[some])
        return grad_x, grad_y, None, None, None


def _parts(
    x: Tensor, y: Tensor, index: Tensor | None, normalize: bool
) -> Iterator[tuple[slice, Rows, Tensor, Tensor, Tensor | None]]:
    """Yield slices of the rows, these, their own keys (R, H, D), what scales these, and their places in a table."""
    h, d = (y if index is None else index).shape[1], x.shape[1]
    inverse = (1 / norms(y) if normalize else y.new_ones(*y.shape[:-1], 1))[..., 0]
    for some in slices(len(x), TAKEN // max(h * d, 1)):
        places, keys, b = None, y[some], inverse[some]
        if index is not None:
            places = index[some].clamp(0, len(y) - 1)
            keys, b = (take_rows(z, places.flatten()).view(*places.shape, *z.shape[1:]) for z in (y, inverse))
        yield some, Rows(x[some], normalize, None, x.dtype), keys, b, places
