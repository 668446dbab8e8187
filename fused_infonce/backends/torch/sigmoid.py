"""Losses of sigmoids in chunked PyTorch: every tile of scores is final by itself, and is made once.

With x_i = a_i q_i and y_j = b_j k_j the rows as the logits see them, z_ij = s_ij + b and p_ij = sigmoid(z_ij):

    loss_i = softplus(-z_i,target) + sum_j softplus(z_ij)
    G_i = w_i / t_i (sum_j p_ij y_j - sigmoid(-z_i,target) y_target(i))
    H_j = sum_i p_ij w_i / t_i x_i - ...

and dq_i, dk_j from G_i, H_j as in `chunked`. The positive's logit is made apart, and never enters a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import LN2, Problem, Sigmoids
from ..indexing import part_of
from ..plan import Plan
from ..row_losses import weighted
from .small import Dense
from .work import FLOOR, Tile, Work

# From here on softplus(z) is z and sigmoid(z) is 1, to the last bit of float64 too. The product of two exponentials of
# what is below still fits float32.
TOP = 40.0


def sigmoids(problem: Problem, plan: Plan, bias: Tensor, weight: Tensor | float, wanted: Sequence[bool]) -> Sigmoids:
    if plan.name == "dense" and (found := _of_few(problem, bias, weight, wanted)) is not None:
        return found
    *inputs, of_temperature, of_bias = wanted
    work = Work(problem, plan, [problem.acc_dtype if want else None for want in inputs])
    fits = work.device.type == "cpu" and work.largest_logit + bias.item() <= TOP
    first, second = work.buffers(2)
    losses = torch.empty(work.n, dtype=work.acc, device=work.device)
    logits, slopes = (torch.empty_like(losses) if want else None for want in (of_temperature, of_bias))
    grad_query = torch.zeros_like(problem.query.rows, dtype=work.acc) if inputs[0] else None
    for chunk in work.chunks():
        below, w = -bias - work.positives(chunk), part_of(weight, chunk.rows)
        value, v = F.softplus(below, threshold=TOP), weighted(torch.sigmoid(below), w).neg_()
        factor = w * chunk.inv_t
        factor = factor[:, None] if isinstance(factor, Tensor) else factor
        scaled = chunk.queries.unit * factor if True in inputs[1:] else chunk.queries.unit
        grad = None if grad_query is None else part_of(grad_query, chunk.rows)
        if of_temperature and grad is None:
            grad = torch.zeros_like(chunk.queries.unit)
        slope = None if slopes is None else torch.zeros_like(value)
        for tile in work.tiles(chunk):
            z = _logits(tile, bias, first)
            if not fits:
                value += _above(z, tile.shaped(second))
            e = z.exp_()
            if True in wanted:
                p = torch.add(e, 1, out=tile.shaped(second))
                torch.div(e, p, out=p)
                slope = None if slope is None else slope.add_(p.sum(1))
                tile.keys.add_gradients(p, scaled, chunk.rows, tile.cols, grad)
            value += _log_sum(e)
        losses[chunk.rows] = value
        if grad is not None:
            grad.mul_(factor)
        work.add_positives(chunk, v, grad)
        if slopes is not None and slope is not None:
            slopes[chunk.rows] = weighted(slope, w) + v
        if logits is not None and grad is not None:  # x_i . G_i
            logits[chunk.rows] = torch.linalg.vecdot(grad, chunk.queries.unit)
        if grad_query is not None and grad is not None:
            chunk.queries.finish(grad)
    grads = [grad_query, *work.finish([work.acc] * len(problem.keys))]
    return Sigmoids(losses, grads, logits, slopes)


def _of_few(problem: Problem, bias: Tensor, weight: Tensor | float, wanted: Sequence[bool]) -> Sigmoids | None:
    """Return what `sigmoids` does of few scores, all at once; None where one is above TOP or infinite."""
    *inputs, of_temperature, of_bias = wanted
    dense = Dense(problem)
    z = dense.products(1.0, bias)
    if not (problem.normalize and dense.inv_t + bias.item() <= TOP):
        least, most = torch.aminmax(z)
        if not -torch.inf < least.item() <= most.item() <= TOP:
            return None
    below = -dense.own
    dense.exclude(z, FLOOR)
    losses = F.softplus(z, threshold=TOP).sum(1).add_(F.softplus(below, threshold=TOP))
    if True not in wanted:
        return Sigmoids(losses, [None] * len(inputs), None, None)
    w = z.sigmoid_()
    w.diagonal().copy_(below.sigmoid_().neg_())  # the slopes of the positives
    share, each = (1.0, weight[:, None]) if isinstance(weight, Tensor) else (weight, None)
    w = w if each is None else w.mul_(each)
    slopes = w.sum(1).mul_(share) if of_bias else None
    of_rows = [inputs[0] or of_temperature, *inputs[1:]]
    sides = dense.gradients(w + w.T if dense.same else w, of_rows, share * dense.inv_t)
    logits = None
    if of_temperature:  # x_i . G_i; where the keys are the queries, that of both sides
        logits = torch.linalg.vecdot(sides[0], dense.x)
        logits = logits.div_(2) if dense.same else logits
    dense.finish()
    return Sigmoids(losses, dense.by_input(sides, inputs), logits, slopes)


def _log_sum(e: Tensor) -> Tensor:
    """Return sum_j log(1 + e_j), (R,), of (R, T) that are overwritten, by a logarithm for two of them: the logarithm of
    (1 + a) (1 + b) = 1 + (a + b + a b)."""
    half = e.shape[1] // 2
    a, b, last = e.split([half, half, e.shape[1] - 2 * half], 1)
    a.addcmul_(a, b).add_(b)
    total = a.log1p_().sum(1)
    return total if last.shape[1] == 0 else total + last[:, 0].log1p()


def _logits(tile: Tile, bias: Tensor, out: Tensor) -> Tensor:
    """Return z_ij of a tile in a flat buffer, FLOOR where a pair is no negative."""
    chunk = tile.chunk
    z = tile.keys.scores(chunk.scaled, chunk.alpha * LN2, chunk.rows, tile.cols, tile.shaped(out)).add_(bias)
    tile.exclude(z, FLOOR)
    return z


def _above(z: Tensor, aside: Tensor) -> Tensor:
    """Clamp logits at TOP in place; return the sums, (R,), of what was above it, NaN where a logit is infinite."""
    total = torch.sub(z, TOP, out=aside).clamp_min_(0).sum(1)
    total += torch.where(z.amin(1) == -torch.inf, torch.nan, total - total)  # inf - inf is NaN too
    z.clamp_max_(TOP)
    return total
