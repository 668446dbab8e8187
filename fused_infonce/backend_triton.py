"""The primitive in Triton kernels. See `problem` for the contract and `kernels/` for the formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import launch, tiles
from .launch import LOG2E, Excluded, Own, Partners, Side
from .plan import PRODUCT_SHARE, Plan
from .problem import EPS, KEY, OnePass, Problem, Statistics, Upstream
from .row_loss import LOSSES

FLOAT16_ROOM = 14  # coefficients in float16 are scaled up to 2^14, a factor of 4 below overflow


def unavailable(tensor: Tensor) -> str | None:
    """Why these kernels cannot run on this tensor, or None if they can."""
    if tensor.dtype not in tiles.CLASSES:
        return f"there are no kernels for {tensor.dtype}"
    if launch.INTERPRETED:
        return (
            None
            if tensor.device.type in ("cpu", "cuda")
            else f"Triton's interpreter cannot read {tensor.device.type} tensors"
        )
    if tensor.device.type != "cuda":
        return (
            f"kernels run on CUDA and ROCm tensors, not {tensor.device.type} ones (TRITON_INTERPRET=1 interprets them)"
        )
    if not torch.version.hip and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "kernels need a GPU of compute capability 8.0 or later"
    return None


@dataclass(frozen=True)
class Work:
    """A problem made ready: its sides as a tile pass reads them."""

    problem: Problem
    target: Tensor | None
    query: Side
    key: Side
    shared: list[tuple[int, Side]]  # negatives that all rows have, with their index in problem.inputs
    own: list[tuple[int, Own]]  # negatives of one row each

    @property
    def segments(self) -> Iterator[tuple[int, Side, Excluded]]:
        """(index in problem.inputs, keys, what is excluded besides equal ids) of what a tile pass runs over."""
        if self.problem.in_batch and len(self.key):
            yield KEY, self.key, Excluded(self.target, self.target is None or self.problem.self_similar)
        for index, side in self.shared:
            if len(side):
                yield index, side, Excluded()


def contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def prepare(problem: Problem, at_eps: float) -> Work:
    """`at_eps`: the inverse norm of rows whose norm is at most EPS."""

    def side(index: int, ids: Tensor | None) -> Side:
        rows = launch.contiguous_rows(problem.inputs[index])
        inverse = launch.inverse_norms(rows, at_eps) if problem.normalize else contiguous(problem.scale(index))
        guide = problem.guide(index)
        if guide is None:
            return Side(rows, inverse, contiguous(ids))
        guide = launch.contiguous_rows(guide)
        norms, ceiling = launch.inverse_norms(guide, 0.0), problem.ceiling if index == 0 else None
        return Side(rows, inverse, contiguous(ids), guide=guide, guide_inverse=norms, ceiling=contiguous(ceiling))

    scale = (LOG2E / problem.temperature).expand(len(problem.query)).contiguous()
    query = replace(side(0, problem.row_ids), scale=scale)
    key = replace(side(1, problem.key_ids), scale=scale if problem.columns else None)
    shared, own = [], []
    for index, (rows, ids) in enumerate(zip(problem.negatives, problem.negative_ids, strict=True), start=2):
        if rows.dim() == 2:
            shared.append((index, side(index, ids)))
        else:
            rows, scales = launch.contiguous_rows(rows), contiguous(problem.scale(index))
            own.append(
                (index, launch.own_negatives(query.rows, rows, problem.normalize, scales, contiguous(ids), at_eps))
            )
    return Work(problem, contiguous(problem.target), query, key, shared, own)


def statistics(problem: Problem, plan: Plan) -> Statistics:
    with torch.cuda.device_of(problem.query):
        work = prepare(problem, at_eps=1 / EPS)
        query, n = work.query, len(work.query)
        temperature = problem.temperature.expand(n).contiguous()
        pos = launch.positives(query, work.key, temperature, work.target)
        columns = (torch.empty_like(pos), torch.empty_like(pos)) if problem.columns else None
        states = [
            launch.row_states(query, keys, excluded, columns if index == KEY else None, plan.limit)
            for index, keys, excluded in work.segments
        ]
        states += [launch.own_states(query, own) for _, own in work.own]
        neg, mean = launch.merged(states[0] if len(states) == 1 else torch.cat([pos.new_empty((0, 3, n)), *states]))
        if columns is None:
            return Statistics(pos, neg, mean)
        return Statistics(pos, neg, mean, *columns)


def gradients(
    problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    with torch.cuda.device_of(problem.query):
        work, unscale = weigh(prepare(problem, at_eps=0.0), statistics, upstream)
        fits = problem.query.shape[1] <= tiles.STREAMING_MAX_D[problem.query.dtype] and problem.ceiling is None
        accumulate = streaming if plan.name == "streaming" and fits else workspace
        accumulators = accumulate(work, plan, [dtype is not None for dtype in dtypes])
        return finished(work, accumulators, upstream.pos, unscale, dtypes)


def finished(
    work: Work,
    accumulators: dict[int, Tensor],
    v: Tensor,
    unscale: Tensor | None,
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """From the sums over the tiles to gradients: rows' own negatives, positives, projection, cast."""
    grads = own_gradients(work, accumulators, unscale, dtypes)
    partners = positive_partners(work, v, dtypes)
    for index, side in {0: work.query, KEY: work.key, **dict(work.shared)}.items():
        if (dtype := dtypes[index]) is not None:
            g, project = accumulators.get(index), work.problem.normalize
            grads[index] = launch.finish(g, side, project, partners.get(index), unscale, dtype)
    return [grads.get(index) for index in range(len(dtypes))]


