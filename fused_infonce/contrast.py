"""The primitive: two autograd Functions over a plan and a backend. Everything else is O(N) on their outputs.

`statistics` is differentiable through `neg`, `pos` and `column_neg`; `reduced_loss` computes loss and gradients at once
where the plan allows it and composes on `statistics` where not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import operators
from .backends.contract import EXPONENT_ROOM, KEY, OnePass, Problem, Statistics, Upstream, accumulator
from .backends.plan import Plan, choose, default_limit
from .backends.row_losses import LOSSES

LN2 = math.log(2)


@dataclass(frozen=True)
class Options:
    """What a call asks for beyond its tensors."""

    backend: str = "auto"
    workspace_limit: int | None = None
    logit_bound: float = math.inf  # no logit exceeds this in size, as far as is known without reading a tensor


_UNAVAILABLE: dict[tuple[torch.device, torch.dtype], str] = {}


@torch.compiler.assume_constant_result
def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why the Triton backend cannot run on such tensors, or "" if it can."""
    if (device, dtype) not in _UNAVAILABLE:
        _UNAVAILABLE[device, dtype] = _unavailable(torch.empty(0, dtype=dtype, device=device))
    return _UNAVAILABLE[device, dtype]


def _unavailable(tensor: Tensor) -> str:
    try:
        from .backends import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton.unavailable(tensor) or ""


def resolve(backend: str, tensor: Tensor) -> str:
    """The name of the backend that runs: "auto" is Triton on a GPU where it can run, PyTorch elsewhere."""
    if backend == "auto" and tensor.device.type != "cuda":
        return "torch"
    if backend not in ("auto", "triton"):
        return backend
    why = unavailable(tensor.device, tensor.dtype)
    if why and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: {why}")
    if why and not torch.compiler.is_compiling():
        warnings.warn(f"backend='auto' runs in PyTorch, slower: {why}", stacklevel=5)
    return "torch" if why else "triton"


def compute_dtype(inputs: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which products are made: under autocast its own, except for float64, else the inputs'."""
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device) and inputs[0].dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return inputs[0].dtype


def _refuse_tangents(problem: Problem) -> None:
    for x in (*problem.inputs, problem.temperature):
        if forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError("the fused loss has no forward-mode derivative (jvp): it needs backend='reference'")


remembered = lru_cache(maxsize=1024)(choose)


def make_plan(problem: Problem, options: Options, reduced: bool, weighted: bool = False) -> Plan:
    """The plan of a call on these inputs as they are now, before they are cast.

    reduced, weighted: whether the loss is a sum of row losses known in closed form, and whether rows weigh differently.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(problem)
    n, d = problem.query.shape
    m = problem.key.shape[0] if problem.in_batch else 0
    for keys in problem.negatives:
        m += keys.shape[-2]
    dtype = compute_dtype(problem.inputs)
    device = problem.query.device.type
    plan = choose if torch.compiler.is_compiling() else remembered
    return plan(
        backend=resolve(options.backend, problem.query),
        device=device,
        n=n,
        m=m,
        d=d,
        itemsize=dtype.itemsize,
        acc_itemsize=accumulator(dtype).itemsize,
        gradients=torch.is_grad_enabled() and any(x.requires_grad for x in (*problem.inputs, problem.temperature)),
        columns=problem.columns,
        self_similar=problem.self_similar,
        reduced=reduced,
        plain=problem.plain and not weighted,
        per_row=problem.temperature.shape[0] > 1,
        bounded=options.logit_bound <= EXPONENT_ROOM[dtype] * LN2,
        guided=problem.ceiling is not None,
        limit=options.workspace_limit or default_limit(device),
    )


def products(device: str) -> AbstractContextManager[Any]:
    """Where products are made, in the dtypes that are there: autocast has no say."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`x` in `dtype`, and where float16 has no range for it the power of two that each row was divided by."""
    if x.dtype == dtype:
        return x, None
    if dtype != torch.float16 or not x.numel():
        return x.to(dtype), None
    exponent = torch.frexp(x.float().abs().amax(-1)).exponent.clamp(-120, 126)
    scale = torch.exp2(exponent.to(torch.float32))  # the largest element of a row ends in [0.5, 1)
    return (x / scale[..., None]).to(dtype), scale


