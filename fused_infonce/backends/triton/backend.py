"""The primitive in Triton kernels. See `problem` for the contract and `kernels/` for the formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..contract import KEY, OnePass, Problem, Statistics, Upstream, accumulator
from ..plan import PRODUCT_SHARE, Plan
from ..row_losses import LOSSES
from . import launch, launch_rows, tiles
from .launch import Excluded, Side
from .launch_rows import Own, Partners, part_of

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


@dataclass(eq=False)
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


def prepare(
    problem: Problem,
    statistics: Statistics | None = None,
    upstream: Upstream | None = None,
    positives: bool = False,
) -> tuple[Work, Tensor | None]:
    """The problem made ready, for gradients with statistics and their upstream; and with `positives` their logits."""
    t, target = problem.temperature, contiguous(problem.target)
    rows = [launch.contiguous_rows(x) for x in problem.inputs]
    scales = [contiguous(problem.scale(index)) for index in range(len(rows))]

    def side(index: int, ids: Tensor | None, t: Tensor | None = None, **wanted: Any) -> tuple[Side, Tensor | None]:
        ready, pos = launch_rows.side(rows[index], contiguous(ids), scales[index], problem.normalize, t, **wanted)
        return with_guide(ready, problem, index), pos

    def given(softmax: str, slope: str) -> dict[str, Tensor | None]:
        return {"softmax": getattr(statistics, softmax, None), "u": getattr(upstream, slope, None)}

    wanted = (rows[KEY], scales[KEY], target) if positives else None
    query, pos = side(0, problem.row_ids, t, positive=wanted, **given("softmax", "neg"))
    if problem.self_similar:  # in a backward C + C^T serves both sides at once
        key = replace(query, ids=contiguous(problem.key_ids), scale=query.scale if upstream else None)
    elif problem.columns:
        key, _ = side(KEY, problem.key_ids, t, **given("column_softmax", "column_neg"))
    else:
        key, _ = side(KEY, problem.key_ids)
    shared, own = [], []
    for index, ids in enumerate(problem.negative_ids, start=2):
        if rows[index].dim() == 2:
            shared.append((index, side(index, ids)[0]))
        else:
            keys, scale = rows[index], scales[index]
            own.append((index, launch_rows.own_negatives(query.rows, keys, problem.normalize, scale, contiguous(ids))))
    return Work(problem, target, query, key, shared, own), pos


def with_guide(side: Side, problem: Problem, index: int) -> Side:
    guide = problem.guide(index)
    if guide is None:
        return side
    guide = launch.contiguous_rows(guide)
    norms, ceiling = launch_rows.inverse_norms(guide, 0.0), problem.ceiling if index == 0 else None
    return replace(side, guide=guide, guide_inverse=norms, ceiling=contiguous(ceiling))


def statistics(problem: Problem, plan: Plan) -> Statistics:
    with torch.cuda.device_of(problem.query):
        work, pos = prepare(problem, positives=True)
        query, n = work.query, len(work.query)
        assert pos is not None
        columns = launch.softmax_statistics(pos) if problem.columns else None
        states = [
            launch.row_states(query, keys, excluded, columns if index == KEY else None, plan.limit)
            for index, keys, excluded in work.segments
        ]
        states += [launch_rows.own_states(query, own) for _, own in work.own]
        rows = launch.merged(states[0] if len(states) == 1 else torch.cat([pos.new_empty((0, 3, n)), *states]))
        return Statistics(pos, *rows, *(columns or ()))


def gradients(
    problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    with torch.cuda.device_of(problem.query):
        work, _ = prepare(problem, statistics, upstream)
        work, unscale = in_float16_range(work)
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
    factor: Tensor | None = None,
) -> list[Tensor | None]:
    """From the sums over the tiles, those of queries times a factor, to gradients: rows' own negatives, positives,
    projection, cast."""
    grads = own_gradients(work, accumulators, unscale, dtypes)
    partners = positive_partners(work, v, dtypes)
    for index, side in {0: work.query, KEY: work.key, **dict(work.shared)}.items():
        if (dtype := dtypes[index]) is not None:
            g, project = accumulators.get(index), work.problem.normalize
            f = factor if index == 0 else None
            grads[index] = launch_rows.finish(g, side, project, partners.get(index), unscale, dtype, f)
    return [grads.get(index) for index in range(len(dtypes))]


def onepass(problem: Problem, plan: Plan, kind: str, weight: Tensor, wanted: Sequence[bool]) -> OnePass:
    """`sum_i weight_i loss_i` and its gradients from one product of the scores; see `backend_torch.onepass`.

    Exponentials are written unshifted, b_j exp(s_ij), so they must fit the inputs' dtype: `plan` sees to that. What
    turns them into coefficients is a factor f_i of the row, which multiplies the products for the queries and the
    queries themselves in the products for the keys.
    """
    loss_of, slope_of = LOSSES[kind]
    with torch.cuda.device_of(problem.query):
        work, pos = prepare(problem, positives=True)
        query, n, t = work.query, len(work.query), problem.temperature
        assert pos is not None
        own_states = [launch_rows.own_states(query, own) for _, own in work.own]
        segments = list(work.segments)
        blocks = [query.rows.new_empty((plan.rows, aligned(len(keys), query.rows))) for _, keys, _ in segments]
        dtypes = [problem.acc_dtype if want else None for want in wanted[:-1]]
        accumulators: dict[int, Tensor] = {}
        found: list[tuple[Tensor, ...]] = []
        for rows in slices(n, plan.rows):
            size = rows.stop - rows.start
            chunk = [(block[:size, : len(s[1])], *s) for block, s in zip(blocks, segments, strict=True)]
            states = [launch.write_exponentials(c, query, keys, rows, excluded) for c, _, keys, excluded in chunk]
            states += [state[:, :, rows].contiguous() for state in own_states]
            neg, mean, softmax = launch.merged(states[0] if len(states) == 1 else torch.cat(states))
            rows_pos, w, rows_t = (part_of(x, rows) for x in (pos, weight, t))
            margin = neg - rows_pos
            u = only_weighted(slope_of(margin) * w, w)
            factor, scaled = launch_rows.scaled_rows(query, rows, u, softmax, rows_t)
            for c, index, keys, _ in chunk:
                if wanted[0]:
                    add_product(accumulators, 0, query, rows, c, keys.rows, plan.limit)
                if wanted[index]:
                    add_product(accumulators, index, keys, slice(0, len(keys)), c.T, scaled, plan.limit)
            found.append((only_weighted(loss_of(margin) * w, w), u, factor, mean, softmax))

        losses, slopes, factors, means, softmaxes = ([part[i] for part in found] for i in range(5))
        u, factor = joined(slopes, pos), joined(factors, pos)
        if own_states:  # what their negatives add to the queries' gradient has no such factor
            if 0 in accumulators:
                accumulators[0] *= factor[:, None]
            m, r = joined(softmaxes, pos.new_empty(2, 0), dim=1)
            work = replace(work, query=replace(query, shift=m.contiguous(), weight=u / t * r))
        dt = (u * (pos - joined(means, pos))) / t if wanted[-1] else None
        grads = finished(work, accumulators, -u, None, dtypes, None if own_states else factor)
        return OnePass(joined(losses, pos).sum(), grads, dt)


def joined(parts: list[Tensor], none: Tensor, dim: int = 0) -> Tensor:
    """Of chunks of rows; `none` where there are no rows."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else none