def onepass(problem: Problem, plan: Plan, kind: str, weight: Tensor, wanted: Sequence[bool]) -> OnePass:
    """`sum_i weight_i loss_i` and its gradients from one product of the scores; see `backend_torch.onepass`.

    Exponentials are written unshifted, b_j exp(s_ij), so they must fit the inputs' dtype: `plan` sees to that. What
    turns them into coefficients is a factor f_i of the row, which multiplies the products for the queries and the
    queries themselves in the products for the keys.
    """
    loss_of, slope_of = LOSSES[kind]
    with torch.cuda.device_of(problem.query):
        work = prepare(problem, at_eps=1 / EPS)
        query, n, t = work.query, len(work.query), problem.temperature
        pos = launch.positives(query, work.key, t.expand(n).contiguous(), work.target)
        own_states = [launch.own_states(query, own) for _, own in work.own]
        segments = list(work.segments)
        blocks = [query.rows.new_empty((plan.rows, aligned(len(keys), query.rows))) for _, keys, _ in segments]
        dtypes = [problem.acc_dtype if want else None for want in wanted[:-1]]
        accumulators = zero_accumulators(work, dtypes)
        neg, mean, u = (torch.empty_like(pos) for _ in range(3))
        live = launch.without_zero_rows(query.inverse)
        for rows in slices(n, plan.rows):
            size = rows.stop - rows.start
            chunk = [(block[:size, : len(s[1])], *s) for block, s in zip(blocks, segments, strict=True)]
            states = [launch.write_exponentials(c, query, keys, rows, excluded) for c, _, keys, excluded in chunk]
            states += [state[:, :, rows] for state in own_states]
            neg[rows], mean[rows] = launch.merged(torch.cat(states))
            w, rows_t = (x if len(x) == 1 else x[rows] for x in (weight, t))
            u[rows] = (w * slope_of(neg[rows] - pos[rows])).masked_fill(w == 0, 0)
            f = u[rows] / rows_t * torch.exp(-neg[rows]).masked_fill(neg[rows] == -torch.inf, 0)
            f = (f if live is None else f * live[rows])[:, None]
            scaled = (query.rows[rows] * f).to(query.rows.dtype)
            for c, index, keys, _ in chunk:
                if wanted[0]:
                    add_product(accumulators[0][0, rows], c, keys.rows, plan.limit)
                if wanted[index]:
                    add_product(accumulators[index][0], c.T, scaled, plan.limit)
            if wanted[0]:
                accumulators[0][0, rows] *= f

        loss = (weight * loss_of(neg - pos)).masked_fill(weight == 0, 0).sum()
        dt = (u * (pos - mean)) / t if wanted[-1] else None
        work = replace(
            work,
            query=replace(query, inverse=live, neg=neg * LOG2E, weight=u / t),
            key=replace(work.key, inverse=launch.without_zero_rows(work.key.inverse)),
            shared=[(i, replace(s, inverse=launch.without_zero_rows(s.inverse))) for i, s in work.shared],
            own=[(i, own._replace(inverse=launch.without_zero_rows(own.inverse))) for i, own in work.own],
        )
        return OnePass(loss, finished(work, accumulators, -u, None, dtypes), dt)


