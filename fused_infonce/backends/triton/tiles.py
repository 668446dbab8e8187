"""The tile that a kernel uses: a fixed table by architecture, kernel, dtype and row length."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch

INTERPRETER = "interpreter"


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    tma: bool = False  # rows through tensor descriptors: not yet measured
    registers: int | None = None  # a bound on a thread's registers, so that two programs fit a processor; None: none
    turned: bool = False  # of both directions: the product is transposed, so that rows' sums wait for a program's end
    apart: bool = False  # of coefficients and exponentials: warps of their own load rows: not yet measured


# arch -> kernel -> dtype class -> rows of (up to this D, tile); None: any D.
# "statistics" holds whole rows of x where D <= block_d; "gradient" always does, and its block_d is only a minimum.
# "columns" are statistics of both directions, "both" those that one exponential serves, and "coefficients_columns"
# coefficients of two exponentials; "sigmoids" make three sums, whose registers a wider tile lacks, and "profile"
# three on every rung. "dense" is small, so that few rows fill a device. A bound on registers is for tiles without masks
# and biases, of "coefficients" for those of one direction. `turned` is for tiles without masks, and takes 30 to 90
# registers more: shorter rows would have one program of a processor where they have two, or spill.
Rows = tuple[tuple[int | None, Tile], ...]
TABLE: dict[str, dict[str, dict[str, Rows]]] = {
    INTERPRETER: {
        "statistics": {"half": ((None, Tile(32, 32, 32, 4, 1)),)},
        "both": {"half": ((None, Tile(32, 32, 32, 4, 1, turned=True)),)},
        "columns": {"half": ((None, Tile(32, 32, 32, 4, 1)),)},
        "gradient": {"half": ((None, Tile(32, 32, 16, 4, 1)),)},
        "coefficients": {"half": ((None, Tile(32, 32, 32, 4, 1)),)},
        "profile": {"half": ((None, Tile(32, 32, 32, 4, 1)),)},
        "dense": {"half": ((None, Tile(32, 32, 32, 4, 1)),)},
        "dense_gradient": {"half": ((None, Tile(32, 32, 32, 4, 1)),)},
    },
    "sm_80": {
        "statistics": {
            "half": ((128, Tile(128, 128, 128, 8, 2)), (None, Tile(128, 128, 64, 8, 3))),
            "tf32": ((None, Tile(128, 128, 32, 8, 3)),),
            "single": ((None, Tile(64, 64, 32, 8, 2)),),
            "double": ((None, Tile(32, 32, 32, 4, 2)),),
        },
        "columns": {
            "half": ((128, Tile(128, 64, 128, 8, 2)), (None, Tile(128, 64, 64, 8, 3))),
            "tf32": ((None, Tile(128, 64, 32, 8, 3)),),
            "single": ((None, Tile(64, 64, 32, 8, 2)),),
            "double": ((None, Tile(32, 32, 32, 4, 2)),),
        },
        "gradient": {
            "half": ((128, Tile(128, 64, 16, 8, 2)), (256, Tile(64, 64, 16, 8, 2)), (512, Tile(64, 32, 16, 8, 2))),
            "tf32": ((128, Tile(64, 64, 16, 8, 2)), (256, Tile(32, 32, 16, 8, 2)), (512, Tile(32, 16, 16, 8, 1))),
            "single": ((128, Tile(32, 32, 16, 8, 2)), (512, Tile(32, 16, 16, 8, 1))),
            "double": ((128, Tile(32, 16, 16, 8, 1)), (256, Tile(16, 16, 16, 8, 1))),
        },
        "coefficients": {
            "half": ((None, Tile(128, 128, 64, 8, 3)),),
            "tf32": ((None, Tile(128, 128, 32, 8, 3)),),
            "single": ((None, Tile(64, 64, 32, 8, 2)),),
            "double": ((None, Tile(32, 32, 32, 4, 2)),),
        },
        "sigmoids": {
            "half": ((None, Tile(128, 64, 64, 8, 3)),),
            "tf32": ((None, Tile(128, 64, 32, 8, 3)),),
            "single": ((None, Tile(64, 64, 32, 8, 2)),),
            "double": ((None, Tile(32, 32, 32, 4, 2)),),
        },
        "profile": {
            "half": ((None, Tile(64, 64, 64, 8, 3)),),
            "tf32": ((None, Tile(64, 64, 32, 8, 3)),),
            "single": ((None, Tile(64, 64, 32, 8, 2)),),
            "double": ((None, Tile(32, 32, 32, 4, 2)),),
        },
        "dense": {
            "half": ((None, Tile(64, 128, 64, 8, 3)),),
            "tf32": ((None, Tile(64, 128, 32, 8, 3)),),
            "single": ((None, Tile(64, 64, 32, 8, 2)),),
            "double": ((None, Tile(32, 32, 32, 4, 2)),),
        },
        "dense_gradient": {
            "half": ((None, Tile(64, 64, 128, 8, 3)),),
            "tf32": ((None, Tile(16, 64, 128, 4, 2)),),
            "single": ((None, Tile(32, 32, 64, 8, 2)),),
            "double": ((None, Tile(16, 32, 32, 4, 2)),),
        },
    },
    "sm_86": {
        "statistics": {"half": ((128, Tile(128, 128, 128, 8, 2)), (None, Tile(128, 128, 64, 8, 2)))},
        "gradient": {
            "half": ((128, Tile(128, 64, 16, 8, 2)), (256, Tile(64, 64, 16, 8, 2)), (512, Tile(32, 32, 16, 8, 2))),
            "tf32": ((128, Tile(64, 64, 16, 8, 2)), (256, Tile(32, 32, 16, 8, 2)), (512, Tile(16, 16, 16, 8, 1))),
            "single": ((128, Tile(32, 32, 16, 8, 2)), (256, Tile(32, 16, 16, 8, 1)), (512, Tile(16, 16, 16, 8, 1))),
        },
    },
    "sm_90": {
        "statistics": {
            "half": (
                (128, Tile(128, 128, 128, 8, 2)),
                (256, Tile(128, 128, 256, 8, 2)),
                (None, Tile(128, 128, 64, 8, 3)),
            ),
        },
        "columns": {
            "half": ((128, Tile(128, 64, 128, 8, 2)), (256, Tile(128, 64, 256, 8, 2)), (None, Tile(128, 64, 64, 8, 3))),
        },
        "both": {
            "half": (
                (128, Tile(128, 128, 128, 8, 2)),
                (256, Tile(128, 128, 256, 8, 2)),
                (None, Tile(128, 128, 64, 8, 3, turned=True)),
            ),
        },
        "gradient": {
            "half": ((64, Tile(128, 128, 16, 8, 2)), (256, Tile(128, 64, 16, 8, 2)), (512, Tile(64, 64, 16, 8, 2))),
        },
        "coefficients": {"half": ((None, Tile(128, 128, 64, 8, 3, registers=128)),)},
        "exponentials": {"half": ((None, Tile(128, 128, 64, 8, 3, registers=128)),)},
        "coefficients_columns": {
            "half": ((None, Tile(128, 64, 64, 8, 3)),),
            "tf32": ((None, Tile(128, 64, 32, 8, 3)),),
        },
        "sigmoids": {"half": ((None, Tile(128, 64, 64, 8, 3)),), "tf32": ((None, Tile(128, 64, 32, 8, 3)),)},
    },
    "sm_100": {
        "statistics": {
            "half": ((128, Tile(128, 64, 128, 8, 3)), (256, Tile(128, 64, 256, 8, 3)), (None, Tile(128, 64, 64, 8, 3))),
            "tf32": ((None, Tile(128, 64, 32, 8, 3)),),
        },
        "columns": {"half": ((128, Tile(128, 64, 128, 8, 3)), (None, Tile(128, 64, 64, 8, 3)))},
        "gradient": {
            "half": ((256, Tile(128, 64, 16, 8, 2)), (512, Tile(64, 32, 16, 8, 2))),
            "tf32": ((128, Tile(64, 64, 16, 8, 2)), (256, Tile(64, 32, 16, 8, 2)), (512, Tile(32, 32, 16, 8, 1))),
        },
        "coefficients": {
            "half": ((None, Tile(128, 64, 64, 8, 3)),),
            "tf32": ((None, Tile(128, 64, 32, 8, 3)),),
            "single": ((None, Tile(64, 64, 32, 4, 2)),),
        },
        "exponentials": {"half": ((None, Tile(128, 128, 64, 8, 3)),)},
        "sigmoids": {"single": ((None, Tile(64, 64, 32, 8, 2)),)},
        "both": {
            "half": ((128, Tile(128, 64, 128, 8, 3)), (256, Tile(128, 64, 256, 8, 3)), (None, Tile(128, 64, 64, 8, 3))),
        },
    },
    "gfx942": {
        "statistics": {"half": ((None, Tile(128, 64, 64, 8, 2)),)},
        "columns": {"half": ((None, Tile(128, 64, 64, 8, 2)),)},
        "gradient": {
            "half": ((256, Tile(64, 64, 16, 4, 1)), (512, Tile(32, 32, 16, 4, 1))),
            "single": ((128, Tile(32, 32, 16, 4, 1)), (256, Tile(16, 32, 16, 4, 1)), (512, Tile(16, 16, 16, 4, 1))),
            "double": ((256, Tile(16, 16, 16, 4, 1)),),
        },
        "coefficients": {"half": ((None, Tile(128, 128, 64, 8, 2)),)},
    },
}
# Where an architecture has no entry for a kernel, a dtype class or a row length, its parent's is taken. Only the
# interpreter has entries of one dtype class, "half", for all. "tf32" is of float32 rows that tensor cores multiply.
PARENT = {"sm_86": "sm_80", "sm_90": "sm_80", "sm_100": "sm_90", "gfx942": "sm_80"}
# The kernel whose entry is taken where an architecture has none for another.
INSTEAD = {
    "exponentials": "coefficients", "coefficients_columns": "coefficients", "sigmoids": "coefficients",
    "both": "columns",
}  # fmt: skip
CAPABILITIES = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
CLASSES = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "single", torch.float64: "double"}


# The dtype classes whose tiles can be loaded through tensor descriptors, by architecture. Among these the environment's
# FUSED_INFONCE_TMA=0 or 1 overrules what TABLE says. On GPUs float32 is left out, because its gradient, which has no
# tensor cores, would spill 3 to 8 KB a thread on sm_90, and float64, because Triton does not test such descriptors.
HAS_TMA = {INTERPRETER: tuple(CLASSES.values()), "sm_90": ("half",), "sm_100": ("half",)}


def forced_tma() -> bool | None:
    setting = os.environ.get("FUSED_INFONCE_TMA")
    if setting not in (None, "0", "1"):
        raise ValueError(f"FUSED_INFONCE_TMA must be 0 or 1, got {setting!r}")
    return None if setting is None else setting == "1"


FORCE_TMA = forced_tma()


# A streaming gradient keeps whole rows of accumulators in registers: up to this length.
STREAMING_MAX_D = {torch.float16: 512, torch.bfloat16: 512, torch.float32: 512, torch.float64: 256}


@cache
def architecture(device: torch.device) -> str:
    """Return the row of TABLE for a device. An unknown GPU takes the row with the least shared memory."""
    if device.type == "cpu":
        return INTERPRETER
    if torch.version.hip:
        return "gfx942"
    return CAPABILITIES.get(torch.cuda.get_device_capability(device), "sm_86")


@cache
def processors(device: torch.device) -> int:
    """Return how many programs it takes to fill a device."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(d: int, least: int = 16) -> int:
    return max(least, 1 << max(d - 1, 0).bit_length())


