"""The oracle as a backend: dense, in plain PyTorch, differentiable any number of times, in any floating dtype.

It holds every N x M matrix in the inputs' dtype and shares no code with the other backends. Tests run it in float64;
`backend="reference"` runs it on the inputs as they are, for every loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import EPS, LN2, KeySet, Problem, RowStatistics, Sigmoids, Statistics
from .ladder import Ladder, Profile, rounding
from .plan import Plan

takes_unit_rows = False
differentiable = True


def unavailable(tensor: Tensor) -> str:
    return ""


def unit_rows(x: Tensor) -> Tensor:
    """Compute `F.normalize(x, dim=-1)`, but for two kinds of rows.

    A row with a norm up to EPS has no gradient (there it would be 1e12), and a row whose norm overflows is NaN (there
    it would be zeros).
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = norm.masked_fill(norm == math.inf, math.nan)
    small = norm <= EPS
    return torch.where(small, x.detach() / EPS, x / torch.where(small, 1, norm))


def statistics(problem: Problem, plan: Plan, keep: list[Tensor] | None = None) -> Statistics:
    return _statistics(problem)


def sigmoids(problem: Problem, plan: Plan, bias: Tensor, weight: Tensor | float, wanted: Sequence[bool]) -> Sigmoids:
    scores, left_out, pos, t = _scored(problem)
    own = slice(0 if problem.in_batch else 1, None)
    logits, out = torch.cat(scores[own] or [scores[0][:, :0]], 1) / t, _cat(left_out[own], scores[0])
    bad = ~(logits.isfinite() | out).all(1)
    each = F.softplus(logits + bias.to(logits.dtype), threshold=40).masked_fill(out, 0).to(pos.dtype)
    losses = F.softplus(-(pos + bias), threshold=40) + each.sum(1)
    return Sigmoids(losses.masked_fill(bad, math.nan), [], None, None)


def profile(problem: Problem, plan: Plan, ladder: Ladder) -> Profile:
    scores, left_out, pos, t = _scored(problem)
    own = slice(0 if problem.in_batch else 1, None)
    d, out = torch.cat(scores[own] or [scores[0][:, :0]], 1), _cat(left_out[own], scores[0]).bool()
    out = out | (_cat([_biases(k, x) for k, x in zip(problem.keys[own], scores[own], strict=True)], scores[0]) < 0)
    d = torch.where(out | d.isfinite(), d, math.nan).to(pos.dtype)
    pos = pos * t[:, 0]
    query, key = (_seen(s, problem.normalize) for s in problem.sets[:2])
    target = torch.arange(len(query), device=query.device) if problem.target is None else problem.target
    own_key = key[target.clamp(0, max(len(key) - 1, 0))] if len(key) else torch.zeros_like(query)
    apart = rounding(query.dtype, query.shape[1]) * (query.norm(dim=-1) * own_key.norm(dim=-1)).to(pos.dtype)
    above = (~(d <= (pos + apart)[:, None]) & ~out).sum(1)
    ties = ((d <= (pos + apart)[:, None]) & (d >= (pos - apart)[:, None]) & ~out).sum(1)
    kept = d.masked_fill(out, -math.inf)
    hardest = kept.amax(1) if d.shape[1] else torch.full_like(pos, -math.inf)
    found = []
    for beta in ladder.inverse(pos).tolist():
        log_z = torch.logsumexp(kept * beta, 1) if d.shape[1] else torch.full_like(pos, -math.inf)
        p = torch.softmax(kept * beta, 1).masked_fill(out, 0)
        mean = (p * d.masked_fill(out, 0)).sum(1)
        variance = (p * (d - mean[:, None]).masked_fill(out, 0) ** 2).sum(1)
        found.append((log_z, mean, variance))
    return Profile(pos, hardest, above, ties, *map(torch.stack, zip(*found, strict=True)))


def _scored(problem: Problem) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Return the products with every set of keys, which of these are no negatives, the positives' logits, and t."""
    acc = problem.acc_dtype
    query, *keys = (_seen(s, problem.normalize) for s in problem.sets)
    t = problem.temperature.values.to(query.dtype)[:, None]  # (1, 1) or (N, 1)
    scores = [_products(query, key) for key in keys]
    target = torch.arange(len(query), device=query.device) if problem.target is None else problem.target
    pos = _positives(scores[0] / t, target).to(acc)
    return scores, [_left_out(problem, index, target) for index in range(len(keys))], pos, t


