"""The backends as PyTorch operators: what `torch.compile` records in place of looking inside.

Outside a compiled function `contrast` calls the backends themselves, which costs less. An operator takes flat
arguments; `flatten` makes them, and an absent result is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from .contract import Problem, Statistics, Upstream, accumulator
from .plan import Plan

DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@cache
def module(backend: str) -> ModuleType:
    return import_module(f".{backend}", __package__)


def flatten(problem: Problem, plan: Plan) -> tuple[Any, ...]:
    return problem.tensors(), problem.flags, plan.backend, plan.name, _sizes(plan)


def _sizes(plan: Plan) -> list[int]:
    return [plan.rows, plan.cols, plan.limit, int(plan.gradients), int(plan.bounded)]


def _problem(tensors: Sequence[Tensor | None], flags: Sequence[bool]) -> Problem:
    return Problem.of(tensors, *flags)


def _plan(name: str, sizes: Sequence[int]) -> Plan:
    rows, cols, limit, gradients, bounded = sizes
    return Plan(name, rows, cols, limit, flops=0, reason="", gradients=bool(gradients), bounded=bool(bounded))


def statistics_of(tensors: Sequence[Any]) -> Statistics:
    return Statistics(*tensors)


def _or_empty(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if x is None else x for x in tensors]


def none_if_empty(tensors: Sequence[Tensor], present: Sequence[object]) -> list[Tensor | None]:
    return [tensor if there else None for tensor, there in zip(tensors, present, strict=True)]


@library.custom_op("fused_infonce::statistics", mutates_args=())
def statistics(
    tensors: Sequence[Tensor | None], flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int]
) -> list[Tensor]:
    problem = _problem(tensors, flags)
    return _or_empty(module(backend).statistics(problem, _plan(plan, sizes)), problem.temperature)


@statistics.register_fake
def _(
    tensors: Sequence[Tensor | None], flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int]
) -> list[Tensor]:
    problem = _problem(tensors, flags)
    n, like = problem.query.shape[0], problem.temperature
    shapes = [(n,), (n,), (n,), (2, n), *([(n,), (n,), (2, n)] if problem.columns else [])]
    return _or_empty([*(like.new_empty(shape) for shape in shapes), *[None] * (7 - len(shapes))], like)


@library.custom_op("fused_infonce::gradients", mutates_args=())
def gradients(
    tensors: Sequence[Tensor | None],
    flags: Sequence[bool],
    backend: str,
    plan: str,
    sizes: Sequence[int],
    stats: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    dtypes: Sequence[int],
) -> list[Tensor]:
    problem = _problem(tensors, flags)
    wanted = [DTYPES[i] for i in dtypes]
    slopes: list[Any] = list(upstream)
    grads = module(backend).gradients(problem, _plan(plan, sizes), statistics_of(stats), Upstream(*slopes), wanted)
    return _or_empty(grads, problem.temperature)


@gradients.register_fake
def _(
    tensors: Sequence[Tensor | None],
    flags: Sequence[bool],
    backend: str,
    plan: str,
    sizes: Sequence[int],
    stats: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    dtypes: Sequence[int],
) -> list[Tensor]:
    problem = _problem(tensors, flags)
    return _like_inputs(problem, [DTYPES[i] for i in dtypes])


@library.custom_op("fused_infonce::onepass", mutates_args=())
def onepass(
    tensors: Sequence[Tensor | None],
    flags: Sequence[bool],
    backend: str,
    plan: str,
    sizes: Sequence[int],
    kind: str,
    weight: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    problem = _problem(tensors, flags)
    result = module(backend).onepass(problem, _plan(plan, sizes), kind, weight, wanted)
    inputs = [None if x is None else x if _alone(x) else x.clone() for x in result.inputs]
    return _or_empty([result.loss, result.temperature, *inputs], problem.temperature)


def _alone(x: Tensor) -> bool:
    """Whether it is all of its memory: outputs of an operator must not share any."""
    return x.untyped_storage().nbytes() == x.nbytes


@onepass.register_fake
def _(
    tensors: Sequence[Tensor | None],
    flags: Sequence[bool],
    backend: str,
    plan: str,
    sizes: Sequence[int],
    kind: str,
    weight: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    problem = _problem(tensors, flags)
    acc, t = accumulator(problem.query.dtype), problem.temperature
    grads = _like_inputs(problem, [acc if w else None for w in wanted[:-1]])
    return [t.new_empty(()), t.new_empty(problem.query.shape[0] if wanted[-1] else 0), *grads]


def _like_inputs(problem: Problem, dtypes: Sequence[torch.dtype | None]) -> list[Tensor]:
    return [
        problem.temperature.new_empty(0) if dtype is None else x.new_empty(x.shape, dtype=dtype)
        for x, dtype in zip(problem.inputs, dtypes, strict=True)
    ]