def weigh(work: Work, statistics: Statistics, upstream: Upstream) -> tuple[Work, Tensor | None]:
    """The sides with their statistics and u / t, scaled by a power of two for float16; and what undoes the scaling."""
    t, query, key = work.problem.temperature, work.query, work.key
    query = replace(query, neg=statistics.neg * LOG2E, weight=upstream.neg / t)
    if statistics.column_neg is not None and upstream.column_neg is not None:
        key = replace(key, neg=statistics.column_neg * LOG2E, weight=upstream.column_neg / t)
    if work.problem.self_similar:  # C + C^T serves both sides at once
        key = replace(key, scale=query.scale, neg=query.neg, weight=query.weight)
    unscale = None
    if query.rows.dtype == torch.float16 and len(query):
        scale = float16_scale(query, [keys for _, keys, _ in replace(work, key=key).segments])
        query, key = (replace(s, weight=None if s.weight is None else s.weight * scale) for s in (query, key))
        unscale = 1 / scale
    return replace(work, query=query, key=key), unscale


def float16_scale(query: Side, segments: Sequence[Side]) -> Tensor:
    """The power of two that brings a bound on |C| to at most 2^FLOAT16_ROOM; p <= 1 in every coefficient."""

    def largest(inverse: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """max |inverse weight|, either of which may be absent: 1."""
        values = one
        for factor in (inverse, weight):
            values = values if factor is None else values * factor
        return values.abs().amax()

    one = query.rows.new_ones((), dtype=torch.float32)
    bound = torch.zeros_like(one)
    for keys in segments:
        part = largest(query.inverse, query.weight) * largest(keys.inverse)
        if keys.weight is not None:
            part = part + largest(query.inverse) * largest(keys.inverse, keys.weight)
        bound = torch.maximum(bound, part)
    exponent = (FLOAT16_ROOM - torch.frexp(bound).exponent).clamp(-100, 100)
    return torch.where(torch.isfinite(bound) & (bound > 0), torch.exp2(exponent.float()), 1.0)


def streaming(work: Work, plan: Plan, wanted: Sequence[bool]) -> dict[int, Tensor]:
    """index -> (slots, rows, D) accumulated gradients through the tile passes, from sums kept in registers."""
    accumulators: dict[int, Tensor] = {}
    query, segments = work.query, list(work.segments)

    def add(index: int, x: Side, y: Side, excluded: Excluded, widest: int) -> None:
        first = index not in accumulators
        if first:
            slots = launch.gradient_slots(x, y, widest, plan.limit)
            accumulators[index] = x.rows.new_empty((slots, *x.rows.shape), dtype=work.problem.acc_dtype)
        launch.add_streaming_gradient(accumulators[index], x, y, excluded, index == 0, not first)

    for index, keys, excluded in segments:
        if wanted[0]:
            add(0, query, keys, excluded, max(len(side) for _, side, _ in segments))
        if wanted[index]:
            add(index, keys, query, excluded, len(query))
    return accumulators


def workspace(work: Work, plan: Plan, wanted: Sequence[bool]) -> dict[int, Tensor]:
    """index -> (1, rows, D) accumulated gradients through the tile passes: blocks of C, then library products.

    Of a symmetric C the blocks under the diagonal are left out: a block above it stands for its transpose too.
    """
    query, n, mirrored = work.query, len(work.query), work.problem.self_similar
    segments = [segment for segment in work.segments if n and (wanted[0] or wanted[segment[0]])]
    if not segments:
        return {}
    accumulators = zero_accumulators(work, wanted)
    block_rows, block_cols = min(plan.rows, n), min(plan.cols, max(len(keys) for _, keys, _ in segments))
    block = query.rows.new_empty((block_rows, aligned(block_cols, query.rows)))
    for index, keys, excluded in segments:
        symmetric = mirrored and index == KEY
        for rows in slices(n, block_rows):
            for cols in slices(len(keys), block_cols):
                if symmetric and cols.start < rows.start:
                    continue
                c = block[: rows.stop - rows.start, : cols.stop - cols.start]
                launch.write_coefficients(c, query, keys, rows, cols, excluded)
                if wanted[0]:
                    add_product(accumulators[0][0, rows], c, keys.rows[cols], plan.limit)
                other = 0 if symmetric else index
                if wanted[other] and not (symmetric and cols.start == rows.start):
                    add_product(accumulators[other][0, cols], c.T, query.rows[rows], plan.limit)
    return accumulators


def zero_accumulators(work: Work, wanted: Sequence[object]) -> dict[int, Tensor]:
    """index -> (1, rows, D) zeros for what tile passes add to."""
    sides = {0: work.query, **{index: keys for index, keys, _ in work.segments}}
    acc = work.problem.acc_dtype
    return {i: side.rows.new_zeros((1, *side.rows.shape), dtype=acc) for i, side in sides.items() if wanted[i]}


def slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def aligned(cols: int, like: Tensor) -> int:
    """Long rows are made to start at multiples of 16 bytes, which library products want."""
    lane = 16 // like.element_size()
    return cols if cols < 16 * lane else -(-cols // lane) * lane


def add_product(out: Tensor, a: Tensor, b: Tensor, limit: int) -> None:
    """out += a @ b, accumulated in the dtype of `out`; what a product cannot add in place takes a share of `limit`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
        return
    most = max(limit // PRODUCT_SHARE // (out.element_size() * out.shape[1]), 1)
    for rows in slices(len(out), most):
        if a.is_cuda and not torch.version.hip:
            out[rows].add_(torch.mm(a[rows], b, out_dtype=out.dtype))
        else:
            out[rows].addmm_(a[rows].to(out.dtype), b.to(out.dtype))


def own_gradients(
    work: Work, accumulators: dict[int, Tensor], unscale: Tensor | None, dtypes: Sequence[torch.dtype | None]
) -> dict[int, Tensor | None]:
    """index -> gradients of the rows' own negatives; what these give the queries goes into their accumulator."""
    grads: dict[int, Tensor | None] = {}
    for index, own in work.own:
        if dtypes[0] is None and dtypes[index] is None:
            continue
        accumulate = 0 in accumulators
        if dtypes[0] is not None and not accumulate:
            accumulators[0] = work.query.rows.new_empty((1, *work.query.rows.shape), dtype=work.problem.acc_dtype)
        grads[index] = launch.own_gradient(
            accumulators.get(0), work.query, own, work.problem.normalize, unscale, dtypes[index], accumulate
        )
    return grads


def positive_partners(work: Work, v: Tensor, dtypes: Sequence[torch.dtype | None]) -> dict[int, Partners]:
    """index -> the positives of queries (0) and keys (1), with weights v_i / t_i a_i b_y; 0 without a valid target."""
    query, key, target = work.query, work.key, work.target
    n, m = len(query), len(key)
    if n == 0 or m == 0:
        return {}
    weight = v / work.problem.temperature
    if query.inverse is not None:
        weight = weight * query.inverse
    index = torch.arange(n, device=v.device) if target is None else target
    valid = (index >= 0) & (index < m)
    if key.inverse is not None:
        weight = weight * key.inverse[index.clamp(0, m - 1)]
    weight = torch.where(valid, weight, 0.0)
    if work.problem.self_similar and dtypes[KEY] is None:  # its target's target is the row itself
        weight = weight + weight[index]
    partners = {0: Partners(key.rows, weight, target)}
    if target is None:
        partners[1] = Partners(query.rows, weight)
    elif dtypes[1] is not None:  # queries by target, in their order: a sum over them never depends on timing
        sorted_target, order = torch.sort(target, stable=True)
        starts = torch.searchsorted(sorted_target, torch.arange(m + 1, device=v.device))
        partners[1] = Partners(query.rows, weight, order, starts)
    return partners
