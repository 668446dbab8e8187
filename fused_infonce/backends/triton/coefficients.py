"""Launchers of kernels/coefficients.py: blocks of coefficients or exponentials, as high and as wide as whole tiles."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.coefficients import coefficients_kernel, exponentials_kernel
from ..precision import accumulator
from .launch import Excluded, Side, cdiv, guide_arguments, pair_arguments, peels, run, tile_of
from .statistics import SLOTS

NAMES = ("exponentials", "coefficients", "coefficients_columns")  # of the kernels of this file in `tiles.TABLE`


def block_of(x: Side, y: Side, rows: int, cols: int) -> Tensor:
    """Return memory for blocks of up to that many rows and columns, in whole tiles of the kernels of this file."""
    every = [tile_of(name, x, y) for name in NAMES]
    height, width = max(tile.block_m for tile in every), max(tile.block_n for tile in every)
    return x.rows.new_empty((cdiv(rows, height) * height, cdiv(cols, width) * width))


def block_size(x: Side, y: Side, rows: int, cols: int) -> tuple[int, int]:
    """Return a block of at most that many rows and columns, of whole tiles, but of one tile at least."""
    tile = tile_of("coefficients", x, y)  # of which others are whole fractions
    height, width = tile.block_m, tile.block_n
    return (
        min(cdiv(len(x), height), max(rows // height, 1)) * height,
        min(cdiv(len(y), width), max(cols // width, 1)) * width,
    )


def write_coefficients(block: Tensor, x: Side, y: Side, rows: slice, cols: slice, excluded: Excluded) -> Tensor:
    """Return C[rows, cols], written into a block of `block_of`."""
    unshifted = x.shift is None and y.shift is None
    two = x.weight is not None and y.weight is not None and not unshifted  # exponentials an element
    _run(
        coefficients_kernel, "coefficients_columns" if two else "coefficients", block, x, y, rows, cols, excluded,
        NX_ptr=x.shift, UX_ptr=x.weight, NY_ptr=y.shift, UY_ptr=y.weight, UNSHIFTED=unshifted,
    )  # fmt: skip
    return block[: rows.stop - rows.start, : cols.stop - cols.start]


def write_exponentials(
    block: Tensor, x: Side, y: Side, rows: slice, excluded: Excluded, mean: bool
) -> tuple[Tensor, Tensor]:
    """Return b_j exp(s_ij), unshifted, of some rows against all of y, written into a block of `block_of`, and the rows'
    (1, SLOTS, n) states; mean: whether these have their third vector, else 0."""
    size, every = rows.stop - rows.start, slice(0, len(y))
    across = cdiv(len(y), tile_of("exponentials", x, y).block_n)
    states = block.new_empty((across, SLOTS, size), dtype=accumulator(block.dtype))
    _run(exponentials_kernel, "exponentials", block, x, y, rows, every, excluded, ROWS_ptr=states, MEAN=mean)
    return block[:size, : len(y)], states.sum(0, keepdim=True)  # every maximum is 0


def _run(
    kernel: Any, tile_name: str, block: Tensor, x: Side, y: Side, rows: slice, cols: slice, excluded: Excluded,
    **more: Any,
) -> None:  # fmt: skip
    """Launch a kernel over a block: at once, or apart over the tiles that need a mask, where these are few."""
    tile, size = tile_of(tile_name, x, y), cols.stop - cols.start
    few = excluded.diagonals * (cdiv(tile.block_m, tile.block_n) + 1) + 1  # which may meet a diagonal, and the last
    for name in peels(x, y, excluded, size, tile):
        columns = few if name == "on" else cdiv(size, tile.block_n)
        run(
            kernel, (cdiv(rows.stop - rows.start, tile.block_m) * columns,), C_ptr=block, PEEL=name,
            row_start=rows.start, row_end=rows.stop, col_start=cols.start, col_end=cols.stop,
            stride_cm=block.stride(0), zero_row=x.zero_row,
            **pair_arguments(tile, x, y, bounded=name == "off"), **excluded.arguments(x, y), **guide_arguments(x, y),
            **more,
        )  # fmt: skip
