"""The primitive in Triton kernels. `contract` says what is computed, and `kernels/` has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..contract import OnePass, Problem, RowStatistics, Statistics, Upstream
from ..indexing import part_of, slices
from ..plan import Plan
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
    """Compute a reduced loss and its gradients from one product of the scores; see `Backend.onepass`."""
    with torch.cuda.device_of(problem.query.rows):
        if plan.name == "dense":
            return dense.onepass(problem, plan, loss, weight, wanted)
        work, pos = prepare(problem, plan, positives=True)
        offset, directions = problem.offset, 1 + problem.columns
        assert pos is not None
        positives = [pos] * directions if offset is None else [*(pos + offset).view(directions, len(pos))]
        states = [paired.paired_states(work.query, keys) for keys in work.paired.values()]
        work = with_shifts(work, plan, positives, states)
        biases = bias_gradients(problem, [problem.acc_dtype if want else None for want in wanted[:-1]])
        made = from_scores if problem.columns or biases.keys() & work.shared.keys() else from_exponentials
        return made(work, pos, positives, states, biases, plan, loss, weight, wanted)


def from_exponentials(
    work: Work, pos: Tensor, positives: Sequence[Tensor], states: Sequence[Tensor], biases: dict[int, Tensor],
    plan: Plan, loss: str, weight: Tensor | float, wanted: Sequence[bool],
) -> OnePass:  # fmt: skip
    """Compute the loss of rows and its gradients from exponentials that are rounded as they are made.

    They are written unshifted, b_j exp(s_ij), so they must fit the inputs' dtype: `plan` sees to that. With biases they
    are less what `shifts` says. What turns them into coefficients is a factor f_i of the row, which multiplies the
    products for the queries and the queries themselves in the products for the keys.

    pos, positives: the targets' logits without what is added to them, and with it. states: of the paired keys. biases:
    the gradients of these keys' biases, which are written.
    """
    problem, query, segments = work.problem, work.query, list(work.segments)
    blocks = [block_of(query, keys, plan.rows, len(keys)) for _, keys, _ in segments]
    sums = Sums(plan.limit)
    losses, slopes, factors, found = [], [], [], []
    for rows in slices(len(query), plan.rows):
        chunk = [
            write_exponentials(block, query, keys, rows, excluded, wanted[-1] or plan.record)
            for block, (_, keys, excluded) in zip(blocks, segments, strict=True)
        ]
        found.append(merged_rows([state for _, state in chunk], states, rows, pos))
        logits, w, t = (part_of(x, rows) for x in (positives[0], weight, problem.temperature.values))
        value, u = loss_and_slope(loss, found[-1].neg - logits, w)
        factor, scaled = scaled_rows(query, rows, u, found[-1], t)
        for (c, _), (index, keys, _) in zip(chunk, segments, strict=True):
            if wanted[0]:
                sums.add(0, query, rows, c, keys.rows)
            if wanted[index]:
                sums.add(index, keys, slice(0, len(keys)), c.T, scaled)
        losses.append(value)
        slopes.append(u)
        factors.append(factor)
    factor = joined(factors, pos)
    if states and 0 in sums.of:  # what paired keys add to the queries' gradient has no such factor
        sums.of[0] *= factor[:, None]
    return collected(work, pos, sums, losses, [slopes], [found], factor, biases, plan, wanted)


def from_scores(
    work: Work, pos: Tensor, positives: Sequence[Tensor], states: Sequence[Tensor], biases: dict[int, Tensor],
    plan: Plan, loss: str, weight: Tensor | float, wanted: Sequence[bool],
) -> OnePass:  # fmt: skip
    """Compute the loss of rows, or the mean of it and that of columns, and its gradients from scores that are kept.

    They become coefficients where they lie, once what these are made of is known: for both directions, whose scores are
    all there at once, after the last row. So a bias's gradient is a sum of coefficients that nothing has rounded: the
    positive's, which is subtracted, may be all but 1/1000 of it.

    The arguments are those of `from_exponentials`; biases: the gradients of all that are wanted.
    """
    problem, query, segments = work.problem, work.query, list(work.segments)
    blocks = [block_of(query, keys, plan.rows, len(keys)) for _, keys, _ in segments]
    sums, mean = Sums(plan.limit), wanted[-1] or plan.record
    losses: list[Tensor] = []
    slopes: list[list[Tensor]] = [[] for _ in positives]
    found: list[list[RowStatistics]] = [[] for _ in positives]
    for rows in slices(len(query), plan.rows):
        chunk = [
            write_scores(block, query, keys, rows, excluded, mean, problem.columns)
            for block, (_, keys, excluded) in zip(blocks, segments, strict=True)
        ]
        here = [merged_rows([state for state, *_ in chunk], states, rows, pos)]
        here += [merged(state, pos) for state in chunk[0][1:]]
        made = [
            loss_and_slope(loss, each.neg - part_of(logits, rows), part_of(weight, rows) / len(here))
            for each, logits in zip(here, positives, strict=True)
        ]
        u = [slope for _, slope in made]
        if any(wanted[:-1]):
            for block, (index, keys, _) in zip(blocks, segments, strict=True):
                c = combine(block, query, keys, rows, u, here, biases.get(0), biases.get(index))
                if wanted[0]:
                    sums.add(0, query, rows, c, keys.rows)
                if wanted[index]:
                    sums.add(index, keys, slice(0, len(keys)), c.T, part_of(query.rows, rows))
        losses += [value for value, _ in made]
        for direction, each in enumerate(here):
            slopes[direction].append(u[direction])
            found[direction].append(each)
    return collected(work, pos, sums, losses, slopes, found, torch.ones_like(pos), biases, plan, wanted)


def merged_rows(shared: Sequence[Tensor], states: Sequence[Tensor], rows: slice, pos: Tensor) -> RowStatistics:
    """Return the statistics of some rows from their states over shared keys and those of all rows over paired keys."""
    parts = [*shared, *(state[:, :, rows].contiguous() for state in states)]
    return merged(parts[0] if len(parts) == 1 else torch.cat(parts), part_of(pos, rows))


def collected(
    work: Work, pos: Tensor, sums: Sums, losses: list[Tensor], slopes: Sequence[list[Tensor]],
    found: Sequence[list[RowStatistics]], factor: Tensor, biases: dict[int, Tensor], plan: Plan, wanted: Sequence[bool],
) -> OnePass:  # fmt: skip
    """Return what chunks of rows have come to, with what paired keys add to the queries' gradient.

    slopes, found: u and statistics of the chunks, by direction. factor: by which the queries' sums are multiplied.
    """
    problem = work.problem
    u = [joined(parts, pos) for parts in slopes]
    rows = [RowStatistics(*(joined(list(x), pos) for x in zip(*parts, strict=True))) for parts in found]
    if work.paired:
        weight = u[0] / problem.temperature.values * rows[0].scale
        work = replace(work, query=replace(work.query, shift=rows[0].maximum, weight=weight))
        of_queries = problem.acc_dtype if wanted[0] else None
        paired_gradients(work, sums.of, None, [of_queries, *[None] * len(problem.keys)], biases)
    v, logits = -u[0], None
    if wanted[-1]:
        logits = u[0] * (rows[0].mean - pos)
    for slope, each in zip(u[1:], rows[1:], strict=True):
        v = v - slope
        logits = None if logits is None else logits + slope * (each.mean - pos)
    of_t = None if logits is None else temperature_gradient(logits, problem.temperature)
    return OnePass(
        joined(losses, pos).sum(), summed(work, sums, wanted), of_t, to_keep(work, v, factor),
        [biases.get(place) for place in problem.biased],
        None if problem.offset is None else -u[0] if len(u) == 1 else -torch.stack(u),
        [each[:3] for each in rows] if plan.record else [],
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
