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
    LOGITS,
    LOSS_OF_ROW,
    VECTORS,
    dense_coefficients_kernel,
    dense_gradient_kernel,
    dense_rows_kernel,
    dense_scores_kernel,
)
from ..contract import EPS, LN2, LOG2E, OnePass, Problem
from ..plan import Plan
from . import tiles
from .launch import INTERPRETED, acc_of, cdiv, contiguous_rows, dot_of
from .statistics import SLOTS
from .work import unshifted

FLOAT16_ROOM = 14.0  # as in backend.py
MOST_KINDS = 1024  # of calls, whose kernels are remembered
LOSSES: int = LOSS_OF_ROW.value
LOGITS_OF_ROWS: int = LOGITS.value


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


class Forward(NamedTuple):
    """What calls have in common whose kernels are compiled alike."""

    vectors: int  # of the workspace
    width: int  # of a row of scores in memory
    rows: Launch
    scores: Launch
    coefficients: Launch


_FORWARDS: dict[tuple[Any, ...], Forward] = {}
_GRADIENTS: dict[tuple[Any, ...], Launch] = {}


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
        *key, loss, factor, None if each is None else each.shape[0], gradients, temperature, plan.bounded, plan.full,
        problem.columns, ids is None,
    )  # fmt: skip
    forward = _FORWARDS.get(key)
    if forward is None:
        forward = forward_of(problem, plan, loss, factor, each, gradients, temperature)
        remember(_FORWARDS, key, forward)
    n, width = x.shape[0], forward.width
    work = t.new_empty(forward.vectors * n)
    dots = c = None
    kept: tuple[Tensor, ...] = ()
    if gradients:
        dots = t.new_empty(n * width)
        if x.dtype == acc:
            c, kept = dots, (work, dots)
        else:
            of_acc = t.new_empty(n * width * x.itemsize // acc.itemsize)
            c, kept = of_acc.view(x.dtype), (work, of_acc)
    if scaled and not problem.normalize:
        given_scales(problem, work.view(-1, n))
    forward.rows(x, y, target, t, work)
    forward.scores(x, y, target, ids, key_ids, work, dots)
    forward.coefficients(target, ids, key_ids, t, each, work, dots, c)
    logits = work[LOGITS_OF_ROWS * n : (LOGITS_OF_ROWS + 1) * n] if temperature else None
    return OnePass(work[LOSSES * n : (LOSSES + 1) * n].sum(), [None] * (len(wanted) - 1), logits, kept)


def remember(kinds: dict[tuple[Any, ...], Any], key: tuple[Any, ...], kind: Any) -> None:
    """Remember what calls of a kind have in common, in place of all others where these are many."""
    if len(kinds) == MOST_KINDS:
        kinds.clear()
    kinds[key] = kind


def call_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, tuple[Any, ...]]:
    """Return the rows of queries and keys, the temperature and the targets as kernels read them, whether rows have
    norms or scales, and a key that holds all that Triton asks of these."""
    query, key, target, t = problem.query, problem.keys[0], problem.target, problem.temperature.values
    x = contiguous_rows(query.rows)
    y = x if problem.self_similar else contiguous_rows(key.rows)
    target = None if target is None else target.contiguous()
    scaled, dtype = problem.normalize or query.scale is not None or key.scale is not None, x.dtype
    return x, y, t, target, scaled, (
        x.device, tiles.architecture(x.device), dtype, x.shape, x.stride(), y.stride(), x.data_ptr() % 16,
        y.data_ptr() % 16, t.shape[0], target is None, problem.normalize, scaled,
        dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision,
    )  # fmt: skip


def given_scales(problem: Problem, work: Tensor) -> None:
    """Write the scales of queries and keys, with which autocast brings rows into float16's range, to a and b."""
    for place, keys in enumerate(problem.sets):
        if keys.scale is None:
            work[place].fill_(1.0)
        else:
            work[place].copy_(keys.scale)


