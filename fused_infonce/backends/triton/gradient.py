"""Launchers of kernels/gradient.py: gradients in registers, and blocks of coefficients or exponentials."""

from __future__ import annotations

from torch import Tensor

from ...kernels.gradient import coefficients_kernel, gradient_kernel
from ..precision import accumulator
from . import tiles
from .launch import Excluded, Side, cdiv, columns_per_program, guide_arguments, pair_arguments, run, tile_of
from .statistics import SLOTS


def gradient_slots(x: Side, y: Side, widest: int, limit: int) -> int:
    """Return how many partial sums a streaming gradient is split into, so that few rows too fill the device."""
    tile = tile_of("gradient", x, y)
    extra = limit // max(x.rows.numel() * accumulator(x.rows.dtype).itemsize, 1)
    split = columns_per_program(cdiv(len(x), tile.block_m), widest, tile.block_n, x.rows.device, 1 + extra)
    return max(1, cdiv(widest, split))


def add_streaming_gradient(g: Tensor, x: Side, y: Side, excluded: Excluded, of_x: bool, accumulate: bool) -> None:
    """Write or add C y to g (slots, N, D), whose sum over the slots counts; of_x: whether x are the queries."""
    tile = tile_of("gradient", x, y)
    split = cdiv(cdiv(len(y), tile.block_n), g.shape[0]) * tile.block_n
    run(
        gradient_kernel, (cdiv(len(x), tile.block_m), g.shape[0]),
        NX_ptr=x.shift, UX_ptr=x.weight, NY_ptr=y.shift, UY_ptr=y.weight, G_ptr=g, size_x=len(x), size_y=len(y),
        split=split, zero_row=x.zero_row, ACCUMULATE=accumulate, **pair_arguments(tile, x, y),
        **excluded.arguments(x, y, of_x),
    )  # fmt: skip


def write_coefficients(c: Tensor, x: Side, y: Side, rows: slice, cols: slice, excluded: Excluded) -> None:
    """Write C[rows, cols] into c, in its dtype."""
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
    """Write b_j exp(s_ij), unshifted, of some rows against all of y into c; return the rows' (1, SLOTS, n) states."""
    tile = tile_of("coefficients", x, y)
    states = c.new_empty((cdiv(len(y), tile.block_n), SLOTS, c.shape[0]), dtype=accumulator(c.dtype))
    _coefficients(c, x, y, rows, slice(0, len(y)), excluded, tile, states)
    return states.sum(0, keepdim=True)  # every maximum is 0
