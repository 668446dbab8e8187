"""Problems for the launchers of the Triton backend, and a dense float64 computation that they are checked against."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_infonce.backends.contract import EPS, Problem, Statistics, Upstream, accumulator
from fused_infonce.backends.plan import Plan

from .helpers import error

backend = pytest.importorskip(
    "fused_infonce.backends.triton.backend", reason="triton is not installed", exc_type=ImportError
)

LIMIT = 1 << 20
PLANS = [Plan("streaming", 64, 64, LIMIT, 0, ""), Plan("workspace", 40, 24, LIMIT, 0, "")]
both_plans = pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
SIXTEEN = (torch.float16, torch.bfloat16)


def dense(problem: Problem) -> tuple[list[Tensor], Statistics]:
    """Return leaves and statistics in float64, the latter differentiable in the former."""
    leaves = [x.detach().double().clone().requires_grad_() for x in problem.inputs]
    t = problem.temperature.double()

    def unit(index: int) -> Tensor:
        x, scale = leaves[index], problem.scale(index)
        if problem.normalize:
            return x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)
        return x if scale is None else x * scale.double()[..., None]

    n, m = len(problem.query), len(problem.key)
    q, k, rows = unit(0), unit(1), torch.arange(len(problem.query))
    target = rows if problem.target is None else problem.target
    there, index = (target >= 0) & (target < m), target.clamp(0, max(m - 1, 0))
    z = q @ k.T
    pos = z[rows, index] / t if m else z.new_full((n,), math.nan)
    pos = torch.where(there, pos, torch.where(target == -1, 0.0, math.nan))

    def kept(ids: Tensor | None, shape: torch.Size) -> Tensor:
        if ids is None or problem.row_ids is None:
            return torch.ones(shape, dtype=torch.bool)
        return (problem.row_ids[:, None] != ids).expand(shape)

    negatives = kept(problem.key_ids, z.shape) & (target[:, None] != torch.arange(m))
    if problem.self_similar:
        negatives = negatives & (rows[:, None] != torch.arange(m))
    logits, masks = ([z / t[:, None]], [negatives]) if problem.in_batch else ([], [])
    for i, (x, ids) in enumerate(zip(problem.negatives, problem.negative_ids, strict=True), start=2):
        raw = torch.einsum("nd,nhd->nh", q, unit(i)) if x.dim() == 3 else q @ unit(i).T
        logits.append(raw / t[:, None])
        masks.append(kept(ids, raw.shape))

    def reduce(s: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        neg = torch.logsumexp(s.masked_fill(~mask, -math.inf), 1)
        p = torch.where(mask, (s - neg[:, None]).exp(), 0)
        return neg, (p * s).sum(1)

    empty = z.new_zeros((n, 0))
    neg, mean = reduce(torch.cat([empty, *logits], 1), torch.cat([empty.bool(), *masks], 1))
    columns = reduce((z / t).T, negatives.T) if problem.columns else ()
    return leaves, Statistics(pos, neg, mean, neg, *columns, *columns[:1])  # softmax: see `natural`


def natural(softmax: Tensor) -> Tensor:
    """Return the logsumexp of the negatives from its two parts, the maximum and the sum."""
    return torch.where(softmax[1] == 0, -math.inf, (softmax[0] - torch.log2(softmax[1])) * math.log(2))


def upstream_of(problem: Problem) -> Upstream:
    u = torch.rand(3, len(problem.query), dtype=problem.acc_dtype, device=problem.query.device)
    return Upstream(u[0], -u[1], u[2] if problem.columns else None)


def dense_gradients(problem: Problem, upstream: Upstream) -> list[Tensor]:
    leaves, stats = dense(problem)
    total = (upstream.pos.double() * stats.pos).sum()
    pairs = [(upstream.neg, stats.neg), (upstream.column_neg, stats.column_neg)]
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
    t = problem.temperature.min().item() if len(problem.temperature) else 1.0
    loose, tight = bound(problem.query.dtype, t)
    for name, x, y in zip(Statistics._fields, got, want, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == problem.acc_dtype
            x = natural(x) if name.endswith("softmax") else x
            torch.testing.assert_close(
                x.double(), y.detach(), rtol=loose, atol=loose / t, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
    upstream = Upstream(*(None if u is None else u * scale for u in upstream_of(problem)))
    grads = backend.gradients(problem, plan, got, upstream, [x.dtype for x in problem.inputs])
    for i, (x, y) in enumerate(zip(grads, dense_gradients(problem, upstream), strict=True)):
        assert x.dtype == problem.query.dtype
        assert x.shape == y.shape
        assert error(x, y) <= tight, f"gradient {i}: {error(x, y)} > {tight}"
    return got, grads


def make(n: int, m: int, d: int, dtype: torch.dtype = torch.float64, t: float = 0.3, **options: object) -> Problem:
    rows = [torch.randn(size, d, dtype=torch.float64).to(dtype) for size in (n, m)]
    temperature = torch.empty(n, dtype=accumulator(dtype)).uniform_(0.7 * t, 1.4 * t)
    return Problem(*rows, temperature, **options)


def with_segments(problem: Problem, shared: int | None = None, own: int | None = None, ids: bool = False) -> Problem:
    n, d, few = len(problem.query), problem.query.shape[1], 4
    shapes = ([(shared, d)] if shared is not None else []) + ([(n, own, d)] if own is not None else [])
    names = [torch.randint(few, shape[:-1]) if ids else None for shape in shapes]
    problem = replace(
        problem, negatives=tuple(torch.randn(s).to(problem.query.dtype) for s in shapes), negative_ids=tuple(names)
    )
    if ids:
        problem = replace(problem, row_ids=torch.randint(few, (n,)), key_ids=torch.randint(few, (len(problem.key),)))
    return problem
