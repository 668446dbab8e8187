"""Few scores, held all at once: the launchers of kernels/dense.py, by which a call takes as few launches as it can.

At such sizes a call on a GPU waits for its host. So kernels are called as they were compiled for the last call of the
same kind, with all of their arguments that are not tensors made then; and vectors share one allocation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.dense import (
    POS,
    VECTORS,
    dense_coefficients_kernel,
    dense_gradient_kernel,
    dense_rows_kernel,
    dense_scores_kernel,
)
from ..contract import EPS, LN2, LOG2E, OnePass, Problem
from ..plan import Plan
from . import tiles
from .launch import ALIGNED, INTERPRETED, acc_of, aligned, cdiv, contiguous_rows, dot_of, ids_a_row, padded_rows
from .statistics import SLOTS, merged
from .work import unshifted

FLOAT16_ROOM = 14.0  # as in backend.py
MOST_KINDS = 1024  # of calls, whose kernels are remembered
POSITIVES: int = POS.value


class Launch:
    """A kernel with all of its arguments but tensors, which come first, for calls that it is compiled alike for.

    Triton finds a compiled kernel by the types and alignments of all arguments, which takes it longer than to launch.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], *rest: Any, **options: int):
        self.kernel, self.grid, self.rest, self.options = kernel, grid, rest, options
        self.compiled: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        if self.compiled is not None:
            self.compiled(*tensors, *self.rest)
            return
        arguments = dict(zip(self.kernel.arg_names, (*tensors, *self.rest), strict=True))
        compiled = self.kernel[self.grid](**arguments, **self.options)
        if compiled is not None:  # as it is where kernels are interpreted
            self.compiled = compiled[self.grid]


class Kind(NamedTuple):
    """What calls have in common whose kernels are compiled alike."""

    vectors: int  # of the workspace
    across: int  # blocks of columns, of which a row has a state each
    width: int  # of a row of scores in memory
    rows: Launch
    scores: Launch
    coefficients: Launch
    gradient: Launch


KINDS: dict[tuple[Any, ...], Kind] = {}  # of this process's tile table: to be cleared where that changes


def onepass(problem: Problem, plan: Plan, loss: str, weight: Tensor | float, wanted: Sequence[bool]) -> OnePass:
    """Compute `Backend.onepass` of one set of keys, of which each is the target of one query."""
    x, y, t, target, scaled, key = call_of(problem)
    ids, key_ids = problem.query.ids, problem.keys[0].ids
    acc, gradients, temperature = t.dtype, True in wanted[:-1], wanted[-1]
    ids, key_ids = (None, None) if ids is None or key_ids is None else (ids.contiguous(), key_ids.contiguous())
    each, factor = (weight.contiguous(), 1.0) if isinstance(weight, Tensor) else (None, weight)
    if each is None and acc == torch.float64:  # a number given to a kernel is rounded to float32
        each, factor = t.new_full((1,), factor), 1.0
    key = (
        *key, loss, factor, None if each is None else each.shape[0], *wanted, plan.bounded, plan.full, plan.record,
        problem.columns, ids_a_row(ids, x), problem.offset is None,
    )  # fmt: skip
    kind = KINDS.get(key)
    if kind is None:
        kind = kind_of(problem, plan, loss, factor, each, ids_a_row(ids, x), wanted)
        if len(KINDS) == MOST_KINDS:
            KINDS.clear()
        KINDS[key] = kind
    n, width = x.shape[0], kind.width
    work = t.new_empty(kind.vectors * n)
    dots = c = None
    if gradients:
        dots = t.new_empty(n * width)
        c = dots if x.dtype == acc else x.new_empty(n * width)
    if scaled and not problem.normalize:
        given_scales(problem, work.view(-1, n))
    padded_x, padded_y = padded_rows(x), None if problem.self_similar else padded_rows(y)
    kind.rows(x, y, target, t, work, padded_x, padded_y)
    x = x if padded_x is None else padded_x
    y = x if problem.self_similar else y if padded_y is None else padded_y
    kind.scores(x, y, target, ids, key_ids, work, dots)
    offset = None if problem.offset is None else problem.offset.contiguous()
    of_offset = None if offset is None else torch.empty_like(offset)
    kind.coefficients(target, ids, key_ids, t, each, offset, work, dots, c, of_offset)
    grads = [x.new_empty(problem.query.rows.shape, dtype=acc) if want else None for want in wanted[:-1]]
    total, of_t = t.new_empty(()), torch.empty_like(t) if temperature else None
    kind.gradient(c, x, y, target, t, work, total, of_t, *grads)
    rows = rows_of(work, n, kind.across) if plan.record else []
    return OnePass(total, grads, of_t, offset=of_offset, rows=rows)


