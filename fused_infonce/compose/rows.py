"""Rows and (N,) vectors that losses compose: unit rows, dot products, guarded logarithms, sums over classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.contract import EPS, KeySet, Problem, Temperature
from ..backends.indexing import add_rows, take_rows
from ..backends.precision import all_wide
from ..backends.reference import unit_rows
from ..backends.rows import norms


def unit(x: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Return rows in `dtype`, divided by their norms with `normalize`, differentiable."""
    x = x.to(dtype)
    if not normalize:
        return x
    if torch.compiler.is_compiling() or _transformed():
        return unit_rows(x)
    return _Unit.apply(x)[0] if torch.is_grad_enabled() and x.requires_grad else x / norms(x)


def _transformed() -> bool:
    """Return whether a derivative is taken that an `autograd.Function` here has no rule for."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class _Unit(torch.autograd.Function):
    """The unit rows of `unit_rows` and the norms in a third of its operators, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        norm = norms(x)
        unit = x / norm
        ctx.save_for_backward(unit, norm)
        ctx.set_materialize_grads(False)
        return unit, norm

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, of_norm: Tensor | None) -> Tensor | None:
        """Return `(g - (g . unit) unit) / norm`, 0 for a row that counts as zero."""
        unit, norm = ctx.saved_tensors
        grad = None
        if upstream is not None:
            across = torch.addcmul(upstream, dots(upstream, unit).unsqueeze(-1), unit, value=-1)
            grad = across / torch.threshold(norm, EPS, math.inf)
        if of_norm is not None:
            along = (of_norm * unit).masked_fill(norm <= EPS, 0)
            grad = along if grad is None else grad + along
        return grad


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot product x_i . y_i of every pair of rows."""
    return torch.linalg.vecdot(x, y)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """Compute log(exp(a) + exp(b)); where both are -inf the gradient is 0, and not NaN as torch.logaddexp's."""
    none = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(none, 0), b.masked_fill(none, 0)).masked_fill(none, -torch.inf)


def finite(neg: Tensor) -> Tensor:
    """Return logsumexps above -1e30: of -inf, where there are no negatives, -inf - -inf would be NaN."""
    return neg.clamp_min(-1e30)


def class_sums(classes: Tensor, x: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows of x, (K, D), and their number, (K,), of each of the K wanted classes.

    wanted: (K,) classes; None: the class of every row. Rows are always added in the same order, without a
        synchronisation.
    """
    ordered, _ = torch.sort(classes)
    place = torch.searchsorted(ordered, classes)  # of the first row of the class
    sums = add_rows(x.new_zeros(len(x) + 1, x.shape[1]), place, x)
    if wanted is None:
        return take_rows(sums, place), torch.searchsorted(ordered, classes, right=True) - place
    first, end = (torch.searchsorted(ordered, wanted, right=right) for right in (False, True))
    return take_rows(sums, torch.where(end > first, first, len(x))), end - first


class Later:
    """A problem that is made when it is first asked for."""

    def __init__(self, make: Callable[[], Problem]):
        self.make = make
        self.made: Problem | None = None

    def __call__(self) -> Problem:
        if self.made is None:
            self.made = self.make()
        return self.made


def at_temperature(problem: Problem, t: Temperature) -> Problem:
    """Return the problem at another temperature, in both directions."""
    opposite = None if problem.opposite is None else Later(lambda: replace(problem.swapped(), temperature=t))
    return replace(problem, temperature=t, opposite=opposite)


def last_of_each(index: Tensor) -> Tensor:
    """Return for every row the place of the last row that has its index, (N,), without a synchronisation."""
    ordered, place = torch.sort(index, stable=True)
    return place[torch.searchsorted(ordered, index, right=True) - 1]


def widened(problem: Problem) -> tuple[Problem, AbstractContextManager[Any]]:
    """Return a problem whose 16-bit gradients are added in float32 and rounded once, and the context; see `wide`."""
    (query, *keys), context = all_wide(problem.inputs)
    sets = [s._replace(rows=rows) for s, rows in zip(problem.keys, keys, strict=True)]
    return replace(problem, query=problem.query._replace(rows=query), keys=tuple(sets)), context


def one_id_a_row(problem: Problem, name: str) -> None:
    """Check that no row has several ids, with which `negative_sums` does not know a row's negatives."""
    if problem.query.ids is not None and problem.query.ids.dim() > 1:
        raise ValueError(f"{name} counts negatives, for which a row may have one id, got {problem.query.ids.shape[1]}")


def own_left(keys: KeySet, row_ids: Tensor | None) -> Tensor:
    """Return which of the keys of each row alone are its negatives, (N, H): there, and of another id than the row's."""
    index, ids = keys.indices, None if row_ids is None else keys.ids
    left = torch.ones(keys.rows.shape[:2], dtype=torch.bool, device=keys.rows.device) if index is None else index >= 0
    if index is not None and not len(keys.rows):
        return torch.zeros_like(left)
    if ids is None or row_ids is None:
        return left
    ids = ids if index is None else ids[index.clamp(0, len(ids) - 1)]
    return left & (ids != row_ids[:, None])


def negative_sums(problem: Problem, sets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of each row's negatives among the keys of all rows, (N, D), and the number of all its negatives,
    (N,), in O((N + M) (D + log M) + N H).

    sets: the rows that are added, of each set of keys; those of a guided problem are not known without its scores.
    """
    row_ids, target, first = problem.query.ids, problem.target, sets[0]
    n, m, device = len(problem.query.rows), len(first), first.device
    total, count = first.new_zeros(n, first.shape[-1]), torch.zeros(n, dtype=torch.int64, device=device)
    for keys, y in [*zip(problem.keys, sets, strict=True)][0 if problem.in_batch else 1 :]:
        if keys.is_paired():
            count = count + own_left(keys, row_ids).sum(1)
            continue
        ids = None if row_ids is None else keys.ids
        total, count = total + y.sum(0), count + len(y)
        if ids is not None:
            same, times = class_sums(ids, y, row_ids)
            total, count = total - same, count - times
    if problem.in_batch and m:
        kept = torch.arange(n, device=device) if target is None else target
        among = (kept >= 0) & (kept < m)  # whether the row's positive is among what was added
        kept, ids = kept.clamp(0, m - 1), problem.keys[0].ids
        if ids is not None and row_ids is not None:
            among = among & (ids[kept] != row_ids)
        total, count = total - among[:, None] * take_rows(first, kept), count - among.long()
        if problem.self_similar:
            total, count = total - first, count - 1
    return total, count


def negative_counts(problem: Problem) -> Tensor:
    """Return the number of each row's negatives, (N,) int64; those of a guided problem are not known."""
    return negative_sums(problem, [rows.detach()[..., :0] for rows in problem.inputs[1:]])[1]
