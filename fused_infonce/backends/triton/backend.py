"""The primitive in Triton kernels. `contract` says what is computed, and `kernels/` has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..contract import LOG2E, OnePass, Problem, RowStatistics, Statistics, Upstream
from ..indexing import part_of, slices
from ..plan import Plan
from ..precision import EXPONENT_ROOM
from ..row_losses import loss_and_slope, temperature_gradient
from . import dense, launch, paired, tiles
from .accumulate import Sums, streaming, workspace
from .coefficients import block_of, combine, write_exponentials, write_scores
from .finish import Partners, finish, partners_by_target
from .launch import Side
from .rows import scaled_rows, without_zero_rows
from .shifts import with_shifts
from .statistics import SLOTS, merged, row_states, unwritten
from .work import Work, prepare, restored, to_keep, unshifted

FLOAT16_ROOM = 14  # coefficients in float16 are scaled up to 2^14, a factor of 4 below overflow


def unavailable(tensor: Tensor) -> str:
    """Return why these kernels cannot run on this tensor; "" if they can."""
    kind = tensor.device.type
    if tensor.dtype not in tiles.CLASSES:
        return f"there are no kernels for {tensor.dtype}"
    if launch.INTERPRETED:
        return "" if kind in ("cpu", "cuda") else f"Triton's interpreter cannot read {kind} tensors"
    if kind != "cuda":
        return f"kernels run on CUDA and ROCm tensors, not {kind} ones (TRITON_INTERPRET=1 interprets them)"
    if not torch.version.hip and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "kernels need a GPU of compute capability 8.0 or later"
    return ""


def statistics(problem: Problem, plan: Plan, keep: list[Tensor] | None = None) -> Statistics:
    with torch.cuda.device_of(problem.query.rows):
        work, pos = prepare(problem, plan, positives=True)
        query, n = work.query, len(work.query)
        assert pos is not None
        columns = unwritten(pos, len(work.shared[1])) if problem.columns else None
        kind = unshifted(problem, plan), plan.mean
        if problem.self_similar and n:
            rows = unwritten(pos)
            row_states(query, work.shared[1], work.excluded, rows, plan.limit, *kind, half=True)
            return Statistics(rows)
        states = [
            row_states(query, keys, excluded, columns if index == 1 else None, plan.limit, *kind)
            for index, keys, excluded in work.segments
        ]
        states += [paired.paired_states(query, keys) for keys in work.paired.values()]
        every = states[0] if len(states) == 1 else torch.cat([pos.new_empty((0, SLOTS, n)), *states])
        return Statistics(merged(every, pos), columns)


def gradients(
    problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream, dtypes: Sequence[torch.dtype | None],
    kept: Sequence[Tensor] = (),
) -> list[Tensor | None]:  # fmt: skip
    with torch.cuda.device_of(problem.query.rows):
        work, _ = prepare(problem, plan, statistics, upstream)
        work, unscale = in_float16_range(work)
        rows = problem.query.rows
        fits = rows.shape[1] <= tiles.STREAMING_MAX_D[rows.dtype] and problem.ceiling is None and not problem.biases
        wanted = [dtype is not None for dtype in dtypes[: len(problem.sets)]]
        biases = bias_gradients(problem, dtypes)
        if plan.name == "streaming" and fits:
            accumulators = streaming(work, plan, wanted)
        else:
            accumulators = workspace(work, plan, wanted, biases)
        made = paired_gradients(work, accumulators, unscale, dtypes, biases)
        made |= finished_sides(work, accumulators, upstream.pos, unscale, dtypes)
        if unscale is not None:
            biases = {place: grad * unscale for place, grad in biases.items()}
        return [*(made.get(place) for place in range(len(problem.sets))), *map(biases.get, problem.biased)]


def bias_gradients(problem: Problem, dtypes: Sequence[torch.dtype | None]) -> dict[int, Tensor]:
    """Return zeros for the gradients of the biases that are wanted, by place in the inputs."""
    every = zip(problem.biased, problem.biases, dtypes[len(problem.sets) :], strict=True)
    return {place: torch.zeros_like(bias) for place, bias, dtype in every if dtype is not None}


def onepass(problem: Problem, plan: Plan, loss: str, weight: Tensor | float, wanted: Sequence[bool]) -> OnePass:
    """Compute a reduced loss and its gradients from one product of the scores; see `Backend.onepass`.

    Exponentials are written unshifted, b_j exp(s_ij), so they must fit the inputs' dtype: `plan` sees to that. With
    biases they are less what `shifts` says. What turns them into coefficients is a factor f_i of the row, which
    multiplies the products for the queries and the queries themselves in the products for the keys.
    """
    with torch.cuda.device_of(problem.query.rows):
        if plan.name == "dense":
            return dense.onepass(problem, plan, loss, weight, wanted)
        work, pos = prepare(problem, plan, positives=True)
        t, offset = problem.temperature.values, problem.offset
        assert pos is not None
        if problem.columns:
            return both_directions(work, pos, plan, loss, weight, wanted)
        positives = pos if offset is None else pos + offset
        states = [paired.paired_states(work.query, keys) for keys in work.paired.values()]
        work = with_shifts(work, plan, [positives], states)
        query, segments = work.query, list(work.segments)
        blocks = [block_of(query, keys, plan.rows, len(keys)) for _, keys, _ in segments]
        sums = Sums(plan.limit)
        losses, slopes, factors, found = [], [], [], []
        for rows in slices(len(query), plan.rows):
            chunk = [
                write_exponentials(block, query, keys, rows, excluded, wanted[-1] or plan.record)
                for block, (_, keys, excluded) in zip(blocks, segments, strict=True)
            ]
            parts = [state for _, state in chunk] + [state[:, :, rows].contiguous() for state in states]
            rows_pos, logits, w, rows_t = (part_of(x, rows) for x in (pos, positives, weight, t))
            found.append(merged(parts[0] if len(parts) == 1 else torch.cat(parts), rows_pos))
            value, u = loss_and_slope(loss, found[-1].neg - logits, w)
            factor, scaled = scaled_rows(query, rows, u, found[-1], rows_t)
            for (c, _), (index, keys, _) in zip(chunk, segments, strict=True):
                if wanted[0]:
                    sums.add(0, query, rows, c, keys.rows)
                if wanted[index]:
                    sums.add(index, keys, slice(0, len(keys)), c.T, scaled)
            losses.append(value)
            slopes.append(u)
            factors.append(factor)

        u, factor = joined(slopes, pos), joined(factors, pos)
        rows_found = RowStatistics(*(joined(list(parts), pos) for parts in zip(*found, strict=True)))
        if states:  # what paired keys add to the queries' gradient has no such factor
            if 0 in sums.of:
                sums.of[0] *= factor[:, None]
            work = replace(work, query=replace(query, shift=rows_found.maximum, weight=u / t * rows_found.scale))
            paired_gradients(work, sums.of, None, [problem.acc_dtype if wanted[0] else None, *[None] * len(wanted[2:])])
        of_t = temperature_gradient(u * (rows_found.mean - pos), problem.temperature) if wanted[-1] else None
        v = -u
        rows_of = [rows_found[:3]] if plan.record else []
        return OnePass(
            joined(losses, pos).sum(), summed(work, sums, wanted), of_t, to_keep(work, v, factor),
            [None] * len(problem.biases), None if offset is None else v, rows_of,
        )  # fmt: skip


def summed(work: Work, sums: Sums, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Return the (rows, D) sums of the inputs that are wanted, zeros where nothing was added; None of paired keys."""
    d = work.problem.query.rows.shape[1]
    for index, side in {0: work.query, **work.shared}.items():
        if wanted[index] and index not in sums.of:
            sums.of[index] = side.rows.new_zeros((1, len(side), d), dtype=work.problem.acc_dtype)
    return [sums.of[index][0, :, :d] if index in sums.of else None for index in range(len(work.problem.sets))]