def _bind(problem: Problem, temperature: Tensor, inputs: Sequence[Tensor]) -> Problem:
    """The problem over these tensors, cast for the products."""
    if not torch.is_autocast_enabled(inputs[0].device.type):  # then one dtype it is
        return problem
    dtype = compute_dtype(inputs)
    narrow = [cast(x, dtype) for x in inputs]
    rest = problem.tensors()[len(inputs) + 1 : -len(inputs)]
    return problem.with_tensors([*(x for x, _ in narrow), temperature, *rest, *(scale for _, scale in narrow)])


def _unscale(problem: Problem, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """From gradients of the rows that were divided by `scales` to those of the rows that came."""
    if not problem.scales:
        return list(grads)
    scales = [problem.scale(i) for i in range(len(grads))]
    return [g if g is None or s is None else g.div_(s[..., None]) for g, s in zip(grads, scales, strict=True)]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that refuses to be recorded (`create_graph=True`).

    Only the refusal is safe: gradients that carry no graph would drop out of a second derivative in silence.
    """

    def guarded(ctx: Any, *upstream: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the fused loss is differentiable once: create_graph=True (double backward) needs backend='reference'"
            )
        return backward(ctx, *upstream)

    return guarded


class _Statistics(torch.autograd.Function):
    """Statistics forward, gradients from their upstream backward."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, plan: Plan, temperature: Tensor, *inputs: Tensor) -> Any:
        ctx.dtypes = [x.dtype if needed else None for x, needed in zip(inputs, ctx.needs_input_grad[3:], strict=True)]
        if problem.self_similar:  # the query's gradient is that of both sides
            ctx.dtypes[KEY] = None
        problem = _bind(problem, temperature, inputs)
        with products(inputs[0].device.type):
            statistics = run_statistics(problem, plan)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # of mean, which has none: each would be a kernel
        ctx.problem = problem.with_tensors([None] * len(problem.tensors()))
        ctx.save_for_backward(*problem.tensors(), *statistics)
        aside = (statistics.mean, statistics.softmax, statistics.column_mean, statistics.column_softmax)
        ctx.mark_non_differentiable(*(x for x in aside if x is not None))
        return tuple(statistics)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        *tensors, pos, neg, mean, softmax, column_neg, column_mean, column_softmax = ctx.saved_tensors
        problem = ctx.problem.with_tensors(tensors)
        statistics = Statistics(pos, neg, mean, softmax, column_neg, column_mean, column_softmax)
        v, u = (_given(x, pos) for x in upstream[:2])
        column_u = None if column_neg is None else _given(upstream[4], pos)
        with products(problem.query.device.type):
            grads = run_gradients(problem, ctx.plan, statistics, Upstream(u, v, column_u), ctx.dtypes)
        dt = None
        if ctx.needs_input_grad[2]:
            total = u * mean + v * pos if column_u is None else u * mean + v * pos + column_u * column_mean
            dt = _reduce_like(-total / problem.temperature, problem.temperature)
        return None, None, dt, *_unscale(problem, grads)


def _given(slope: Tensor | None, like: Tensor) -> Tensor:
    """An upstream gradient, contiguous; zeros for what took no part in the loss."""
    return torch.zeros_like(like) if slope is None else slope.contiguous()


class _OnePass(torch.autograd.Function):
    """A reduced loss with its gradients made in the forward; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        plan: Plan,
        kind: str,
        weight: Tensor,
        temperature: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        wanted = [*ctx.needs_input_grad[5:], ctx.needs_input_grad[4]]
        if problem.self_similar:  # the query's gradient is that of both sides
            wanted[KEY] = False
        ctx.dtypes = [x.dtype for x in inputs]
        problem = _bind(problem, temperature, inputs)
        with products(inputs[0].device.type):
            result = run_onepass(problem, plan, kind, weight, wanted)
        dt = None if result.temperature is None else _reduce_like(result.temperature, temperature)
        ctx.save_for_backward(dt, *_unscale(problem, result.inputs))
        return result.loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        dt, *grads = ctx.saved_tensors
        scaled = [_times(g, upstream, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return None, None, None, None, None if dt is None else dt * upstream, *scaled


def _times(grad: Tensor | None, upstream: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The product in `dtype`, with one rounding and no copy."""
    if grad is None or grad.dtype == dtype:
        return None if grad is None else grad * upstream
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))


