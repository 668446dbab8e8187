"""A backend as PyTorch operators: which `torch.compile` records in place of looking inside.

An operator takes flat arguments and returns tensors; `Recorded` puts a backend's own signatures around five of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from .contract import OnePass, Problem, RowStatistics, Sigmoids, Statistics, Upstream
from .ladder import Ladder, Profile
from .plan import Plan
from .precision import accumulator
from .registry import load

DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)
Tensors = Sequence[Tensor | None]


class Recorded:
    """The backend of this name, called through operators."""

    takes_unit_rows = False
    differentiable = False

    def __init__(self, name: str):
        self.name = name

    def unavailable(self, tensor: Tensor) -> str:
        return load(self.name).unavailable(tensor)

    def statistics(self, problem: Problem, plan: Plan, keep: list[Tensor] | None = None) -> Statistics:
        return Statistics.of(statistics(*flatten(problem, plan)))

    def gradients(
        self, problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream,
        dtypes: Sequence[torch.dtype | None], kept: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:  # fmt: skip
        codes = [DTYPES.index(dtype) for dtype in dtypes]
        found = gradients(*flatten(problem, plan), statistics.tensors(), list(upstream), codes)
        return _none_if_empty(found, codes)

    def onepass(
        self, problem: Problem, plan: Plan, loss: str, weight: Tensor | float, wanted: Sequence[bool]
    ) -> OnePass:
        weight = _as_tensor(weight, problem)
        value, of_t, *rest = onepass(*flatten(problem, plan), loss, weight, wanted)
        rows, added = len(problem.inputs), len(problem.added)
        grads, more, kept = rest[:rows], rest[rows : rows + added], rest[rows + added :]
        there = _summed(problem, wanted, len(kept) > 0)
        biases = _none_if_empty(more[: len(problem.biases)], wanted[rows:-1])
        offset = None if problem.offset is None else more[-1]
        of_t = of_t if wanted[-1] else None
        return OnePass(value, _none_if_empty(grads, there), of_t, kept, biases, offset)

    def finished(
        self, problem: Problem, plan: Plan, sums: Sequence[Tensor | None], kept: Sequence[Tensor], upstream: Tensor,
        dtypes: Sequence[torch.dtype | None], spent: Sequence[int] = (),
    ) -> list[Tensor | None]:  # fmt: skip
        codes = [DTYPES.index(dtype) for dtype in dtypes]
        return _none_if_empty(finished(*flatten(problem, plan), sums, kept, upstream, codes), codes)

    def profile(self, problem: Problem, plan: Plan, ladder: Ladder) -> Profile:
        raise RuntimeError("torch.compile cannot record a sweep or a fit: call it outside of compiled functions")

    def sigmoids(
        self, problem: Problem, plan: Plan, bias: Tensor, weight: Tensor | float, wanted: Sequence[bool]
    ) -> Sigmoids:
        found = sigmoids(*flatten(problem, plan), bias, _as_tensor(weight, problem), wanted)
        losses, logits, slopes, *grads = _none_if_empty(found, [True, *wanted[-2:], *wanted[:-2]])
        assert losses is not None
        return Sigmoids(losses, grads, logits, slopes)

    def kept_sizes(self, problem: Problem, plan: Plan) -> list[int]:
        return load(self.name).kept_sizes(problem, plan)


def flatten(problem: Problem, plan: Plan) -> tuple[Any, ...]:
    """Return the arguments that an operator takes for a problem and a plan."""
    sizes = [plan.rows, plan.cols, plan.limit, int(plan.gradients), int(plan.bounded), int(plan.full), int(plan.mean)]
    return problem.tensors(), problem.flags, plan.backend, plan.name, sizes


def _summed(problem: Problem, wanted: Sequence[bool], unfinished: bool) -> list[bool]:
    """Return which inputs `onepass` returns a gradient or, where these are unfinished, a sum of."""
    of_sets = zip(problem.sets, wanted[: len(problem.sets)], strict=True)
    return [w and not (unfinished and s.is_paired()) for s, w in of_sets]


def _as_tensor(weight: Tensor | float, problem: Problem) -> Tensor:
    """Return a weight as a tensor, one for all rows as one of (1,): it may be symbolic."""
    if isinstance(weight, Tensor):
        return weight
    values = problem.temperature.values
    exact = torch.float64 if values.device.type == "cpu" else values.dtype  # read there as the number it was
    return values.new_full((1,), weight, dtype=exact)


def _as_given(weight: Tensor, problem: Problem) -> Tensor | float:
    """Return the weight that `_as_tensor` was given: one for all rows as a number, where it is free to read."""
    for_all = weight.shape[0] == 1 < problem.query.rows.shape[0] and weight.device.type == "cpu"
    return weight.item() if for_all else weight.to(problem.acc_dtype)


def _plan(name: str, sizes: Sequence[int]) -> Plan:
    rows, cols, limit, *flags = sizes
    return Plan(name, rows, cols, limit, 0, "", "", *map(bool, flags))


def _or_empty(tensors: Tensors, like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if x is None else x for x in tensors]


def _none_if_empty(tensors: Sequence[Tensor], present: Sequence[object]) -> list[Tensor | None]:
    return [tensor if there else None for tensor, there in zip(tensors, present, strict=True)]


def _apart(tensors: Tensors) -> list[Tensor | None]:
    """Return tensors that are all of their memory: outputs of an operator must not share any."""
    seen: set[int] = set()
    apart: list[Tensor | None] = []
    for x in tensors:
        alone = x is None or (x.untyped_storage().nbytes() == x.nbytes and x.data_ptr() not in seen)
        seen.add(0 if x is None else x.data_ptr())
        apart.append(x if x is None or alone else x.clone())
    return apart


@library.custom_op("fused_infonce::statistics", mutates_args=())
def statistics(tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int]) -> list[Tensor]:
    problem = Problem.of(tensors, *flags)
    found = load(backend).statistics(problem, _plan(plan, sizes)).tensors()
    return _or_empty(_apart(found), problem.temperature.values)


@statistics.register_fake
def _(tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int]) -> list[Tensor]:
    problem = Problem.of(tensors, *flags)
    sizes = [problem.query.rows.shape[0]] * len(RowStatistics._fields)
    if problem.columns:
        sizes += [problem.keys[0].rows.shape[0]] * (len(RowStatistics._fields) - 1)
    return [problem.temperature.values.new_empty(size) for size in sizes]


@library.custom_op("fused_infonce::gradients", mutates_args=())
def gradients(
    tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int], stats: Sequence[Tensor],
    upstream: Tensors, dtypes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    problem = Problem.of(tensors, *flags)
    wanted = [DTYPES[i] for i in dtypes]
    slopes: list[Any] = list(upstream)
    found = Statistics.of(stats)
    grads = load(backend).gradients(problem, _plan(plan, sizes), found, Upstream(*slopes), wanted)
    return _or_empty(_apart(grads), problem.temperature.values)


@gradients.register_fake
def _(
    tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int], stats: Sequence[Tensor],
    upstream: Tensors, dtypes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    return _like_inputs(Problem.of(tensors, *flags), [DTYPES[i] for i in dtypes])


@library.custom_op("fused_infonce::onepass", mutates_args=())
def onepass(
    tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int], loss: str, weight: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    problem = Problem.of(tensors, *flags)
    result = load(backend).onepass(problem, _plan(plan, sizes), loss, _as_given(weight, problem), wanted)
    more = [*result.biases, *([] if problem.offset is None else [result.offset])]
    rest = _apart([result.temperature, *result.inputs, *more, *result.kept])
    return _or_empty([result.loss, *rest], problem.temperature.values)


@onepass.register_fake
def _(
    tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int], loss: str, weight: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    problem = Problem.of(tensors, *flags)
    query, t = problem.query.rows, problem.temperature.values
    acc = accumulator(query.dtype)
    kept = [t.new_empty(size) for size in load(backend).kept_sizes(problem, _plan(plan, sizes))]
    there = _summed(problem, wanted, bool(kept)) + list(wanted[len(problem.inputs) : -1])
    grads = _like_inputs(problem, [acc if wanted_too else None for wanted_too in there])
    offset = [] if problem.offset is None else [torch.empty_like(problem.offset)]
    return [t.new_empty(()), t.new_empty(t.shape[0] if wanted[-1] else 0), *grads, *offset, *kept]


@library.custom_op("fused_infonce::finished", mutates_args=())
def finished(
    tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int], sums: Tensors,
    kept: Sequence[Tensor], upstream: Tensor, dtypes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    problem = Problem.of(tensors, *flags)
    wanted = [DTYPES[i] for i in dtypes]
    grads = load(backend).finished(problem, _plan(plan, sizes), sums, kept, upstream, wanted)
    return _or_empty(_apart(grads), problem.temperature.values)


@finished.register_fake
def _(
    tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int], sums: Tensors,
    kept: Sequence[Tensor], upstream: Tensor, dtypes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    return _like_inputs(Problem.of(tensors, *flags), [DTYPES[i] for i in dtypes])


@library.custom_op("fused_infonce::sigmoids", mutates_args=())
def sigmoids(
    tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int], bias: Tensor,
    weight: Tensor, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    problem = Problem.of(tensors, *flags)
    result = load(backend).sigmoids(problem, _plan(plan, sizes), bias, _as_given(weight, problem), wanted)
    grads = [g if want else None for g, want in zip(result.inputs, wanted[:-2], strict=True)]
    return _or_empty(_apart([result.losses, result.logits, result.bias, *grads]), problem.temperature.values)


@sigmoids.register_fake
def _(
    tensors: Tensors, flags: Sequence[bool], backend: str, plan: str, sizes: Sequence[int], bias: Tensor,
    weight: Tensor, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    problem = Problem.of(tensors, *flags)
    t, n = problem.temperature.values, problem.query.rows.shape[0]
    grads = _like_inputs(problem, [problem.acc_dtype if want else None for want in wanted[:-2]])
    return [t.new_empty(n), *(t.new_empty(n if want else 0) for want in wanted[-2:]), *grads]


def _like_inputs(problem: Problem, dtypes: Sequence[torch.dtype | None]) -> list[Tensor]:
    """Return the gradients of the inputs and, where `dtypes` has them too, of the biases."""
    inputs = (*problem.inputs, *problem.biases)[: len(dtypes)]
    return [
        problem.temperature.values.new_empty(0) if dtype is None else x.new_empty(x.shape, dtype=dtype)
        for x, dtype in zip(inputs, dtypes, strict=True)
    ]
