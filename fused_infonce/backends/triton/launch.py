"""One function per kernel that works on tiles: allocate what it returns, choose its tile, launch it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.gradient import coefficients_kernel, gradient_kernel
from ...kernels.statistics import merge_kernel, statistics_kernel
from ..contract import accumulator
from . import tiles

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an old triton
    TensorDescriptor = None

LOG2E = math.log2(math.e)
WAVES = 5  # of programs of a statistics pass over a device, whose parts of a row cost little: an estimate
MOST_PARTS = 64  # one program merges all parts of its rows, one after the other: an estimate
SoftmaxStatistics = tuple[Tensor, Tensor, Tensor]  # neg, mean and softmax of `Statistics`
INTERPRETED = not isinstance(statistics_kernel, triton.JITFunction)


@dataclass(eq=False)
class Side:
    """Rows of one side of a tile pass. Vectors are contiguous, one value a row, in the accumulator dtype."""

    rows: Tensor  # (n, D), the last dimension contiguous
    inverse: Tensor | None  # inverse norms or scales; None: 1
    ids: Tensor | None = None
    scale: Tensor | None = None  # log2(e) / t
    shift: Tensor | None = None  # m and, in the weight, r of `Statistics.softmax`
    weight: Tensor | None = None  # u r / t; None: this side's statistics have no gradient
    guide: Tensor | None = None  # (n, D'), the guide's rows, the last dimension contiguous
    guide_inverse: Tensor | None = None
    ceiling: Tensor | None = None  # of the guide's cosines, for queries
    zero_row: float = math.inf  # an inverse norm from which on a row counts as zero: its gradient is 0

    def __len__(self) -> int:
        return self.rows.shape[0]  # len of a tensor takes three times as long


class Excluded(NamedTuple):
    """Which pairs of queries and keys are no negatives, apart from equal ids."""

    target: Tensor | None = None  # (N,) indices of the queries' targets among the keys
    diagonal: bool = False  # query i and key i

    def arguments(self, x: Side, y: Side, of_x: bool = True) -> dict[str, Any]:
        """What a tile kernel is told; of_x: whether x are the queries."""
        x_ids, y_ids = id_pointers(x, y)
        target = 0 if self.target is None else 1 if of_x else 2
        return {"T_ptr": self.target, "XI_ptr": x_ids, "YI_ptr": y_ids, "TARGET": target, "DIAGONAL": self.diagonal}


def cdiv(a: int, b: int) -> int:
    """That of Triton takes microseconds outside of kernels."""
    return -(-a // b)


def contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def acc_of(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dot_of(x: Tensor) -> str:
    """How a tile of `x` is multiplied. The interpreter would multiply 16-bit floats wrongly."""
    if INTERPRETED and x.element_size() == 2:
        return "upcast"
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and not torch.version.hip else "ieee"


def vector(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=accumulator(like.dtype), device=like.device)


def run(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    if min(grid) > 0:
        kernel[grid](**arguments)


def id_pointers(x: Side, y: Any) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if x.ids is None or y.ids is None else (x.ids, y.ids)


def tile_of(kernel: str, x: Side, y: Side) -> tiles.Tile:
    tile = tiles.tile(tiles.architecture(x.rows.device), kernel, x.rows.dtype, x.rows.shape[1])
    return tiles.with_guide(tile) if guided(x, y) else tile


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for these rows: the limits of cuTensorMapEncodeTiled."""
    return (
        TensorDescriptor is not None
        and x.numel() > 0
        and x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
    )


def described(x: Tensor, *block: int) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def guided(x: Side, y: Side) -> bool:
    return x.guide is not None and y.guide is not None


def guide_arguments(x: Side, y: Side) -> dict[str, Any]:
    """What a tile kernel over queries x is told of a guide."""
    if x.guide is None or y.guide is None:
        return {"guide": None, "GUIDE": "", "BLOCK_G": 0}
    d, strides = x.guide.shape[1], (x.guide.stride(0), y.guide.stride(0))
    return {
        "guide": (x.guide, y.guide, x.guide_inverse, y.guide_inverse, x.ceiling, d, *strides),
        "GUIDE": dot_of(x.guide), "BLOCK_G": min(tiles.GUIDE_BLOCK, tiles.power_of_two(d)),
    }  # fmt: skip


