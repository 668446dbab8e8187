"""The primitives as autograd sees them: Functions over a plan and a backend. All else is O(N) on their outputs.

`statistics` is differentiable through `pos`, `neg` and the columns' `neg`; `onepass` makes a loss and its gradients at
once, for plans that allow it. `sigmoids` is for losses in which every pair is classified by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import Options
from .backends.contract import KeySet, Problem, RowStatistics, Sigmoids, Statistics, Temperature, Upstream
from .backends.ladder import Ladder, Profile
from .backends.plan import Plan
from .backends.precision import cast, product_dtype, times, without_autocast
from .backends.recording import Notes, Parts, record, recordings
from .backends.row_losses import temperature_gradient, weighted

_explained = Notes()
explaining = _explained.taken  # a context in which this thread's calls note their plans and compute only zeros


def is_explaining() -> bool:
    """Return whether this thread's calls compute nothing now."""
    return _explained.wanted


def explain(what: Any) -> None:
    """Note how a call is computed: a plan, or an exchange between processes, which prints as a sentence."""
    _explained.here.append(what)


def statistics(problem: Problem, options: Options, full: bool = False, plan: Plan | None = None) -> Statistics:
    """Return the statistics, differentiable in every input, bias and the temperature; `pos` has its bias.

    Columns of a problem whose rows have other negatives are a problem of their own. full: as in `Plan`. plan: the
    problem's, where it has been chosen already.
    """
    if problem.apart:
        rows = statistics(problem.of_rows(), options, full).rows
        return Statistics(rows, statistics(problem.swapped(), options, full).rows)
    plan = plan or backends.plan_of(problem, options, reduced=False, full=full)
    if is_explaining():
        explain(plan)
        return zeros(problem)
    own = problem if problem.offset is None else replace(problem, offset=None)
    backend = backends.get(plan.backend)
    if backend.differentiable:
        found = backend.statistics(own, plan)
    elif plan.gradients:
        found = Statistics.of(_Statistics.apply(own, plan, own.temperature.values, *_apart(own)))
    else:
        found = _without_graph(backend.statistics, own, plan)
    if problem.offset is not None:
        found = with_offset(found, problem.offset)
    if recordings.wanted:
        record(problem, [rows[:3] for rows in found if rows is not None])
    return found


def with_offset(found: Statistics, offset: Tensor) -> Statistics:
    """Return statistics whose positives have their biases."""
    rows, columns = found
    if columns is None:
        return Statistics(rows._replace(pos=rows.pos + offset))
    return Statistics(rows._replace(pos=rows.pos + offset[0]), columns._replace(pos=columns.pos + offset[1]))


def onepass(problem: Problem, plan: Plan, loss: str, weight: Tensor | float) -> Tensor:
    """Return `sum_i weight_i loss_i`, or with `problem.columns` its mean with that of the columns.

    plan: one that makes loss and gradients at once. loss: a name in `row_losses.ROW_LOSSES`. weight: (N,), a row of
    weight 0 counting for nothing, or a number for all rows.
    """
    if plan.gradients:
        t = problem.temperature.given
        if t is not None and plan.name != "dense":  # that plan reads what is given as it is
            t = problem.temperature.values
        return _OnePass.apply(problem, plan, loss, weight, t, *_apart(problem))
    nothing = [False] * (len(problem.inputs) + len(problem.biases) + 1)
    result = _without_graph(backends.get(plan.backend).onepass, problem, plan, loss, weight, nothing)
    if plan.record:
        record(problem, _with_offsets(result.rows, problem.offset))
    return result.loss


def _with_offsets(parts: Parts, offset: Tensor | None) -> Parts:
    """Return parts whose positives have their biases."""
    if offset is None:
        return parts
    offsets = offset.unbind() if offset.dim() == 2 else [offset]
    return [(pos + c, *rest) for (pos, *rest), c in zip(parts, offsets, strict=True)]


