"""Problems for the launchers of the Triton backend, and a dense float64 computation that they are checked against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_infonce.backends.contract import EPS, KeySet, Problem, RowStatistics, Statistics, Temperature, Upstream
from fused_infonce.backends.plan import Plan
from fused_infonce.backends.precision import accumulator

from .helpers import error

backend = pytest.importorskip(
    "fused_infonce.backends.triton.backend", reason="triton is not installed", exc_type=ImportError
)

LIMIT = 1 << 20
PLANS = [Plan("streaming", 64, 64, LIMIT, 0, ""), Plan("workspace", 40, 24, LIMIT, 0, "")]
both_plans = pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
SIXTEEN = (torch.float16, torch.bfloat16)


def problem_of(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    target: Tensor | None = None,
    *,
    negatives: Sequence[Tensor] = (),
    row_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Sequence[Tensor | None] = (),
    scales: Sequence[Tensor | None] = (),
    guides: Sequence[Tensor | None] = (),
    **options: Any,
) -> Problem:
    """Return a problem from flat lists: scales and guides are aligned with the queries, the keys and the negatives."""
    rows = (query, key, *negatives)
    ids = (row_ids, key_ids, *(negative_ids or [None] * len(negatives)))
    none = [None] * len(rows)
    first, *keys = map(KeySet, rows, ids, guides or none, scales or none)
    return Problem(first, tuple(keys), Temperature(temperature), target, **options)


def with_ids(problem: Problem, row_ids: Tensor, key_ids: Tensor) -> Problem:
    first, *others = problem.keys
    return replace(
        problem, query=problem.query._replace(ids=row_ids), keys=(first._replace(ids=key_ids), *others)
    )  # fmt: skip


def dense(problem: Problem) -> tuple[list[Tensor], Statistics]:
    """Return leaves and statistics in float64, the latter differentiable in the former; `scale` is left at 1."""
    leaves = [x.detach().double().clone().requires_grad_() for x in problem.inputs]
    t = problem.temperature.values.double()

    def unit(x: Tensor, keys: KeySet) -> Tensor:
        if problem.normalize:
            return x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)
        return x if keys.scale is None else x * keys.scale.double()[..., None]

    q, *sets = map(unit, leaves, problem.sets)
    n, m = len(q), len(sets[0])
    rows = torch.arange(n)
    target = rows if problem.target is None else problem.target
    there, index = (target >= 0) & (target < m), target.clamp(0, max(m - 1, 0))
    z = q @ sets[0].T
    pos = z[rows, index] / t if m else z.new_full((n,), math.nan)
    pos = torch.where(there, pos, torch.where(target == -1, 0.0, math.nan))

    def kept(ids: Tensor | None, shape: torch.Size) -> Tensor:
        row_ids = problem.query.ids
        if ids is None or row_ids is None:
            return torch.ones(shape, dtype=torch.bool)
        return (row_ids[:, None] != ids).expand(shape)

    negatives = kept(problem.keys[0].ids, z.shape) & (target[:, None] != torch.arange(m))
    if problem.self_similar:
        negatives = negatives & (rows[:, None] != torch.arange(m))
    logits, masks = ([z / t[:, None]], [negatives]) if problem.in_batch else ([], [])
    for x, keys in zip(sets[1:], problem.keys[1:], strict=True):
        raw = torch.einsum("nd,nhd->nh", q, x) if x.dim() == 3 else q @ x.T
        logits.append(raw / t[:, None])
        masks.append(kept(keys.ids, raw.shape))

    def reduce(s: Tensor, mask: Tensor) -> RowStatistics:
        neg = torch.logsumexp(s.masked_fill(~mask, -math.inf), 1)
        p = torch.where(mask, (s - neg[:, None]).exp(), 0)
        return RowStatistics(pos, neg, (p * s).sum(1), neg, torch.ones_like(neg))

    empty = z.new_zeros((n, 0))
    found = reduce(torch.cat([empty, *logits], 1), torch.cat([empty.bool(), *masks], 1))
    return leaves, Statistics(found, reduce((z / t).T, negatives.T) if problem.columns else None)


def natural(rows: RowStatistics) -> RowStatistics:
    """Return statistics whose maximum is the logsumexp that maximum and scale say together, and whose scale is 1."""
    total = torch.where(rows.scale == 0, -math.inf, (rows.maximum - torch.log2(rows.scale)) * math.log(2))
    return rows._replace(maximum=total, scale=torch.ones_like(total))


def upstream_of(problem: Problem) -> Upstream:
    query = problem.query.rows
    u = torch.rand(3, len(query), dtype=problem.acc_dtype, device=query.device)
    return Upstream(-u[1], u[0], u[2] if problem.columns else None)


def dense_gradients(problem: Problem, upstream: Upstream) -> list[Tensor]:
    leaves, (rows, columns) = dense(problem)
    total = (upstream.pos.double() * rows.pos).sum()
    pairs = [(upstream.neg, rows.neg), (upstream.column_neg, None if columns is None else columns.neg)]
    for u, neg in pairs:
        if u is not None and neg is not None:
            total = total + torch.where(neg == -math.inf, 0, u.double() * neg).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.nan_to_num(0) for x, g in zip(leaves, grads, strict=True)]


def bound(dtype: torch.dtype, t: float) -> tuple[float, float]:
    """Return the errors allowed of statistics, beside a logit of 1 / t whose rounding they hold, and of gradients."""
    if dtype == torch.float64:
        return 1e-12, 1e-10
    return 1e-5, (5e-3 if dtype in SIXTEEN else 1e-5 * max(1, 0.05 / t))


def check(problem: Problem, plan: Plan, scale: float = 1.0) -> tuple[Statistics, list[Tensor]]:
    """Assert statistics and gradients; `scale` multiplies the upstream, as a loss scale does."""
    _, want = dense(problem)
    got = backend.statistics(problem, plan)
    t = problem.temperature.values.min().item() if len(problem.temperature.values) else 1.0
    loose, tight = bound(problem.query.rows.dtype, t)
    assert (got.columns is None) == (want.columns is None)
    for found, exact in zip(got, want, strict=True):
        if found is None or exact is None:
            continue
        for name, x, y in zip(RowStatistics._fields, natural(found), exact, strict=True):
            assert x.dtype == problem.acc_dtype
            torch.testing.assert_close(
                x.double(), y.detach(), rtol=loose, atol=loose / t, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
    upstream = Upstream(*(None if u is None else u * scale for u in upstream_of(problem)))
    grads = backend.gradients(problem, plan, got, upstream, [x.dtype for x in problem.inputs])
    for i, (x, y) in enumerate(zip(grads, dense_gradients(problem, upstream), strict=True)):
        assert x.dtype == problem.query.rows.dtype
        assert x.shape == y.shape
        assert error(x, y) <= tight, f"gradient {i}: {error(x, y)} > {tight}"
    return got, grads


def make(n: int, m: int, d: int, dtype: torch.dtype = torch.float64, t: float = 0.3, **options: object) -> Problem:
    rows = [torch.randn(size, d, dtype=torch.float64).to(dtype) for size in (n, m)]
    temperature = torch.empty(n, dtype=accumulator(dtype)).uniform_(0.7 * t, 1.4 * t)
    return problem_of(*rows, temperature, **options)


def with_segments(problem: Problem, shared: int | None = None, own: int | None = None, ids: bool = False) -> Problem:
    (n, d), few, query = problem.query.rows.shape, 4, problem.query.rows
    shapes = ([(shared, d)] if shared is not None else []) + ([(n, own, d)] if own is not None else [])
    names = [torch.randint(few, shape[:-1]) if ids else None for shape in shapes]
    more = [KeySet(torch.randn(shape).to(query.dtype), name) for shape, name in zip(shapes, names, strict=True)]
    problem = replace(problem, keys=(problem.keys[0], *more))
    if ids:
        return with_ids(problem, torch.randint(few, (n,)), torch.randint(few, (len(problem.keys[0].rows),)))
    return problem


def one_pass(problem: Problem, plan: Plan, weight: Tensor | float, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Return the InfoNCE loss, the gradient of the temperature and, in the accumulator dtype, those of the inputs."""
    result = backend.onepass(problem, plan, "infonce", weight, wanted)
    dtypes = [problem.acc_dtype if want else None for want in wanted[:-1]]
    one = torch.ones((), dtype=problem.acc_dtype)
    return [
        result.loss,
        result.temperature,
        *backend.finished(problem, plan, result.inputs, result.kept, one, dtypes),
    ]
