"""The launcher of kernels/gradient.py: gradients in registers."""

from __future__ import annotations

from torch import Tensor

from ...kernels.gradient import gradient_kernel
from ..precision import accumulator
from .launch import Excluded, Side, cdiv, columns_per_program, pair_arguments, run, tile_of


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
        split=split, zero_row=x.zero_row, UNSHIFTED=x.shift is None and y.shift is None,
        ACCUMULATE=accumulate,
        **pair_arguments(tile, x, y),
        **excluded.arguments(x, y, of_x),
    )  # fmt: skip