def _statistics(problem: Problem) -> Statistics:
    scores, left_out, pos, t = _scored(problem)
    own = slice(0 if problem.in_batch else 1, None)
    every = _cat([_biases(keys, x) for keys, x in zip(problem.keys[own], scores[own], strict=True)], scores[0])
    logits = torch.cat(scores[own] or [scores[0][:, :0]], 1) / t
    rows = _row_statistics(pos, logits, _cat(left_out[own], scores[0]).bool(), every)
    if not problem.columns:
        return Statistics(rows)
    of_queries = _biases(problem.query, scores[0].T)  # column j at the t of row j
    return Statistics(rows, _row_statistics(pos, scores[0].T / t, left_out[0].T, of_queries))


def _seen(keys: KeySet, normalize: bool) -> Tensor:
    """Return the rows of a set as the logits see them: (M, D), or (N, H, D) of paired keys."""
    rows, m = keys.rows, len(keys.rows)
    if normalize:
        rows = unit_rows(rows)
    elif keys.scale is not None:
        rows = rows * keys.scale[..., None].to(rows.dtype)
    if keys.indices is None:
        return rows
    return F.pad(rows, (0, 0, 0, 2))[keys.indices].masked_fill((keys.indices == m)[..., None], math.nan)  # -1: zeros


def _products(query: Tensor, keys: Tensor) -> Tensor:
    return query @ keys.T if keys.dim() == 2 else torch.einsum("nd,nhd->nh", query, keys)


def _positives(logits: Tensor, target: Tensor) -> Tensor:
    """Return (N,) the logits at the targets: 0 for -1, NaN out of range or where they are infinite."""
    m = logits.shape[1]
    picked = logits.gather(1, target[:, None].clamp(0, m - 1))[:, 0] if m else logits.new_zeros(len(target))
    picked = torch.where((target < -1) | (target >= m), math.nan, picked + (picked - picked))
    return torch.where(target == -1, 0, picked)


def _left_out(problem: Problem, index: int, target: Tensor) -> Tensor:
    """Return (N, M) or (N, H): which keys of the set with this index are no negatives."""
    query, keys = problem.query, problem.keys[index]
    n, m = len(query.rows), keys.columns()
    out = torch.zeros(n, m, dtype=torch.bool, device=query.rows.device)
    row, column = (torch.arange(k, device=out.device) for k in (n, m))
    if index == 0:
        out = out | (target[:, None] == column)
        if problem.self_similar:
            out = out | (row[:, None] == column)
    if query.ids is not None and keys.ids is not None:
        ids = keys.ids if keys.ids.dim() == keys.rows.dim() else keys.ids[..., None]
        if keys.indices is not None:
            ids = F.pad(ids, (0, 0, 0, 2))[keys.indices]
        of_rows = query.ids if query.ids.dim() == 2 else query.ids[:, None]
        agree = of_rows[:, None] == ids
        out = out | agree.any(-1)
    if problem.ceiling is not None and query.guide is not None and keys.guide is not None:
        guides = [unit_rows(guide.to(problem.ceiling.dtype)) for guide in (query.guide, keys.guide)]
        out = out | (_products(*guides) > problem.ceiling[:, None])
    if keys.indices is not None:
        out = (out | (keys.indices == -1)) & (keys.indices != len(keys.rows))
    return out


def _cat(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(list(parts), 1) if parts else like.new_zeros(len(like), 0)


def _biases(keys: KeySet, logits: Tensor) -> Tensor:
    """Return the biases of scored rows in the shape of their logits."""
    return torch.zeros_like(logits) if keys.bias is None else keys.bias.to(logits.dtype).expand_as(logits)


def _row_statistics(pos: Tensor, logits: Tensor, left_out: Tensor, biases: Tensor) -> RowStatistics:
    """Return the statistics of rows over the logits that are not left out, here without their biases."""
    left_out = left_out | (biases == -math.inf)
    unbiased, logits = logits, logits + biases.masked_fill(left_out, 0)
    none = left_out.all(1)
    kept = logits.masked_fill(left_out & ~none[:, None], -math.inf)
    neg = torch.where(none, -math.inf, torch.logsumexp(kept, dim=1)) if logits.shape[1] else logits.sum(1) - math.inf
    bad = (~logits.isfinite() & ~left_out).any(1)
    neg = (neg + torch.where(bad, math.nan, 0.0)).to(pos.dtype)
    with torch.no_grad():
        exact = logits.to(pos.dtype)
        p = torch.exp(exact - neg[:, None]).masked_fill(left_out, 0)
        mean = torch.where(none, 0, (p * unbiased.to(pos.dtype).masked_fill(left_out, 0)).sum(1))
        base2 = exact.masked_fill(left_out, -math.inf) / LN2
        maximum = torch.where(none, 0, base2.amax(1)) if logits.shape[1] else torch.zeros_like(neg)
        scale = torch.where(none, 0, 1 / torch.exp2(base2 - maximum[:, None]).sum(1))
        scale = torch.where(bad, math.nan, scale)
    return RowStatistics(pos, neg, mean, maximum, scale)