def sigmoids(problem: Problem, plan: Plan, bias: Tensor, weight: Tensor | float | None = None) -> Tensor:
    """Return `sum_i weight_i loss_i` with loss_i of `contract.Sigmoids`, or without weights the losses of rows, (N,).

    plan: that of `problem` and this bias, (1,), with losses `reduced` exactly where there are weights.
    """
    if is_explaining():
        explain(plan)
        zero = problem.temperature.values.new_zeros(problem.query.rows.shape[0])
        return zero if weight is None else zero.sum()
    backend, factor = backends.get(plan.backend), 1.0 if weight is None else weight
    if plan.gradients and not backend.differentiable:
        return _Sigmoids.apply(problem, plan, weight, problem.temperature.values, bias, *_apart(problem))
    nothing = [False] * (len(problem.inputs) + 2)
    if backend.differentiable:
        losses = backend.sigmoids(problem, plan, bias, factor, nothing).losses
    else:
        losses = _without_graph(backend.sigmoids, problem, plan, bias, factor, nothing).losses
    return losses if weight is None else weighted(losses, weight).sum()


def profile(problem: Problem, options: Options, ladder: Ladder) -> Profile:
    """Return the profile of the rows over a ladder of temperatures, of which nothing has a gradient."""
    with torch.no_grad():
        plan = backends.plan_of(problem, options, reduced=False, full=True)
        return _without_graph(backends.get(plan.backend).profile, problem, plan, ladder)


def zeros(problem: Problem) -> Statistics:
    """Return statistics of the right shapes, of a call that is explained."""
    zero = problem.temperature.values.new_zeros(problem.query.rows.shape[0])
    rows = RowStatistics(*[zero] * len(RowStatistics._fields))
    return Statistics(rows, rows if problem.columns else None)


def _without_graph(function: Callable[..., Any], problem: Problem, plan: Plan, *args: Any) -> Any:
    """Return a backend's function of a problem of which nothing needs a gradient: what the Functions cost is saved."""
    if plan.as_is:
        return function(problem, plan, *args)
    return _run(function, bind(problem, None, problem.inputs), plan, *args)


def _run(function: Callable[..., Any], bound: Problem, plan: Plan, *args: Any) -> Any:
    """Return a backend's function of a problem whose rows have been cast, with autocast off."""
    if plan.as_is:
        return function(bound, plan, *args)
    with without_autocast(bound.query.rows.device.type):
        return function(bound, plan, *args)


def _apart(problem: Problem) -> Sequence[Tensor]:
    """Return the inputs and what is added to logits, each an object of its own where `torch.compile` records: it takes
    no tensor twice."""
    inputs = (*problem.leaves, *problem.added)
    if not torch.compiler.is_compiling():
        return inputs
    return [x.view_as(x) if any(x is y for y in inputs[:i]) else x for i, x in enumerate(inputs)]


def bind(
    problem: Problem, temperature: Tensor | None, inputs: Sequence[Tensor], dtype: torch.dtype | None = None
) -> Problem:  # fmt: skip
    """Return the problem over these tensors, which are its own, cast for the products; dtype: of these, if known."""
    if problem.handles:
        inputs = [x if h is None else s.rows for x, h, s in zip(inputs, problem.handles, problem.sets, strict=True)]
    dtype = dtype or product_dtype(inputs[0])
    if {x.dtype for x in inputs} == {dtype}:
        return problem
    narrow = [cast(x, dtype) for x in inputs]
    sets = [s._replace(rows=rows, scale=scale) for s, (rows, scale) in zip(problem.sets, narrow, strict=True)]
    t = problem.temperature
    if temperature is not None:
        t = Temperature(temperature, t.lowest, raw=t.raw)
    return replace(problem, query=sets[0], keys=tuple(sets[1:]), temperature=t)