def tile(arch: str, kernel: str, dtype: torch.dtype, d: int, tf32: bool = False) -> Tile:
    """Return the tile of a kernel over rows of length d; a "gradient" tile holds whole rows."""
    where: str | None = arch
    has_tma = CLASSES[dtype] in HAS_TMA.get(arch, ())
    kind = "tf32" if tf32 else CLASSES[dtype]
    while where:
        of_arch = TABLE.get(where, {})
        classes = of_arch.get(kernel) or of_arch.get(INSTEAD.get(kernel, ""), {})
        rows = classes.get(kind) or (classes["half"] if where == INTERPRETER else ())
        for longest, entry in rows:
            if longest is None or d <= longest:
                lanes = power_of_two(d)
                return entry._replace(
                    block_d=lanes if kernel == "gradient" else min(entry.block_d, lanes),
                    tma=has_tma and not entry.apart and (entry.tma if FORCE_TMA is None else FORCE_TMA),
                    apart=has_tma and entry.apart,
                )
        where = PARENT.get(where)
    raise ValueError(f"no tile for {kernel} over {dtype} rows of length {d} on {arch}")


# Every kernel reads a guide's rows this many components at a time, so that all get the same sums to the last bit and
# leave out the same negatives.
GUIDE_BLOCK = 64