def finished(
    problem: Problem, plan: Plan, sums: Sequence[Tensor | None], kept: Sequence[Tensor], upstream: Tensor,
    dtypes: Sequence[torch.dtype | None], spent: Sequence[int] = (),
) -> list[Tensor | None]:  # fmt: skip
    with torch.cuda.device_of(problem.query.rows):
        work, v, factor = restored(problem, kept)
        accumulators = {index: x[None] for index, x in enumerate(sums) if x is not None}
        made = paired_gradients(work, {}, upstream, [None, *dtypes[1:]])
        of_queries = None if work.paired else factor
        saved = [index for index in accumulators if index not in spent]
        made |= finished_sides(work, accumulators, v * upstream, upstream, dtypes, of_queries, saved)
        return [made.get(index) for index in range(len(dtypes))]


def both_directions(
    work: Work, pos: Tensor, plan: Plan, loss: str, weight: Tensor | float, wanted: Sequence[bool]
) -> OnePass:
    """Compute the mean of the reduced losses of rows and columns, and its gradients, from one product of the scores.

    Scores are written where all of them fit, since the factors of a column are known after the last row only, and
    become coefficients where they lie.
    """
    problem = work.problem
    offset = problem.offset
    positives = (pos, pos) if offset is None else (pos + offset).unbind()
    work = with_shifts(work, plan, positives)
    query, key = work.query, work.shared[1]
    block, mean = block_of(query, key, len(query), len(key)), wanted[-1] or plan.record
    bound = min(problem.score_bound * LOG2E, EXPONENT_ROOM[query.rows.dtype])  # while recorded only the plan knows it
    *states, step = write_scores(block, query, key, work.excluded, bound, mean)
    found = [merged(state, pos) for state in states]
    (value, u), (column_value, column_u) = (
        loss_and_slope(loss, each.neg - each_pos, weight / 2) for each, each_pos in zip(found, positives, strict=True)
    )
    sums = Sums(plan.limit)
    if wanted[0] or wanted[1]:
        c = combine(block, query, key, (u, column_u), found, problem.temperature.values, step)
        if wanted[0]:
            sums.add(0, query, slice(0, len(query)), c, key.rows)
        if wanted[1]:
            sums.add(1, key, slice(0, len(key)), c.T, query.rows)
    of_t = None
    if wanted[-1]:
        logits = u * (found[0].mean - pos) + column_u * (found[1].mean - pos)
        of_t = temperature_gradient(logits, problem.temperature)
    kept = to_keep(work, -(u + column_u), torch.ones_like(u))  # C has no factor to come
    slopes = None if offset is None else -torch.stack([u, column_u])
    rows = [each[:3] for each in found] if plan.record else []
    total = value.sum() + column_value.sum()
    biases = [None] * len(problem.biases)
    return OnePass(total, summed(work, sums, wanted), of_t, kept, biases, slopes, rows)