def forward_of(
    problem: Problem, plan: Plan, loss: str, weight: float, each: Tensor | None, gradients: bool, temperature: bool
) -> Forward:
    """Return the launches of the forward of a kind of calls."""
    x, y, t, target, scaled, _ = call_of(problem)
    (n, d), normalize, same, columns = x.shape, problem.normalize, problem.self_similar, problem.columns
    arch, acc, dot = tiles.architecture(x.device), acc_of(x), dot_of(x)
    tile = tile_of(x)
    down, across = blocks(x, tile)
    width = aligned(n)
    one_exponential = unshifted(problem, plan)
    strides, stride_t, stride_w = (
        (x.stride(0), y.stride(0)),
        int(t.shape[0] > 1),
        int(each is not None and len(each) > 1),
    )
    excluded = (int(target is not None), target is None or same)
    room = FLOAT16_ROOM if x.dtype == torch.float16 else None
    block_m, block_d = tiles.row_tile(arch, d)
    return Forward(
        vectors_of(problem), width,
        Launch(
            dense_rows_kernel, (cdiv(n, block_m), 1, 1), n, d, *strides, stride_t, EPS, 1 / EPS, LOG2E, normalize,
            scaled, same, acc, block_m, block_d,
        ),
        Launch(
            dense_scores_kernel, (down, across, 1), n, d, *strides, width, scaled, *excluded, columns, same,
            one_exponential, temperature or not one_exponential, acc, dot, tile.block_m, tile.block_n, tile.block_d,
            num_warps=tile.warps, num_stages=tile.stages,
        ),
        Launch(
            dense_coefficients_kernel, (down, across if gradients else 1, 1), n, width, stride_t, stride_w,
            weight / 2 if columns else weight, across, down, 1 / EPS if normalize else math.inf, LN2, LOG2E, room, loss,
            scaled, *excluded, columns, same, one_exponential, acc, dot, tiles.power_of_two(across, 1),
            tiles.power_of_two(down, 1), tile.block_m, tile.block_n, num_warps=tile.warps,
        ),
    )  # fmt: skip


def kept_sizes(problem: Problem) -> list[int]:
    """Return the sizes of what `onepass` keeps for a backward: vectors, and coefficients in the products' dtype."""
    x = problem.query.rows
    n = x.shape[0]
    return [vectors_of(problem) * n, n * aligned(n) * x.dtype.itemsize // problem.acc_dtype.itemsize]


def vectors_of(problem: Problem) -> int:
    """Return the number of vectors of the workspace."""
    down, across = blocks(problem.query.rows, tile_of(problem.query.rows))
    return VECTORS.value + SLOTS * (across + down * problem.columns)


def tile_of(x: Tensor) -> tiles.Tile:
    return tiles.tile(tiles.architecture(x.device), "dense", x.dtype, int(x.shape[1]))  # which may be symbolic


def blocks(x: Tensor, tile: tiles.Tile) -> tuple[int, int]:
    """Return the blocks of rows and of columns."""
    return cdiv(x.shape[0], tile.block_m), cdiv(x.shape[0], tile.block_n)


def finished(
    problem: Problem, kept: Sequence[Tensor], upstream: Tensor, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """Compute `Backend.finished`."""
    x, y, t, target, _, key = call_of(problem)
    work, c = kept
    key = (*key, *dtypes)
    launch = _GRADIENTS.get(key)
    if launch is None:
        launch = gradient_of(problem)
        remember(_GRADIENTS, key, launch)
    grads = [None if dtype is None else like(x, dtype) for dtype in dtypes]
    sums = [g if g is None or g.dtype == t.dtype else like(x, t.dtype) for g in grads]
    launch(c if x.dtype == t.dtype else c.view(x.dtype), x, y, target, t, work, upstream, *sums, *grads)
    return grads


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def gradient_of(problem: Problem) -> Launch:
    """Return the launch of the backward of a kind of calls."""
    x, y, t, _, scaled, _ = call_of(problem)
    (n, d), normalize, same = x.shape, problem.normalize, problem.self_similar
    tile = tiles.tile(tiles.architecture(x.device), "dense_gradient", x.dtype, d)
    return Launch(
        dense_gradient_kernel, (cdiv(n, tile.block_m), 1 if same else 2, 1), n, d, aligned(n), x.stride(0),
        y.stride(0), int(t.shape[0] > 1), 1 / EPS if normalize else math.inf,
        scaled, same, normalize, x.dtype == torch.float16, d <= tile.block_d,
        INTERPRETED, acc_of(x), dot_of(x), tile.block_m, tile.block_n, tile.block_d, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def aligned(n: int) -> int:
    """Return the elements of a row of scores in memory, so many that several are moved at once."""
    return cdiv(n, 16) * 16