def run_statistics(problem: Problem, plan: Plan) -> Statistics:
    if not torch.compiler.is_compiling():
        return operators.module(plan.backend).statistics(problem, plan)
    present = [True] * 4 + [problem.columns] * 3
    return operators.statistics_of(
        operators.none_if_empty(operators.statistics(*operators.flatten(problem, plan)), present)
    )


def run_gradients(
    problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream, dtypes: Sequence[Any]
) -> list[Tensor | None]:
    if not torch.compiler.is_compiling():
        return operators.module(plan.backend).gradients(problem, plan, statistics, upstream, dtypes)
    codes = [operators.DTYPES.index(dtype) for dtype in dtypes]
    flat = operators.flatten(problem, plan)
    found = operators.gradients(*flat, list(statistics), list(upstream), codes)
    return operators.none_if_empty(found, codes)


def run_onepass(problem: Problem, plan: Plan, kind: str, weight: Tensor, wanted: Sequence[bool]) -> OnePass:
    if not torch.compiler.is_compiling():
        return operators.module(plan.backend).onepass(problem, plan, kind, weight, wanted)
    loss, dt, *grads = operators.onepass(*operators.flatten(problem, plan), kind, weight, wanted)
    return OnePass(loss, operators.none_if_empty(grads, wanted[:-1]), dt if wanted[-1] else None)


def _apart(problem: Problem) -> Sequence[Tensor]:
    """Its inputs, each an object of its own where `torch.compile` records: it takes no tensor twice."""
    if not torch.compiler.is_compiling():
        return problem.inputs
    inputs = problem.inputs
    return [x.view_as(x) if any(x is y for y in inputs[:i]) else x for i, x in enumerate(inputs)]


def _reduce_like(per_row: Tensor, temperature: Tensor) -> Tensor:
    return per_row.sum(0, keepdim=True) if len(temperature) == 1 else per_row


def statistics(problem: Problem, options: Options) -> Statistics:
    """The statistics, differentiable in every input and the temperature through neg, pos and column_neg."""
    return _statistics(problem, make_plan(problem, options, reduced=False))


def _without_graph(run: Callable[..., Any], problem: Problem, *args: Any) -> Any:
    """Where nothing needs a gradient: what the Functions would cost is saved."""
    with torch.no_grad():
        problem = _bind(problem, problem.temperature, problem.inputs)
        with products(problem.query.device.type):
            return run(problem, *args)


def _statistics(problem: Problem, plan: Plan) -> Statistics:
    if plan.gradients:
        return Statistics(*_Statistics.apply(problem, plan, problem.temperature, *_apart(problem)))
    return _without_graph(run_statistics, problem, plan)


def reduced_loss(problem: Problem, options: Options, kind: str, weight: Tensor) -> Tensor:
    """`sum_i weight_i loss_i` of a row loss in `row_loss.LOSSES`; with `problem.columns` its mean with that of columns.

    weight: (1,) or (N,); a row of weight 0 counts for nothing.
    """
    plan = make_plan(problem, options, reduced=True, weighted=weight.shape[0] > 1)
    if plan.one_pass:
        if plan.gradients:
            return _OnePass.apply(problem, plan, kind, weight, problem.temperature, *_apart(problem))
        return _without_graph(run_onepass, problem, plan, kind, weight, [False] * (len(problem.inputs) + 1)).loss
    loss_of, _ = LOSSES[kind]
    stats = _statistics(problem, plan)
    rows = loss_of(stats.neg - stats.pos)
    if stats.column_neg is not None:
        rows = (rows + loss_of(stats.column_neg - stats.pos)) / 2
    return weighted_sum(rows, weight)


def weighted_sum(rows: Tensor, weight: Tensor) -> Tensor:
    """`sum_i weight_i rows_i`, weight (1,) or (N,); a row of weight 0 counts for nothing."""
    rows = weight * rows
    of_all = weight.shape[0] == 1 < rows.shape[0]  # then it is not 0
    return (rows if of_all else torch.where(weight == 0, 0, rows)).sum()