def rows_of(work: Tensor, n: int, across: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return pos, neg and mean of the rows, and of the columns where there are such, from the states in a workspace."""
    pos = work[POSITIVES * n : (POSITIVES + 1) * n].clone()
    states = work[VECTORS.value * n :].view(-1, SLOTS, n)
    return [merged(part, pos)[:3] for part in (states[:across], states[across:]) if len(part)]


def call_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, tuple[Any, ...]]:
    """Return the rows of queries and keys, the temperature and the targets as kernels read them, whether rows have
    norms or scales, and a key that holds all that Triton asks of these."""
    query, key, target, t = problem.query, problem.keys[0], problem.target, problem.temperature.as_given()
    x = contiguous_rows(query.rows)
    y = x if problem.self_similar else contiguous_rows(key.rows)
    target = None if target is None else target.contiguous()
    scaled, dtype = problem.normalize or query.scale is not None or key.scale is not None, x.dtype
    return x, y, t, target, scaled, (
        x.device, dtype, x.shape, x.stride(), y.stride(), x.data_ptr() % 16, y.data_ptr() % 16, t.numel(),
        target is None, problem.normalize, scaled,
        dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision,
    )  # fmt: skip


def given_scales(problem: Problem, work: Tensor) -> None:
    """Write the scales of queries and keys, with which autocast brings rows into float16's range, to a and b."""
    for place, keys in enumerate(problem.sets):
        if keys.scale is None:
            work[place].fill_(1.0)
        else:
            work[place].copy_(keys.scale)


def kind_of(
    problem: Problem,
    plan: Plan,
    loss: str,
    weight: float,
    each: Tensor | None,
    ids: int,
    wanted: Sequence[bool],
) -> Kind:
    """Return the launches of a kind of calls."""
    gradients, mean = True in wanted[:-1], wanted[-1] or plan.record
    x, y, t, target, scaled, _ = call_of(problem)
    (n, d), normalize, same, columns = x.shape, problem.normalize, problem.self_similar, problem.columns
    arch, acc, dot, half = tiles.architecture(x.device), acc_of(x), dot_of(x), x.dtype == torch.float16
    width = cdiv(n, 16) * 16  # elements of a row of scores in memory, so many that several are moved at once
    tile, whole = (tiles.tile(arch, name, x.dtype, d, dot == "tf32") for name in ("dense", "dense_gradient"))
    down, across = cdiv(n, tile.block_m), cdiv(n, tile.block_n)
    padded, stride_t = cdiv(d, ALIGNED) * ALIGNED, int(t.numel() > 1)  # components of rows that are read as copies
    given = x.stride(0), y.stride(0)
    strides = tuple(z.stride(0) if aligned(z) else padded for z in (x, y))
    stride_w = int(each is not None and len(each) > 1)
    pairs = (scaled, int(target is not None), target is None or same, ids, columns, same, unshifted(problem, plan))
    zero_row = 1 / EPS if normalize else math.inf
    block_m, block_d = tiles.row_tile(arch, d)
    return Kind(
        VECTORS.value + SLOTS * (across + down * columns), across, width,
        Launch(
            dense_rows_kernel, (cdiv(n, block_m), 1, 1), n, d, padded, *given, stride_t, EPS, 1 / EPS, LOG2E, normalize,
            scaled, same, acc, block_m, block_d,
        ),
        Launch(
            dense_scores_kernel, (down, across, 1), n, padded, *strides, width, *pairs, mean or not pairs[-1], acc,
            dot, tile.block_m, tile.block_n, tile.block_d, num_warps=tile.warps, num_stages=tile.stages,
        ),
        Launch(
            dense_coefficients_kernel, (down, across if gradients else 1, 1), n, width, stride_t, stride_w,
            weight / 2 if columns else weight, across, down, zero_row, LN2, LOG2E, FLOAT16_ROOM if half else None, loss,
            *pairs, acc, dot, tiles.power_of_two(across, 1), tiles.power_of_two(down, 1), tile.block_m, tile.block_n,
            num_warps=tile.warps,
        ),
        Launch(
            dense_gradient_kernel, (max(cdiv(n, whole.block_m), 1) if gradients else 1, 1 if same else 2, 1), n, d,
            padded, width, *strides, stride_t, zero_row, stride_t > 0, scaled, same, normalize, half,
            d <= whole.block_d, INTERPRETED, acc, dot, whole.block_m, whole.block_n, whole.block_d,
            num_warps=whole.warps, num_stages=whole.stages,
        ),
    )  # fmt: skip