def only_weighted(values: Tensor, weight: Tensor) -> Tensor:
    """With 0, in place, for rows of weight 0, which count for nothing even where they are NaN."""
    of_all = weight.shape[0] == 1 < values.shape[0]  # then it is not 0
    return values if of_all else values.masked_fill_(weight == 0, 0)


def in_float16_range(work: Work) -> tuple[Work, Tensor | None]:
    """With the weights scaled by a power of two for float16; and what undoes the scaling."""
    query, key = work.query, work.key
    if query.rows.dtype != torch.float16 or not len(query):
        return work, None
    scale = float16_scale(query, [keys for _, keys, _ in work.segments])
    query, key = (replace(s, weight=None if s.weight is None else s.weight * scale) for s in (query, key))
    return replace(work, query=query, key=key), 1 / scale


def float16_scale(query: Side, segments: Sequence[Side]) -> Tensor:
    """The power of two that brings a bound on |C| to at most 2^FLOAT16_ROOM; p <= 1 in every coefficient."""

    def largest(side: Side, weight: Tensor | None = None) -> Tensor:
        """max |inverse weight|, either of which may be absent: 1."""
        values = one
        for factor in (launch_rows.without_zero_rows(side.inverse, side.zero_row), weight):
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
    accumulators: dict[int, Tensor] = {}
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
                    add_product(accumulators, 0, query, rows, c, keys.rows[cols], plan.limit)
                other = 0 if symmetric else index
                if wanted[other] and not (symmetric and cols.start == rows.start):
                    add_product(accumulators, other, keys, cols, c.T, query.rows[rows], plan.limit)
    return accumulators


def slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def aligned(cols: int, like: Tensor) -> int:
    """Long rows are made to start at multiples of 16 bytes, which library products want."""
    lane = 16 // like.element_size()
    return cols if cols < 16 * lane else -(-cols // lane) * lane


@cache
def adds_in_place(device: torch.device) -> bool:
    """Whether this PyTorch adds 16-bit products to float32 where it lies: asked by doing so, older ones refuse."""
    out, x = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(out, x, x, out_dtype=torch.float32, out=out)
    except RuntimeError:
        return False
    return True


def add_product(
    accumulators: dict[int, Tensor], index: int, side: Side, rows: slice, a: Tensor, b: Tensor, limit: int
) -> None:
    """accumulators[index], (1, n, D), += a @ b in some rows, accumulated in their dtype, from zeros at first.

    What a product cannot add in place takes a share of `limit`; a first product of all rows is the accumulator itself.
    """
    like, acc = side.rows, accumulator(side.rows.dtype)
    narrow = a.dtype != acc
    native = not narrow or (a.is_cuda and not torch.version.hip)  # a library product in the accumulator's dtype
    if index not in accumulators:
        if native and rows == slice(0, like.shape[0]):
            accumulators[index] = (torch.mm(a, b, out_dtype=acc) if narrow else torch.mm(a, b))[None]
            return
        accumulators[index] = like.new_zeros((1, *like.shape), dtype=acc)
    out = accumulators[index][0, rows]
    if not narrow:
        out.addmm_(a, b)
        return
    if adds_in_place(out.device):
        torch.addmm(out, a, b, out_dtype=acc, out=out)
        return
    most = max(limit // PRODUCT_SHARE // (out.element_size() * out.shape[1]), 1)
    for part in slices(len(out), most):
        if native:
            out[part].add_(torch.mm(a[part], b, out_dtype=acc))
        else:
            out[part].addmm_(a[part].to(acc), b.to(acc))


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
        grads[index] = launch_rows.own_gradient(
            accumulators.get(0), work.query, own, work.problem.normalize, unscale, dtypes[index], accumulate
        )
    return grads


def positive_partners(work: Work, v: Tensor, dtypes: Sequence[torch.dtype | None]) -> dict[int, Partners]:
    """index -> the positives of queries (0) and keys (1), with what weighs them: v_i / t_i a_i b_y."""
    query, key, target, t = work.query, work.key, work.target, work.problem.temperature
    n, m = len(query), len(key)
    if n == 0 or m == 0:
        return {}
    mutual = work.problem.self_similar and dtypes[KEY] is None  # its target's target is the row itself
    partners = {0: Partners(key.rows, key.inverse, v, t, target, mutual=mutual)}
    if target is None:
        partners[KEY] = Partners(query.rows, query.inverse, v, t)
    elif dtypes[KEY] is not None:  # queries by target, in their order: a sum over them never depends on timing
        sorted_target, order = torch.sort(target, stable=True)
        starts = torch.searchsorted(sorted_target, torch.arange(m + 1, device=v.device))
        partners[KEY] = Partners(query.rows, query.inverse, v, t, order, starts)
    return partners
