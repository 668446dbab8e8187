"""Calls like an earlier one: what it was found to be is remembered, and only its rows are new.

A small loss takes as long in Python as in its operators. Its options, their checks, the problem and the plan depend on
nothing but the facts by which calls are looked up: all arguments but the rows, which are numbers and words, the kind of
the rows, and whether gradients are recorded. The values of rows are not among them, and no check reads those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import contrast
from ..backends.contract import Problem
from ..backends.plan import Plan
from ..backends.recording import Notes, recordings
from ..backends.temperature import Temperature
from ..backends.torch.value import Kind, value
from .arguments import of_pairs, of_stacked

F = TypeVar("F", bound=Callable[..., Any])
WORDS = frozenset((float, int, str, bool, type(None)))  # types of arguments that are equal where they mean the same
MOST = 1024


class Made(NamedTuple):
    """A loss of rows that a call made, with all that it was made of."""

    total: Tensor
    problem: Problem
    plan: Plan
    loss: str
    weight: Tensor | float


class Repeat(NamedTuple):
    """What a call is besides its rows: a problem of pairs or of two views, and the reduced loss of it.

    A value alone is made of the rows and their `kind`, since making a problem of them takes as long as half of its
    operators.
    """

    views: bool
    columns: bool
    normalize: bool
    temperature: tuple[None, float | None, torch.dtype, torch.device | None]
    plan: Plan
    loss: str
    weight: float
    kind: Kind | None  # where the plan is of the value alone, which is PyTorch's


made = Notes()  # of type `Made`, by calls that are to be remembered
# True: a call that was made once, as most are at the temperature of a schedule. False: one that is more than a `Repeat`
remembered: dict[tuple[Any, ...], Repeat | bool] = {}


def repeated(loss: F) -> F:
    """Let calls of a loss be repeated, whose first two arguments are rows."""

    @functools.wraps(loss)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or len(args) < 2:
            return loss(*args, **kwargs)
        x, y, *rest = (*args, *kwargs.values())
        types = tuple(map(type, rest))
        if not (WORDS.issuperset(types) and _are_plain(x, y)):
            return loss(*args, **kwargs)
        key = (
            loss, *rest, types, *kwargs, torch.is_grad_enabled(),
            x.shape, x.dtype, x.device, x.requires_grad, y.shape, y.dtype, y.device, y.requires_grad,
        )  # fmt: skip
        found = remembered.get(key)  # read once: another thread may clear it
        if not isinstance(found, Repeat):
            return loss(*args, **kwargs) if found is False else _remembered(found, key, loss, args, kwargs)
        rows = torch.cat((x, y)) if found.views else x  # autocast, which some rows could not be joined under, is off
        if found.kind is not None:
            return value(rows, None if found.views else y, found.kind)
        t = Temperature(*found.temperature)
        if found.views:
            problem = of_stacked(rows, t, found.normalize)
        else:
            problem = of_pairs(x, y, t, found.columns, found.normalize)
        return contrast.onepass(problem, found.plan, found.loss, found.weight)

    return cast(F, called)


def _are_plain(x: Any, y: Any) -> bool:
    """Return whether a call of these rows has nothing but its result to return, and gradients as PyTorch records them.

    Not so where rows are cast, what they are is noted or explained, or a transform differentiates.
    """
    if type(x) is not Tensor or type(y) is not Tensor or x.is_nested or y.is_nested:
        return False
    if x.layout is not torch.strided or y.layout is not torch.strided:
        return False
    # of any device, since a question about one costs as much as an operator
    if torch._C._is_any_autocast_enabled() or recordings.by_thread or made.by_thread or contrast.is_explaining():
        return False
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()


def _remembered(before: bool | None, key: tuple[Any, ...], loss: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what a call returns, and remember that it was made; of one that was made before, what it was."""
    if torch._C._is_tracing():  # the sizes in the key are tensors
        return loss(*args, **kwargs)
    if before is None:
        if len(remembered) >= MOST:
            remembered.clear()
        remembered[key] = True
        return loss(*args, **kwargs)
    with made.taken() as notes:
        result = loss(*args, **kwargs)
    remembered[key] = _repeat(args[0], args[1], result, notes)
    return result


def _repeat(x: Tensor, y: Tensor, result: Tensor, notes: Sequence[Made]) -> Repeat | bool:
    """Return what a call of these rows was besides them; False where its result was made of more."""
    if len(notes) != 1 or notes[0].total is not result or x.is_meta:
        return False
    _, problem, plan, loss, weight = notes[0]
    pairs = problem.query.rows is x and problem.keys[0].rows is y and problem.target is None
    if isinstance(weight, Tensor) or problem.added or not problem.plain or not (pairs or problem.two_views):
        return False
    if plan.backend == "reference" or (x.is_cuda and plan.backend != "triton"):  # every call of the latter warns
        return False
    t = problem.temperature
    return Repeat(
        not pairs, problem.columns, problem.normalize, (None, t.lowest, t.dtype, t.device), plan, loss, weight,
        Kind.of(problem, plan, loss, weight) if plan.value and plan.as_is else None,
    )  # fmt: skip
