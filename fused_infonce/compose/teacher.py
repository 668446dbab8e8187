"""A teacher's soft targets, made some rows at a time from its scores or from its embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import contrast
from ..backends import Options
from ..backends.contract import Problem
from ..backends.indexing import part_of, slices
from ..backends.precision import each_once
from .across import of_all
from .rows import unit


class Teacher(NamedTuple):
    """A teacher's logits z (N, M) in one direction, which are made some rows at a time."""

    rows: Tensor  # (N, D'), as the logits see them; or without `keys` the scores, (N, M)
    keys: Tensor | None  # (M, D')
    t: Tensor  # (1,) or (N,), in the dtype of the logits
    step: int  # how many rows at a time

    def width(self) -> int:
        return self.rows.shape[1] if self.keys is None else len(self.keys)

    def parts(self) -> list[slice]:
        return slices(len(self.rows), self.step)

    def exponentials(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return (R, M) e_ij = exp(z_ij - max_l z_il) of some rows, and where each has its maximum."""
        z = self.rows[part].to(self.t.dtype) if self.keys is None else self.rows[part] @ self.keys.T
        z = z / part_of(self.t, part)[:, None]
        largest, favourite = z.max(1)
        return z.sub_(largest[:, None]).exp_(), favourite


class SoftTargets(NamedTuple):
    """The soft targets T (N, M) of one direction as the loss needs them, given the pivot y of each row."""

    others: Tensor  # (N,): sum_{j != y} T_ij
    mixture: Tensor  # (N, D): sum_{j != y} T_ij y_j, differentiable in the keys y_j as the logits see them
    entropy: Tensor  # (N,); 0 where it is not asked for
    pivot: Tensor  # (N,) int64


Direction = tuple["Teacher", tuple[Tensor, Tensor], Tensor | None]


def directions_of(
    problem: Problem, teacher: list[Tensor], normalize: bool, t: Tensor, options: Options
) -> list[Direction]:
    """Return for the rows, and for the columns where there are some, the teacher's logits, the student's unit rows on
    both sides, and the labels."""
    dtype = problem.acc_dtype
    # the sides that rows of other ranks are scored against
    every = each_once(lambda x: of_all(x, options), teacher[::-1] if problem.columns else teacher[1:])
    parts = [(problem.of_rows(), teacher)] + ([(problem.swapped(), teacher[::-1])] if problem.columns else [])
    limit = options.limit(t.device)
    found: list[Direction] = []
    units = iter(each_once(lambda x: unit(x, problem.normalize, dtype), [x for part, _ in parts for x in part.inputs]))
    for part, sides in parts:
        if len(sides) == 2:
            keys = unit(every[len(found)], normalize, dtype)
            scored: tuple[Tensor, Tensor | None] = unit(sides[0], normalize, dtype), keys
        else:
            scored = (sides[0].T if found else sides[0]), None
        of_rows = Teacher(*scored, t.to(dtype), 1)
        # the logits of a row, before and after their division, and the terms of its entropy
        step = max(1, limit // max(3 * of_rows.width() * dtype.itemsize, 1))
        found.append((of_rows._replace(step=step), (next(units), next(units)), part.target))
    return found


def favourites(favourite: Tensor, direction: Direction | None) -> Tensor:
    """Return the columns that a teacher prefers; where rows may have no label, -1 for those that have none."""
    if direction is None:
        return favourite
    _, (_, keys), labels = direction
    assert labels is not None
    return torch.where((labels >= 0) & (labels < len(keys)), favourite, labels)


def soft_targets(
    teacher: Teacher, seen: tuple[Tensor, Tensor], labels: Tensor | None, free: bool, entropy: bool, options: Options
) -> SoftTargets:
    """Return the soft targets of a teacher whose pivots are the labels, None: row i, or if `free` its favourites."""
    y = seen[1]
    pivot = None if free else torch.arange(len(seen[0]), device=y.device) if labels is None else labels
    if contrast.is_explaining():
        none = y.new_zeros(len(teacher.rows))
        return SoftTargets(none, y.new_zeros(len(none), y.shape[1]), none, none.long())
    if options.backend == "reference":  # which is differentiable any number of times
        return _targets_of(teacher, y, pivot, entropy)
    return SoftTargets(*_SoftTargets.apply(y, pivot, entropy, *teacher))


def _targets_of(teacher: Teacher, y: Tensor, pivot: Tensor | None, entropy: bool) -> SoftTargets:
    """Compute T_ij = e_ij / (1 + r_i), where the favourite's e is 1 and r_i is the sum of the others'.

    The entropy, log(1 + r_i) - sum_j e_ij log(e_ij) / (1 + r_i), has no negative terms: however large the logits are,
    nothing cancels.
    """
    found = []
    for part in teacher.parts():
        e, favourite = teacher.exponentials(part)
        place = favourite[:, None] if pivot is None else pivot[part, None].clamp(0, e.shape[1] - 1)
        total = e.sum(1)
        surprise = torch.special.entr(e).sum(1) if entropy else torch.zeros_like(total)
        rest = None
        if entropy and pivot is not None:
            first = favourite[:, None]
            one = e.gather(1, first)
            rest = e.scatter_(1, first, 0).sum(1)
            e.scatter_(1, first, one)
        others = e.scatter_(1, place, 0).sum(1)
        spread = torch.log1p(others if rest is None else rest) + surprise / total if entropy else surprise
        found.append(SoftTargets(others / total, e @ y / total[:, None], spread, place[:, 0]))
    if not found:
        none = y.new_zeros(0)
        return SoftTargets(none, y.new_zeros(0, y.shape[1]), none, none.long())
    return found[0] if len(found) == 1 else SoftTargets(*map(torch.cat, zip(*found, strict=True)))


class _SoftTargets(torch.autograd.Function):
    """The soft targets, whose exponentials the backward makes once more: it returns sum_i T_ij g_i, j not the pivot."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, pivot: Tensor | None, entropy: bool, *teacher: Any) -> Any:
        found = _targets_of(Teacher(*teacher), y, pivot, entropy)
        *tensors, ctx.step = teacher
        ctx.save_for_backward(*tensors, found.pivot)
        ctx.mark_non_differentiable(found.others, found.entropy, found.pivot)
        return tuple(found)

    @staticmethod
    @contrast.differentiable_once
    def backward(ctx: Any, _others: Any, upstream: Tensor, *_: Any) -> Any:
        rows, keys, t, pivot = ctx.saved_tensors
        teacher = Teacher(rows, keys, t, ctx.step)
        grad = upstream.new_zeros(teacher.width(), upstream.shape[1])
        for part in teacher.parts():
            e = teacher.exponentials(part)[0]
            total = e.sum(1, keepdim=True)
            grad.addmm_(e.scatter_(1, pivot[part, None], 0).T, upstream[part] / total)
        return grad, None, None, *[None] * len(teacher)
