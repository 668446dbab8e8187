"""Launchers of kernels/statistics.py: softmax states of rows and columns, and their merging."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...kernels.statistics import STATE_SLOTS, merge_kernel, statistics_kernel
from ..contract import LN2, RowStatistics
from ..precision import accumulator
from .launch import (
    Excluded,
    Side,
    acc_of,
    cdiv,
    columns_per_program,
    guide_arguments,
    pair_arguments,
    peels,
    run,
    tile_of,
)

MERGED = 16, 64  # slots and rows that a program merges at a time: an estimate
WAVES = 5  # of programs of a statistics pass over a device, whose parts of a row cost little: an estimate
SLOTS: int = STATE_SLOTS.value


def unwritten(pos: Tensor, size: int | None = None) -> RowStatistics:
    """Return statistics of rows with these positives whose other vectors are still to be written, as many or `size`."""
    return RowStatistics(pos, *(pos.new_empty(len(pos) if size is None else size) for _ in RowStatistics._fields[1:]))


class Behind(NamedTuple):
    """Slots 1 to `own` of some states: of columns, what is behind the own rows of blocks `start`, ... of `height`."""

    own: int = 0
    start: int = 0
    height: int = 0


def merge(
    states: Tensor, first: int, slots: int, into: RowStatistics | None = None, behind: Behind | None = None
) -> None:
    """Merge slots first to slots - 1 of (slots, SLOTS, n) states into statistics, or without `into` into slot 0."""
    own, start, height = behind or Behind()
    size, (block_s, block_m) = states.shape[2], MERGED
    _, neg, mean, maximum, scale = into or [None] * len(RowStatistics._fields)
    run(
        merge_kernel, (cdiv(size, block_m),),
        S_ptr=states, NEG_ptr=neg, MEAN_ptr=mean, MAXIMUM_ptr=maximum, SCALE_ptr=scale, first=first, slots=slots,
        own=own, start=start, size=size, ln2=LN2, HALF=height, ACC=acc_of(states), BLOCK_S=block_s, BLOCK_M=block_m,
    )  # fmt: skip


def merged(states: Tensor, pos: Tensor) -> RowStatistics:
    """Return the statistics of rows with these positives from all slots of their states."""
    into = unwritten(pos)
    merge(states, 0, states.shape[0], into)
    return into


def row_states(
    x: Side, y: Side, excluded: Excluded, columns: RowStatistics | None, limit: int, unshifted: bool, mean: bool,
    half: bool = False,
) -> Tensor:  # fmt: skip
    """Return the (slots, SLOTS, N) states of the rows of x over y.

    columns: the statistics that those of y over x are merged into.
    half: x and y are the same rows, and so are their statistics: a score above the diagonal serves its row and its
        column, whose states are merged into `columns` with those of the rows.
    unshifted, mean: of a plan and a problem; see the kernel.

    Row states take a slot for each part of the columns, as many as half of `limit` bytes hold; column states one for
    each block of rows, hence as many launches as keep them within the other half.
    """
    n, m = len(x), len(y)
    tile = tile_of("statistics" if columns is None else "both" if unshifted else "columns", x, y)
    if half:  # a block's own rows are whole tiles of columns
        tile = tile._replace(block_n=min(tile.block_m, tile.block_n))
    blocks, across = cdiv(n, tile.block_m), cdiv(m, tile.block_n)
    step, state = blocks, SLOTS * accumulator(x.rows.dtype).itemsize
    if columns is not None:
        step = max(1, min(blocks, limit // 2 // (state * max(m, 1)) - 1))
    most = limit // 2 // (state * max(n, 1))
    names = peels(x, y, excluded, m, tile)
    if most <= 1 and "on" in names:  # which would take a slot
        names = ("",)
    peel = "on" in names
    busy = cdiv(step, 2) if half else step  # about half of the programs are left of the diagonal
    split = columns_per_program(busy, m, tile.block_n, x.rows.device, most - peel, WAVES) // tile.block_n
    parts = cdiv(across, split)
    states = x.rows.new_empty((half * (step + 1) + parts + peel, SLOTS, n), dtype=accumulator(x.rows.dtype))
    slots = None if columns is None else states if half else states.new_empty((step + 1, SLOTS, m))
    states = states[half * (step + 1) :]
    if slots is not None and not blocks:
        merge(slots, 0, 0, columns)  # of columns that meet no row
    for start in range(0, blocks, max(step, 1)):
        count = min(step, blocks - start)
        for name in names:
            alone = name == "on"  # over all columns, into the last slot
            run(
                statistics_kernel, (count, 1 if alone else parts),
                ROWS_ptr=states, COLUMNS_ptr=slots, XC_ptr=x.bias, YC_ptr=y.bias, row_start=start * tile.block_m,
                size_x=n, size_y=m,
                split=across if alone else split, slot=parts if alone else 0, HALF=half, PEEL=name, UNSHIFTED=unshifted,
                MEAN=mean or not unshifted, HOIST=x.rows.shape[1] <= tile.block_d,
                TURNED=tile.turned and name == "off",
                **pair_arguments(tile, x, y, bounded=name == "off"), **excluded.arguments(x, y),
                **guide_arguments(x, y),
            )  # fmt: skip
        if columns is not None and slots is not None:
            last = start + count == blocks
            behind = Behind(step, start, tile.block_m) if half else None
            end = len(slots) if half and last else count + 1
            merge(slots, 0 if start else 1, end, columns if last else None, behind)
    return states