def pair_arguments(tile: tiles.Tile, x: Side, y: Side) -> dict[str, Any]:
    """What every tile kernel is told of its two sides."""
    tma = tile.tma and describable(x.rows) and describable(y.rows)
    return {
        "X_ptr": described(x.rows, tile.block_m, tile.block_d) if tma else x.rows,
        "Y_ptr": described(y.rows, tile.block_n, tile.block_d) if tma else y.rows,
        "TMA": tma, "A_ptr": x.inverse, "B_ptr": y.inverse, "SX_ptr": x.scale, "SY_ptr": y.scale,
        "D": x.rows.shape[1], "stride_xm": x.rows.stride(0), "stride_yn": y.rows.stride(0),
        "ACC": acc_of(x.rows), "DOT": dot_of(x.rows), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def columns_per_program(
    row_blocks: int, columns: int, block_n: int, device: torch.device, most: int, waves: int = 1
) -> int:
    """Whole blocks of columns for one program, in at most `most` parts, so that all programs together fill the device.

    With `waves` so often, that what is left of the last one matters little; but not in more than MOST_PARTS then.
    """
    blocks, row_blocks, fill = cdiv(columns, block_n), max(row_blocks, 1), tiles.processors(device)
    parts = max(fill // row_blocks, min(cdiv((waves - 1) * fill, row_blocks), MOST_PARTS))
    return max(cdiv(blocks, max(min(parts, most, blocks), 1)), 1) * block_n


def softmax_statistics(like: Tensor) -> SoftmaxStatistics:
    """Of (N,) rows, to be filled."""
    return torch.empty_like(like), torch.empty_like(like), like.new_empty(2, like.shape[0])


def merge(states: Tensor, first: int, slots: int, into: SoftmaxStatistics | None = None) -> None:
    """Merges slots first to slots - 1 of (slots, 3, n) states, without `into` into slot 0."""
    size, block_m = states.shape[2], 256
    neg, mean, softmax = into or (None, None, None)
    run(
        merge_kernel, (cdiv(size, block_m),),
        S_ptr=states, NEG_ptr=neg, MEAN_ptr=mean, SOFTMAX_ptr=softmax, first=first, slots=slots, size=size,
        stride_s=0 if softmax is None else softmax.stride(0),
        ACC=acc_of(states), BLOCK_M=block_m,
    )  # fmt: skip


def merged(states: Tensor) -> SoftmaxStatistics:
    """Of all slots."""
    into = softmax_statistics(vector(states, states.shape[2]))
    merge(states, 0, states.shape[0], into)
    return into


def row_states(x: Side, y: Side, excluded: Excluded, columns: SoftmaxStatistics | None, limit: int) -> Tensor:
    """(slots, 3, N) states of the rows of x over y. `columns`: where those of y over x are written, merged.

    Row states take a slot for each part of the columns, as many as half of `limit` bytes hold; column states one for
    each block of rows, hence as many launches as keep them within the other half.
    """
    n, m = len(x), len(y)
    tile = tile_of("statistics" if columns is None else "columns", x, y)
    blocks = cdiv(n, tile.block_m)
    step, state = blocks, 3 * accumulator(x.rows.dtype).itemsize
    if columns is not None:
        step = max(1, min(blocks, limit // 2 // (state * max(m, 1)) - 1))
    split = columns_per_program(step, m, tile.block_n, x.rows.device, limit // 2 // (state * max(n, 1)), WAVES)
    states = x.rows.new_empty((cdiv(m, split), 3, n), dtype=accumulator(x.rows.dtype))
    slots = None if columns is None else states.new_empty((step + 1, 3, m))
    for start in range(0, blocks, max(step, 1)):
        count = min(step, blocks - start)
        run(
            statistics_kernel, (count, states.shape[0]),
            ROWS_ptr=states, COLUMNS_ptr=slots, row_start=start * tile.block_m, size_x=n, size_y=m, split=split,
            HOIST=x.rows.shape[1] <= tile.block_d, **pair_arguments(tile, x, y), **excluded.arguments(x, y),
            **guide_arguments(x, y),
        )  # fmt: skip
        if columns is not None and slots is not None:
            last = start + count == blocks
            merge(slots, 0 if start else 1, count + 1, columns if last else None)
    return states


def gradient_slots(x: Side, y: Side, widest: int, limit: int) -> int:
    """Into how many partial sums a streaming gradient is split, so that few rows too fill the device."""
    tile = tile_of("gradient", x, y)
    extra = limit // max(x.rows.numel() * accumulator(x.rows.dtype).itemsize, 1)
    split = columns_per_program(cdiv(len(x), tile.block_m), widest, tile.block_n, x.rows.device, 1 + extra)
    return max(1, cdiv(widest, split))


def add_streaming_gradient(g: Tensor, x: Side, y: Side, excluded: Excluded, of_x: bool, accumulate: bool) -> None:
    """g (slots, N, D) (+)= C y, summed over the slots; of_x: whether x are the queries."""
    tile = tile_of("gradient", x, y)
    split = cdiv(cdiv(len(y), tile.block_n), g.shape[0]) * tile.block_n
    run(
        gradient_kernel, (cdiv(len(x), tile.block_m), g.shape[0]),
        NX_ptr=x.shift, UX_ptr=x.weight, NY_ptr=y.shift, UY_ptr=y.weight, G_ptr=g, size_x=len(x), size_y=len(y),
        split=split, zero_row=x.zero_row, ACCUMULATE=accumulate, **pair_arguments(tile, x, y),
        **excluded.arguments(x, y, of_x),
    )  # fmt: skip


def write_coefficients(c: Tensor, x: Side, y: Side, rows: slice, cols: slice, excluded: Excluded) -> None:
    """c = C[rows, cols] in the dtype of c."""
    _coefficients(c, x, y, rows, cols, excluded, tile_of("coefficients", x, y), None)


def _coefficients(
    c: Tensor, x: Side, y: Side, rows: slice, cols: slice, excluded: Excluded, tile: tiles.Tile, states: Tensor | None
) -> None:
    run(
        coefficients_kernel, (cdiv(c.shape[0], tile.block_m) * cdiv(c.shape[1], tile.block_n),),
        NX_ptr=x.shift, UX_ptr=x.weight, NY_ptr=y.shift, UY_ptr=y.weight, C_ptr=c, ROWS_ptr=states,
        row_start=rows.start, row_end=rows.stop, col_start=cols.start, col_end=cols.stop, stride_cm=c.stride(0),
        zero_row=x.zero_row,
        **pair_arguments(tile, x, y), **excluded.arguments(x, y), **guide_arguments(x, y),
    )  # fmt: skip


def write_exponentials(c: Tensor, x: Side, y: Side, rows: slice, excluded: Excluded) -> Tensor:
    """c_ij = b_j exp(s_ij), unshifted, of some rows against all of y; and the rows' (1, 3, n) states."""
    tile = tile_of("coefficients", x, y)
    states = c.new_empty((cdiv(len(y), tile.block_n), 3, c.shape[0]), dtype=accumulator(c.dtype))
    _coefficients(c, x, y, rows, slice(0, len(y)), excluded, tile, states)
    return states.sum(0, keepdim=True)  # every maximum is 0
