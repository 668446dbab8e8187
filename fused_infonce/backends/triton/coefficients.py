"""Launchers of kernels/coefficients.py: blocks of coefficients, exponentials or sigmoids, of whole tiles each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.coefficients import coefficients_kernel, combine_kernel, exponentials_kernel
from ..contract import RowStatistics
from ..indexing import part_of
from ..precision import accumulator
from . import tiles
from .launch import (
    INTERPRETED,
    Excluded,
    Side,
    acc_of,
    cdiv,
    describable,
    guide_arguments,
    pair_arguments,
    peels,
    run,
    tile_of,
)
from .statistics import SLOTS

CODES = 2**15 - 2  # the integer that stands for a cosine of 1: below 2^15 - 1 whatever the cosine's rounding
# What the kernel of exponentials gets where it writes no scores, and for a loss that is no sum over pairs.
ALONE: dict[str, Any] = {"COLUMNS_ptr": None, "NY_ptr": None, "XC_ptr": None, "CODES": 0}
NO_PAIRS: dict[str, Any] = {"UX_ptr": None, "BIAS_ptr": None}
NO_COLUMNS: dict[str, Any] = dict.fromkeys(("SY_ptr", "NY_ptr", "UY_ptr", "RY_ptr"))  # of one direction's coefficients
NAMES = ("exponentials", "coefficients", "coefficients_columns")  # of the kernels of this file in `tiles.TABLE`
APART_WARPS = 4  # for which the compiler makes three times as many, four of them to load rows


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


def write_coefficients(
    block: Tensor, x: Side, y: Side, rows: slice, cols: slice, excluded: Excluded, x_biases: Tensor | None = None,
    y_biases: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return C[rows, cols], written into a block of `block_of`.

    x_biases, y_biases: the gradients of the biases of x and y, to which this block's part is added.
    """
    unshifted = x.shift is None and y.shift is None
    both = x.weight is not None and y.weight is not None
    name = "coefficients_columns" if both and not unshifted else "coefficients"
    tile, n, m = tile_of(name, x, y), rows.stop - rows.start, cols.stop - cols.start
    acc = accumulator(block.dtype)
    of_x = None if x_biases is None else block.new_empty((cdiv(m, tile.block_n), n), dtype=acc)
    of_y = None if y_biases is None else block.new_empty((cdiv(n, tile.block_m), m), dtype=acc)
    _run(
        coefficients_kernel, name, block, x, y, rows, cols, excluded, NX_ptr=x.shift, UX_ptr=x.weight, NY_ptr=y.shift,
        UY_ptr=y.weight, UNSHIFTED=unshifted, XC_ptr=x.bias, YC_ptr=y.bias, DX_ptr=of_x, DY_ptr=of_y,
        GX_ptr=None if of_y is None else x.share, GY_ptr=None if of_x is None else y.share,
        bounded=not both and x.bias is None and y.bias is None,
    )  # fmt: skip
    add_sums(x_biases, rows, of_x)
    add_sums(y_biases, cols, of_y)
    return block[: rows.stop - rows.start, : cols.stop - cols.start]


def add_sums(biases: Tensor | None, here: slice, parts: Tensor | None) -> None:
    """Add the sums of parts, (parts, n), to n of the gradients of biases, if there are any."""
    if biases is not None and parts is not None:
        biases[here] += parts.sum(0)


def write_exponentials(
    block: Tensor, x: Side, y: Side, rows: slice, excluded: Excluded, mean: bool
) -> tuple[Tensor, Tensor]:
    """Return b_j exp(s_ij) / RAISE of some rows against all of y, written into a block of `block_of`, and the rows'
    (1, SLOTS, n) states; mean: whether these have their third vector, else 0.

    Logits are less the rows' shifts where there are some, in base 2, and as they are, without biases, where not.
    """
    size, every = rows.stop - rows.start, slice(0, len(y))
    name = "exponentials" if x.shift is None else "coefficients"
    across = cdiv(len(y), tile_of(name, x, y).block_n)
    states = block.new_empty((across, SLOTS, size), dtype=accumulator(block.dtype))
    _run(
        exponentials_kernel, name, block, x, y, rows, every, excluded, ROWS_ptr=states, NX_ptr=x.shift,
        YC_ptr=y.bias, MEAN=mean, bounded=x.shift is None, **ALONE, **NO_PAIRS,
    )  # fmt: skip
    return block[:size, : len(y)], summed(states, x, rows)


def summed(states: Tensor, x: Side, rows: slice) -> Tensor:
    """Return the (1, SLOTS, n) states of rows of x from those of parts of them, whose maximum is the shift or 0."""
    total = states.sum(0, keepdim=True)
    if x.shift is not None:
        total[0, 0] = x.shift[rows]
    return total


def write_sigmoids(
    block: Tensor | None, x: Side, y: Side, rows: slice, cols: slice, excluded: Excluded, bias: Tensor, mean: bool
) -> Tensor:
    """Return the sums over y[cols] of softplus, sigmoid and, with `mean`, sigmoid times the logit in base 2 without its
    bias, (SLOTS, n) of some rows of x; C[rows, cols] is written into a block of `block_of`, if there is one."""
    across = cdiv(cols.stop - cols.start, tile_of("sigmoids", x, y).block_n)
    states = x.rows.new_empty((across, SLOTS, rows.stop - rows.start), dtype=accumulator(x.rows.dtype))
    _run(
        exponentials_kernel, "sigmoids", block, x, y, rows, cols, excluded, ROWS_ptr=states, UX_ptr=x.weight,
        BIAS_ptr=bias, NX_ptr=None, YC_ptr=None, MEAN=mean, bounded=False, **ALONE,
    )  # fmt: skip
    return states.sum(0)