def unscale(problem: Problem, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of the rows that came from those of the rows that `cast` divided."""
    scales = [keys.scale for keys in problem.sets]
    if scales.count(None) == len(scales):
        return list(grads)
    rows, biases = grads[: len(scales)], grads[len(scales) :]
    rows = [g if g is None or s is None else g.div_(s[..., None]) for g, s in zip(rows, scales, strict=True)]
    return [*rows, *biases]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward refuse to be recorded (`create_graph=True`).

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
            ctx.dtypes[1] = None
        if not plan.as_is:
            problem = bind(problem, temperature, inputs[: len(problem.sets)])
        kept: list[Tensor] = []
        found = _run(backends.get(plan.backend).statistics, problem, plan, kept)
        tensors, results = problem.tensors(), found.tensors()
        ctx.plan, ctx.inputs, ctx.kept = plan, len(tensors), len(kept)
        ctx.set_materialize_grads(False)  # of what has none: each would be a kernel
        ctx.problem = problem.with_tensors([None] * ctx.inputs)
        ctx.save_for_backward(*tensors, *results, *kept)
        aside = [x for rows in found if rows is not None for x in rows[2:]]
        ctx.mark_non_differentiable(*aside)
        return tuple(results)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        tensors = ctx.saved_tensors
        end = len(tensors) - ctx.kept
        problem, found = ctx.problem.with_tensors(tensors[: ctx.inputs]), Statistics.of(tensors[ctx.inputs : end])
        rows, columns = found
        v, u = (given(slope, rows.pos) for slope in upstream[:2])
        column_u = None if columns is None else given(upstream[len(rows)], rows.pos)
        with without_autocast(problem.query.rows.device.type):
            backend = backends.get(ctx.plan.backend)
            grads = backend.gradients(problem, ctx.plan, found, Upstream(v, u, column_u), ctx.dtypes, tensors[end:])
        dt = None
        if ctx.needs_input_grad[2]:
            logits = u * rows.mean + v * rows.pos
            if columns is not None and column_u is not None:
                logits = logits + column_u * columns.mean
            dt = temperature_gradient(logits, problem.temperature)
        return None, None, dt, *unscale(problem, grads)


def given(slope: Tensor | None, like: Tensor) -> Tensor:
    """Return an upstream gradient, contiguous; zeros for what took no part in the loss."""
    return torch.zeros_like(like) if slope is None else slope.contiguous()


class _OnePass(torch.autograd.Function):
    """A reduced loss with its gradients made in the forward; the backward scales them, or finishes what they are of."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, plan: Plan, loss: str, weight: Tensor | float, temperature: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:  # fmt: skip
        rows, biases = len(problem.sets), len(problem.biases)
        wanted = [*ctx.needs_input_grad[5 : 5 + rows + biases], ctx.needs_input_grad[4]]
        if problem.self_similar:  # the query's gradient is that of both sides
            wanted[1] = False
        inputs = inputs[:rows]
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.handled = [place for place, x in enumerate(problem.handles) if x is not None]
        bound = problem if plan.as_is else bind(problem, temperature, inputs)
        result = _run(backends.get(plan.backend).onepass, bound, plan, loss, weight, wanted)
        if plan.record:
            record(problem, _with_offsets(result.rows, problem.offset))
        dt = result.temperature
        more = list(result.biases)  # these and the offset's are finished in any case
        if problem.offset is not None:
            more.append(result.offset if ctx.needs_input_grad[-1] else None)
        ctx.added, ctx.unfinished = len(more), len(result.kept) > 0
        if ctx.unfinished:  # inputs are saved as they came: a cast of them would be memory of its own
            problem = _of_backward(problem, wanted)
            tensors = problem.tensors()
            ctx.plan, ctx.product_dtype = plan, bound.query.rows.dtype
            ctx.flags, ctx.end = problem.flags, len(inputs) + len(tensors)
            ctx.dtypes = [x.dtype if want else None for x, want in zip(inputs, wanted[:rows], strict=True)]
            ctx.save_for_backward(dt, *more, *result.inputs, *tensors, *result.kept)
        else:
            grads = result.inputs if plan.as_is else unscale(bound, result.inputs)
            ctx.save_for_backward(dt, *more, *grads)
        return result.loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        dt, *saved = ctx.saved_tensors
        added, saved = saved[: ctx.added], saved[ctx.added :]
        if ctx.unfinished:
            grads = _finished(ctx, saved, upstream)
        else:
            grads = _scaled(ctx, saved, upstream)
        added = [None if g is None else g * upstream for g in added]
        return None, None, None, None, None if dt is None else dt * upstream, *grads, *added


class _Sigmoids(torch.autograd.Function):
    """Losses of sigmoids. Their weighted sum has its gradients made in the forward; those of rows apart, whose weights
    are their upstream, in the backward."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, plan: Plan, weight: Tensor | float | None, temperature: Tensor, bias: Tensor,
        *inputs: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.wanted = [*ctx.needs_input_grad[5:], *ctx.needs_input_grad[3:5]]
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.handled = [place for place, x in enumerate(problem.handles) if x is not None]
        bound = problem if plan.as_is else bind(problem, temperature, inputs)
        if weight is None:
            tensors = bound.tensors()
            ctx.problem, ctx.plan = bound.with_tensors([None] * len(tensors)), plan
            ctx.save_for_backward(bias, *tensors)
            return _sigmoids(bound, plan, bias, 1.0, [False] * len(ctx.wanted)).losses
        ctx.problem = None
        result = _sigmoids(bound, plan, bias, weight, ctx.wanted)
        ctx.save_for_backward(*_slopes(result, bound))
        return weighted(result.losses, weight).sum()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        slopes = ctx.saved_tensors  # read once: a checkpoint gives them no second time
        if ctx.problem is not None:
            bias, *tensors = slopes
            problem = ctx.problem.with_tensors(tensors)
            result = _sigmoids(problem, ctx.plan, bias, upstream.contiguous(), ctx.wanted)
            slopes, upstream = _slopes(result, problem), upstream.new_ones(())
        dt, db, *grads = slopes
        scalars = [None if x is None else x * upstream for x in (dt, db)]
        return None, None, None, *scalars, *_scaled(ctx, grads, upstream)


def _sigmoids(
    problem: Problem, plan: Plan, bias: Tensor, weight: Tensor | float, wanted: Sequence[bool]
) -> Sigmoids:  # fmt: skip
    with without_autocast(problem.query.rows.device.type):
        return backends.get(plan.backend).sigmoids(problem, plan, bias, weight, wanted)


def _slopes(result: Sigmoids, problem: Problem) -> list[Tensor | None]:
    """Return the gradients of the temperature, of the bias, and of the inputs as they came."""
    dt = None if result.logits is None else temperature_gradient(result.logits, problem.temperature)
    db = None if result.bias is None else result.bias.sum(0, keepdim=True)
    return [dt, db, *unscale(problem, result.inputs)]


def _of_backward(problem: Problem, wanted: Sequence[bool]) -> Problem:
    """Return the problem without the rows that a backward does not need, which may be overwritten before it.

    These are of all sets but the queries and the first that have no gradient.
    """
    first, *others = problem.keys
    if not others:
        return problem
    of_others = zip(others, wanted[2 : len(problem.sets)], strict=True)
    keys = [x if want else _without_rows(x) for x, want in of_others]
    return replace(problem, keys=(first, *keys))


def _without_rows(keys: KeySet) -> KeySet:
    indices = None if keys.indices is None else keys.indices.new_empty((0, keys.columns()))
    return KeySet(keys.rows.new_empty((0, *keys.rows.shape[1:])), indices=indices)


def _finished(ctx: Any, saved: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
    """Return the gradients of a one-pass loss from the sums that its forward made."""
    count, end = len(ctx.dtypes), ctx.end
    problem = Problem.of(saved[count:end], *ctx.flags)
    problem = bind(problem, None, problem.inputs, ctx.product_dtype)
    with without_autocast(problem.query.rows.device.type):
        backend = backends.get(ctx.plan.backend)
        sums, kept = saved[:count], saved[end:]
        return unscale(problem, backend.finished(problem, ctx.plan, sums, kept, upstream, ctx.dtypes, _spent(ctx)))


def _scaled(ctx: Any, grads: Sequence[Tensor | None], upstream: Tensor) -> list[Tensor | None]:
    """Return saved gradients times the upstream one in the dtypes of the inputs, with one rounding."""
    spent = _spent(ctx)
    return [
        g.mul_(upstream) if g is not None and place in spent else times(g, upstream, dtype)
        for place, (g, dtype) in enumerate(zip(grads, ctx.dtypes, strict=True))
    ]


def _spent(ctx: Any) -> Sequence[int]:
    """Return the places of saved gradients that may be overwritten: those for handles, which their exchange alone
    reads, in a backward that frees the graph. A second gradient of the rows of all ranks would be as large as they are.
    """
    kept = not ctx.handled or torch._C._autograd._get_current_graph_task_keep_graph()
    return () if kept else ctx.handled
