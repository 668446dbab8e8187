"""The two sides of a tile pass, and the arguments that launchers give to all kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.statistics import statistics_kernel
from ..contract import LOG2E
from ..precision import accumulator
from . import tiles

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an old triton
    TensorDescriptor = None

ALIGNED = 16  # elements and bytes: multiples of it are all that Triton knows of integers and of pointers
PEELED = 8  # blocks of columns from which on tiles that need a mask have a launch of their own: an estimate
MOST_PARTS = 64  # a program merges all parts of its rows: an estimate
INTERPRETED = not isinstance(statistics_kernel, triton.JITFunction)


@dataclass(eq=False)
class Side:
    """The rows of one side of a tile pass. Vectors are contiguous, one value a row, in the accumulator dtype."""

    rows: Tensor  # (n, D or with zeros after them a multiple of ALIGNED), the last dimension contiguous
    inverse: Tensor | None  # inverse norms or scales; None: 1
    ids: Tensor | None = None
    scale: Tensor | None = None  # log2(e) / t
    shift: Tensor | None = None  # what is subtracted from logits: of statistics their maximum; None: 0
    weight: Tensor | None = None  # u r / t; None: this side's statistics have no gradient
    guide: Tensor | None = None  # (n, D'), the guide's rows, likewise
    guide_inverse: Tensor | None = None
    ceiling: Tensor | None = None  # of the guide's cosines, for queries
    bias: Tensor | None = None  # of these rows where they are scored, in base 2; None: 0
    zero_row: float = math.inf  # an inverse norm from which on a row counts as zero: its gradient is 0

    @property
    def share(self) -> Tensor | None:
        """Return u r, of which the gradients of biases are sums."""
        return None if self.weight is None or self.scale is None else self.weight / self.scale * LOG2E

    def __len__(self) -> int:
        return self.rows.shape[0]  # len of a tensor takes three times as long


class Excluded(NamedTuple):
    """The pairs of queries and keys that are no negatives, apart from equal ids."""

    target: Tensor | None = None  # (N,) indices of the queries' targets among the keys
    diagonal: bool = False  # query i and key i
    shift: int | None = None  # query i and keys i + shift and i - shift

    @property
    def diagonals(self) -> int:
        """Return how many diagonals of pairs there may be."""
        return 0 if not self.diagonal else 1 if self.shift is None else 3

    def arguments(self, x: Side, y: Side, of_x: bool = True) -> dict[str, Any]:
        """Return the arguments of a tile kernel; of_x: whether x are the queries."""
        x_ids, y_ids = id_pointers(x, y)
        target = 0 if self.target is None else 1 if of_x else 2
        ids = {"XI_ptr": x_ids, "YI_ptr": y_ids, "IDS": ids_a_row(x_ids, x.rows)}
        pairs = {"TARGET_ptr": self.target, "TARGET": target, "DIAGONAL": self.diagonal, "shift": self.shift}
        return ids | pairs


def cdiv(a: int, b: int) -> int:
    """Return the quotient rounded up. Triton's own takes microseconds outside of kernels."""
    return -(-a // b)


def contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def in_base_2(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias * LOG2E


def contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(x: Tensor) -> bool:
    """Return whether rows are read several elements at a time.

    A 16-bit element is too small to be copied asynchronously, which costs registers, as does an address for each.
    """
    return x.shape[1] % ALIGNED == 0 and x.stride(0) % ALIGNED == 0 and x.data_ptr() % ALIGNED == 0


def padded_rows(x: Tensor) -> Tensor | None:
    """Return memory for rows that are not aligned, and zeros after them; else None."""
    if aligned(x):
        return None
    return torch.empty((x.shape[0], cdiv(x.shape[1], ALIGNED) * ALIGNED), dtype=x.dtype, device=x.device)


def acc_of(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dot_of(x: Tensor) -> str:
    """Return how a tile of `x` is multiplied. The interpreter would multiply 16-bit floats wrongly."""
    if INTERPRETED and x.element_size() == 2:
        return "upcast"
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and not torch.version.hip else "ieee"


def vector(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=accumulator(like.dtype), device=like.device)


def run(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    if min(grid) > 0:
        if arguments.get("APART"):  # descriptors that a kernel makes lie in memory that Triton asks for
            triton.set_allocator(_scratch)
        kernel[grid](**arguments)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def id_pointers(x: Side, y: Any) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if x.ids is None or y.ids is None else (x.ids, y.ids)


def ids_a_row(ids: Tensor | None, rows: Tensor) -> int:
    """Return how many ids each of these rows has."""
    return 0 if ids is None else ids.shape[-1] if ids.dim() == rows.dim() else 1


def tile_of(kernel: str, x: Side, y: Side) -> tiles.Tile:
    arch, rows = tiles.architecture(x.rows.device), x.rows
    tile = tiles.tile(arch, kernel, rows.dtype, rows.shape[1], dot_of(rows) == "tf32")
    return tiles.with_guide(tile) if guided(x, y) else tile


def describable(x: Tensor) -> bool:
    """Return whether a tensor descriptor can stand for these rows: the limits of cuTensorMapEncodeTiled."""
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
    """Return the arguments that describe a guide to a tile kernel over queries x."""
    if x.guide is None or y.guide is None:
        return {"guide": None, "GUIDE": "", "BLOCK_G": 0}
    d, strides = x.guide.shape[1], (x.guide.stride(0), y.guide.stride(0))
    return {
        "guide": (x.guide, y.guide, x.guide_inverse, y.guide_inverse, x.ceiling, d, *strides),
        "GUIDE": dot_of(x.guide), "BLOCK_G": min(tiles.GUIDE_BLOCK, tiles.power_of_two(d)),
    }  # fmt: skip


def peels(x: Side, y: Side, excluded: Excluded, columns: int, tile: tiles.Tile) -> tuple[str, ...]:
    """Return the launches that make all tiles, as PEEL of the kernels names them: few that need a mask have their own.

    columns: of y that are seen, whose last tile needs a mask unless it is whole. No tile may meet two diagonals.
    """
    if excluded.target is not None or (x.ids is not None and y.ids is not None) or guided(x, y):
        return ("",)
    if not excluded.diagonal and columns % tile.block_n == 0:
        return ("off",)
    apart = excluded.shift is None or excluded.shift >= tile.block_m + tile.block_n
    few = cdiv(columns, tile.block_n) >= PEELED * max(excluded.diagonals, 1)
    return ("off", "on") if apart and few else ("",)


def pair_arguments(tile: tiles.Tile, x: Side, y: Side, bounded: bool = False) -> dict[str, Any]:
    """Return the arguments that describe the two sides to every tile kernel; bounded: with the tile's registers."""
    tma = tile.tma and describable(x.rows) and describable(y.rows)
    return {
        "X_ptr": described(x.rows, tile.block_m, tile.block_d) if tma else x.rows,
        "Y_ptr": described(y.rows, tile.block_n, tile.block_d) if tma else y.rows,
        "TMA": tma, "A_ptr": x.inverse, "B_ptr": y.inverse, "SX_ptr": x.scale, "SY_ptr": y.scale,
        "D": x.rows.shape[1], "stride_xm": x.rows.stride(0), "stride_yn": y.rows.stride(0),
        "ACC": acc_of(x.rows), "DOT": dot_of(x.rows), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d, "num_warps": tile.warps, "num_stages": tile.stages,
        **({"maxnreg": tile.registers} if bounded and tile.registers else {}),
    }  # fmt: skip


def columns_per_program(
    row_blocks: int, columns: int, block_n: int, device: torch.device, most: int, waves: int = 1
) -> int:
    """Return how many columns one program takes, so that all programs together fill the device.

    These are whole blocks, in at most `most` parts. With `waves` the device is filled so often that what is left of the
    last time matters little, in at most MOST_PARTS parts then.
    """
    blocks, row_blocks, fill = cdiv(columns, block_n), max(row_blocks, 1), tiles.processors(device)
    parts = max(fill // row_blocks, min(cdiv((waves - 1) * fill, row_blocks), MOST_PARTS))
    return max(cdiv(blocks, max(min(parts, most, blocks), 1)), 1) * block_n


def temperature_arguments(temperature: Tensor | None) -> dict[str, Any]:
    """Return the arguments that describe a temperature, (1,) for all rows or (N,), to a kernel."""
    return {"TEMPERATURE_ptr": temperature, "stride_t": 0 if temperature is None or temperature.shape[0] == 1 else 1}