def write_scores(
    block: Tensor, x: Side, y: Side, rows: slice, excluded: Excluded, mean: bool, columns: bool
) -> list[Tensor]:
    """Write the scores of some rows of x, cosines, against all of y into a block of `block_of`.

    Return the (1, SLOTS, n) states of the rows and, with `columns`, those of the columns, for which the rows are all.
    """
    tile, every = tile_of("coefficients", x, y), slice(0, len(y))
    sizes = [(rows.stop - rows.start, cdiv(len(y), tile.block_n))]
    sizes += [(len(y), cdiv(len(x), tile.block_m))] * columns
    states = [block.new_empty((across, SLOTS, n), dtype=accumulator(block.dtype)) for n, across in sizes]
    _run(
        exponentials_kernel, "coefficients", scores_of(block), x, y, rows, every, excluded, ROWS_ptr=states[0],
        COLUMNS_ptr=states[1] if columns else None, NX_ptr=x.shift, NY_ptr=y.shift if columns else None,
        XC_ptr=x.bias if columns else None, YC_ptr=y.bias, MEAN=mean, CODES=CODES, bounded=False, **NO_PAIRS,
    )  # fmt: skip
    return [summed(each, *side) for each, side in zip(states, ((x, rows), (y, every)), strict=False)]


def combine(
    block: Tensor, x: Side, y: Side, rows: slice, slopes: Sequence[Tensor], found: Sequence[RowStatistics],
    x_biases: Tensor | None = None, y_biases: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return C of some rows of x against all of y, in place of their scores in a block.

    slopes, found: of these rows and, for both directions, of the columns. x_biases, y_biases: as for
    `write_coefficients`.
    """
    n, m, width = rows.stop - rows.start, len(y), tile_of("coefficients", x, y).block_n
    written, shifts = cdiv(m, width) * width, x.shift is not None
    arch, acc = tiles.architecture(block.device), accumulator(block.dtype)
    a = None if x.inverse is None else part_of(x.inverse, rows)
    block_m, block_n, warps = tiles.block_tile(arch, sums=x_biases is not None or y_biases is not None)
    of_x = None if x_biases is None else block.new_empty((cdiv(written, block_n), n), dtype=acc)
    of_y = None if y_biases is None else block.new_empty((cdiv(n, block_m), m), dtype=acc)
    sides: dict[str, Any] = {}
    for name, side, here, u, each in zip("XY", (x, y), (rows, slice(0, m)), slopes, found, strict=False):
        sides |= {f"S{name}_ptr": part_of(side.scale, here), f"N{name}_ptr": each.maximum if shifts else None}
        sides |= {f"U{name}_ptr": u, f"R{name}_ptr": each.scale}
    both = len(slopes) > 1
    run(
        combine_kernel, (cdiv(n, block_m) * cdiv(written, block_n),),
        S_ptr=scores_of(block), C_ptr=block, A_ptr=a, B_ptr=y.inverse,
        XC_ptr=x.bias if both else None, YC_ptr=y.bias, DX_ptr=of_x, DY_ptr=of_y,
        size_x=n, size_y=m, columns=written, stride_cm=block.stride(0), zero_row=x.zero_row, CODES=CODES,
        EMULATE=INTERPRETED, ACC=acc_of(block), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
        **{**NO_COLUMNS, **sides},
    )  # fmt: skip
    add_sums(x_biases, rows, of_x)
    add_sums(y_biases, slice(0, m), of_y)
    return block[:n, :m]


def scores_of(block: Tensor) -> Tensor:
    """Return the memory of a block as that of scores."""
    return block.view(torch.int16) if block.itemsize == 2 else block


def _run(
    kernel: Any, tile_name: str, block: Tensor | None, x: Side, y: Side, rows: slice, cols: slice, excluded: Excluded,
    bounded: bool, **more: Any,
) -> None:  # fmt: skip
    """Launch a kernel over a block: at once, or apart over the tiles that need a mask, where these are few.

    bounded: with the tile's bound on registers, where it has one, for tiles without a mask.
    """
    tile, size = tile_of(tile_name, x, y), cols.stop - cols.start
    few = excluded.diagonals * (cdiv(tile.block_m, tile.block_n) + 1) + 1  # which may meet a diagonal, and the last
    for name in peels(x, y, excluded, size, tile):
        columns = few if name == "on" else cdiv(size, tile.block_n)
        apart = tile.apart and name != "on" and describable(x.rows) and describable(y.rows)
        sides = pair_arguments(tile, x, y, bounded=bounded and name == "off" and not apart)
        if apart:
            sides["num_warps"] = APART_WARPS
        run(
            kernel, (cdiv(rows.stop - rows.start, tile.block_m) * columns,), C_ptr=block, PEEL=name,
            row_start=rows.start, row_end=rows.stop, col_start=cols.start, col_end=cols.stop,
            stride_cm=0 if block is None else block.stride(0), zero_row=x.zero_row, APART=apart, **sides,
            **excluded.arguments(x, y), **guide_arguments(x, y), **more,
        )  # fmt: skip
