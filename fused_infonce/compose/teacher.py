"""A teacher's soft targets, made some rows at a time from its scores or from its embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import contrast
from ..backends import Options
from ..backends.contract import KeySet, Problem
from ..backends.indexing import part_of, slices
from ..backends.precision import each_once
from .across import of_all
from .rows import unit
from .sums import parts_of, passed, seen


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


def teachers_of(
    problem: Problem, teacher: list[Tensor], normalize: bool, t: Tensor, options: Options
) -> list[Teacher]:  # fmt: skip
    """Return the teacher's logits for the rows, and for the columns where there are some."""
    dtype = problem.acc_dtype
    # the sides that rows of other ranks are scored against
    every = each_once(lambda x: of_all(x, options), teacher[::-1] if problem.columns else teacher[1:])
    limit = options.limit(t.device)
    found: list[Teacher] = []
    for sides in [teacher, teacher[::-1]][: 1 + problem.columns]:
        if len(sides) == 2:
            keys = unit(every[len(found)], normalize, dtype)
            scored: tuple[Tensor, Tensor | None] = unit(sides[0], normalize, dtype), keys
        else:
            scored = (sides[0].T if found else sides[0]), None
        of_rows = Teacher(*scored, t.to(dtype), 1)
        # the logits of a row, before and after their division, and the terms of its entropy
        step = max(1, limit // max(3 * of_rows.width() * dtype.itemsize, 1))
        found.append(of_rows._replace(step=step))
    return found


def taught(
    block: Problem, teachers: Iterator[Teacher], free: bool, entropy: bool, options: Options
) -> tuple[Problem, list[tuple[Tensor, SoftTargets]]]:  # fmt: skip
    """Return the block of scores to go on with, and for each of its directions the unit rows and their soft targets.

    free: whether the pivots are the teacher's favourites, and not the block's targets, None being row i.
    """
    normalize, acc = block.normalize, block.acc_dtype
    if block.handles:
        block, targets = _targets_of_all(block, next(teachers), free, entropy, options)
        return block, [(unit(block.query.rows, normalize, acc), targets)]
    directions = [*block.directions()]
    units = iter(each_once(lambda x: unit(x, normalize, acc), [x for each in directions for x in each.inputs]))
    found = []
    for each in directions:
        x, y = next(units), next(units)
        found.append((x, _targets_among(y, each, next(teachers), free, entropy, options)))
    return block, found


def favourites(favourite: Tensor, labels: Tensor | None, keys: int) -> Tensor:
    """Return the columns that a teacher prefers; where rows may have no label, -1 for those that have none."""
    if labels is None:
        return favourite
    return torch.where((labels >= 0) & (labels < keys), favourite, labels)


def _targets_among(
    y: Tensor, problem: Problem, teacher: Teacher, free: bool, entropy: bool, options: Options
) -> SoftTargets:  # fmt: skip
    """Return the soft targets of a teacher of unit keys."""
    pivot = None if free else _pivot(problem)
    if contrast.is_explaining():
        return _nothing(problem)
    if options.backend == "reference":  # which is differentiable any number of times
        return _targets_of(teacher, lambda e: e @ y, pivot, entropy)
    return SoftTargets(*_SoftTargets.apply(y, pivot, entropy, *teacher))


def _targets_of_all(
    problem: Problem, teacher: Teacher, free: bool, entropy: bool, options: Options
) -> tuple[Problem, SoftTargets]:
    """Return the problem to go on with, and soft targets of keys of all ranks, of which a part is made at a time."""
    if contrast.is_explaining():
        return problem, _nothing(problem)
    keys, handle, parts = problem.keys[0], problem.handles[1], parts_of(problem, options.limit(teacher.t.device))
    pivot = None if free else _pivot(problem)
    if handle is None:
        return problem, _targets_of(teacher, _mixture(keys, parts, problem), pivot, entropy)
    handle, *found = _SoftTargetsOfAll.apply(problem, parts, pivot, entropy, handle, *teacher)
    return passed(problem, 1, handle), SoftTargets(*found)


def _pivot(problem: Problem) -> Tensor:
    rows, labels = problem.query.rows, problem.target
    return torch.arange(len(rows), device=rows.device) if labels is None else labels


def _nothing(problem: Problem) -> SoftTargets:
    n, d = problem.query.rows.shape
    none = problem.temperature.values.new_zeros(n)
    return SoftTargets(none, none.new_zeros(n, d), none, none.long())


def _mixture(keys: KeySet, parts: list[slice], problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return the function that makes e @ y of keys y, a part of them at a time."""
    normalize, acc = problem.normalize, problem.acc_dtype

    def product(e: Tensor) -> Tensor:
        total = e.new_zeros(len(e), keys.rows.shape[1])
        for part in parts:
            total.addmm_(e[:, part], seen(keys, part, normalize, acc).unit)
        return total

    return product


def _targets_of(
    teacher: Teacher, mixture: Callable[[Tensor], Tensor], pivot: Tensor | None, entropy: bool
) -> SoftTargets:
    """Compute T_ij = e_ij / (1 + r_i), where the favourite's e is 1 and r_i is the sum of the others'.

    mixture: what makes e @ y, (R, D), of the student's keys y.

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
        found.append(SoftTargets(others / total, mixture(e) / total[:, None], spread, place[:, 0]))
    if not found:
        e = teacher.t.new_zeros(0, teacher.width())
        return SoftTargets(e.sum(1), mixture(e), e.sum(1), e.sum(1).long())
    return found[0] if len(found) == 1 else SoftTargets(*map(torch.cat, zip(*found, strict=True)))


class _SoftTargets(torch.autograd.Function):
    """The soft targets, whose exponentials the backward makes once more: it returns sum_i T_ij g_i, j not the pivot."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, pivot: Tensor | None, entropy: bool, *teacher: Any) -> Any:
        found = _targets_of(Teacher(*teacher), lambda e: e @ y, pivot, entropy)
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


class _SoftTargetsOfAll(torch.autograd.Function):
    """The soft targets of keys of all ranks, to whose gradient it adds that of the mixture; see `sums`."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, parts: list[slice], pivot: Tensor | None, entropy: bool, handle: Tensor,
        *teacher: Any,
    ) -> Any:  # fmt: skip
        keys = problem.keys[0]
        found = _targets_of(Teacher(*teacher), _mixture(keys, parts, problem), pivot, entropy)
        *tensors, ctx.step = teacher
        ctx.parts, ctx.normalize = parts, problem.normalize
        ctx.save_for_backward(*tensors, found.pivot, keys.rows, keys.norm)
        ctx.mark_non_differentiable(found.others, found.entropy, found.pivot)
        ctx.set_materialize_grads(False)
        return handle.view_as(handle), *found

    @staticmethod
    @contrast.differentiable_once
    def backward(ctx: Any, grad: Tensor | None, _others: Any, upstream: Tensor | None, *_: Any) -> Any:
        rows, others, t, pivot, keys, norm = ctx.saved_tensors
        if upstream is not None:
            teacher = Teacher(rows, others, t, ctx.step)
            grad = torch.zeros_like(keys, dtype=t.dtype) if grad is None else grad
            for some in teacher.parts():
                e = teacher.exponentials(some)[0]
                total = e.sum(1, keepdim=True)
                e, of_rows = e.scatter_(1, pivot[some, None], 0), upstream[some] / total
                for part in ctx.parts:
                    y = seen(KeySet(keys, norm=norm), part, ctx.normalize, t.dtype)
                    grad[part] += y.finish(e[:, part].T @ of_rows)
        return *[None] * 4, grad, *[None] * len(Teacher._fields)