def joined(parts: list[Tensor], none: Tensor) -> Tensor:
    """Return the vector of all rows from those of chunks; `none` where there are no rows."""
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else none


def finished_sides(
    work: Work, accumulators: dict[int, Tensor], v: Tensor, unscale: Tensor | None,
    dtypes: Sequence[torch.dtype | None], factor: Tensor | None = None,
    saved: Sequence[int] = (),
) -> dict[int, Tensor | None]:  # fmt: skip
    """Return the gradients of all but paired keys from their sums over the tiles, those of queries times a factor.

    The positives, the projection and the cast are what is still to be done. saved: which sums must stay.
    """
    d = work.problem.query.rows.shape[1]
    partners = positive_partners(work, v, dtypes)
    grads: dict[int, Tensor | None] = {}
    for index, rows in {0: work.query, **work.shared}.items():
        if (dtype := dtypes[index]) is not None:
            g, project = accumulators.pop(index, None), work.problem.normalize
            f = factor if index == 0 else None
            grads[index] = finish(g, rows, d, project, partners.get(index), unscale, dtype, f, index in saved)
    return grads


def in_float16_range(work: Work) -> tuple[Work, Tensor | None]:
    """Return the problem with its weights scaled by a power of two for float16, and the factor that undoes it."""
    query, key = work.query, work.shared[1]
    if query.rows.dtype != torch.float16 or not len(query):
        return work, None
    scale = float16_scale(query, [keys for _, keys, _ in work.segments])
    query, key = (replace(s, weight=None if s.weight is None else s.weight * scale) for s in (query, key))
    return replace(work, query=query, shared=work.shared | {1: key}), 1 / scale


def float16_scale(query: Side, segments: Sequence[Side]) -> Tensor:
    """Return the power of two that brings a bound on |C| to at most 2^FLOAT16_ROOM; p <= 1 in every coefficient."""

    def largest(rows: Side, weight: Tensor | None = None) -> Tensor:
        """Return max |inverse weight|; either factor may be absent, and then is 1."""
        values = one
        for factor in (without_zero_rows(rows.inverse, rows.zero_row), weight):
            values = values if factor is None else values * factor
        return values.abs().amax()

    one = query.rows.new_ones((), dtype=torch.float32)
    bound = torch.zeros_like(one)
    for keys in segments:
        part = largest(query, query.weight) * largest(keys)
        if keys.weight is not None:
            part = part + largest(query) * largest(keys, keys.weight)
        bound = torch.maximum(bound, part)
    exponent = (FLOAT16_ROOM - torch.frexp(bound).exponent).clamp(-100, 100)
    return torch.where(torch.isfinite(bound) & (bound > 0), torch.exp2(exponent.float()), 1.0)


def paired_gradients(
    work: Work, accumulators: dict[int, Tensor], unscale: Tensor | None, dtypes: Sequence[torch.dtype | None],
    biases: dict[int, Tensor] | None = None,
) -> dict[int, Tensor | None]:  # fmt: skip
    """Return the gradients of paired keys by place, and add their part of the queries' to the queries' accumulator.

    biases: the gradients of biases by place, those of paired keys still to be written.
    """
    grads: dict[int, Tensor | None] = {}
    for index, keys in work.paired.items():
        of_biases = (biases or {}).get(index)
        if dtypes[0] is None and dtypes[index] is None and of_biases is None:
            continue
        accumulate = 0 in accumulators
        if dtypes[0] is not None and not accumulate:
            accumulators[0] = work.query.rows.new_empty((1, *work.query.rows.shape), dtype=work.problem.acc_dtype)
        grads[index] = paired.paired_gradient(
            accumulators.get(0), work.query, keys, work.problem.normalize, unscale, dtypes[index], accumulate, of_biases
        )
    return grads


def positive_partners(work: Work, v: Tensor, dtypes: Sequence[torch.dtype | None]) -> dict[int, Partners]:
    """Return the positives of queries (0) and keys (1), with their weights v_i / t_i a_i b_y."""
    query, key, target, t = work.query, work.shared[1], work.target, work.problem.temperature.values
    n, m = len(query), len(key)
    if n == 0 or m == 0:
        return {}
    mutual = work.problem.self_similar and dtypes[1] is None  # its target's target is the row itself
    partners = {0: Partners(key.rows, key.inverse, v, t, target, mutual=mutual)}
    if target is None:
        partners[1] = Partners(query.rows, query.inverse, v, t)
    elif dtypes[1] is not None:
        partners[1] = partners_by_target(query, v, t, target, m)
    return partners