def with_guide(tile: Tile) -> Tile:
    """Return a smaller tile, because a guide's dot products need registers of their own.

    How much smaller is an estimate, which has not been measured yet.
    """
    most_m, most_n = (tile.block_m, 64) if tile.block_m > 64 else (32, 32)
    block_m, block_n = min(tile.block_m, most_m), min(tile.block_n, most_n)
    return tile._replace(block_m=block_m, block_n=block_n, warps=max(tile.warps, 8), tma=False, apart=False)


def row_tile(arch: str, d: int) -> tuple[int, int]:
    """Return (rows, columns) of a block for kernels that read rows one by one."""
    block_d = min(power_of_two(d), 1024)
    return (4096 if arch == INTERPRETER else 1024) // block_d, block_d


def block_tile(arch: str, sums: bool = False) -> tuple[int, int, int]:
    """Return (rows, columns, warps) of a tile of a pass over a block of scores, which memory alone bounds.

    sums: whether a tile leaves a sum for each of its columns: more rows keep these below what the states took.
    """
    return (64, 256, 4) if arch == INTERPRETER else (32, 256, 8) if sums else (16, 256, 4)


def finish_tile(arch: str, d: int, gather: bool) -> tuple[int, int, int, int]:
    """Return (rows, columns, partners, sums of partners) of a block; `gather`: rows have any number of partners."""
    block_m, block_d = row_tile(arch, d)
    if gather:
        block_m = 16 if arch == INTERPRETER else 1
    return block_m, block_d, min(2048 // block_d, 16), min(4096 // block_d, 8)


def parts_tile(arch: str, d: int) -> tuple[int, int]:
    """Return (partners, columns) of a block whose rows are summed."""
    block_d = min(power_of_two(d), 256)
    return (64 if arch == INTERPRETER else min(4096 // block_d, 64)), block_d


def paired_tile(arch: str, h: int, d: int) -> tuple[int, int, int]:
    """Return (rows, negatives, columns) of a block of paired keys (N, H, D)."""
    block_h, block_d = min(power_of_two(h, least=1), 16), min(power_of_two(d), 256)
    elements = 1 << 16 if arch == INTERPRETER else 1 << 12
    return min(elements // (block_h * block_d), 64), block_h, block_d
