"""Tuning of tile sizes: candidates around those of `backends/triton/tiles.py` are timed on a GPU, and rows proposed.

    python -m benchmarks.tiles.tune --kernel exponentials coefficients --dim 768 256   what most calls launch: the first
    python -m benchmarks.tiles.tune [--kernel gradient ...] [--dtype bfloat16 ...] [--dim 128 ...] [--record tune.csv]
    python -m benchmarks.tiles.tune --list [--arch sm_90]                              the candidates, without a GPU

The defaults, half a minute for each workload and width, end within about 15 minutes. "exponentials" are what the kernel
"coefficients" writes before the rows' statistics are known; they share its rows of the table, not its registers.

A candidate takes its place in the table and runs through the launchers as any call would. Its result must be that of
the table's tile, but for rounding. It differs from that tile in two fields at most, loads through tensor descriptors
not counted: on sm_90 these are 30 to 80 of up to 270. The nearest come first, so that a run out of time has tried them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import record
from fused_infonce.backends.triton import tiles
from fused_infonce.backends.triton.tiles import Tile

WORKLOADS = {  # what is timed -> the kernel whose rows of the table it uses
    "statistics": "statistics",
    "columns": "columns",
    "gradient": "gradient",
    "coefficients": "coefficients",
    "exponentials": "coefficients",
}
FIELDS_CHANGED = 2  # at most, by a candidate
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # what a program may use
WARPS = (4, 8)
MOST_STAGES = 5
LARGEST = 256  # side of a tile
GAIN = 0.98  # of the default's time: a smaller gain does not change the table
BOUNDS = {"half": 2e-3, "single": 1e-5, "double": 1e-12}  # of a candidate's result against the default's
FIELDS = (
    *("date", "commit", "device", "driver", "torch", "triton", "arch", "kernel", "dtype", "n", "d", "tile", "default"),
    *("outcome", "error", "median_ms", "default_ms"),
)
Run = Callable[[], tuple[Tensor, ...]]


def candidates(arch: str, kernel: str, dtype: torch.dtype, d: int) -> list[Tile]:
    """The table's tile and those that differ from it in few fields, the nearest first."""
    default = tiles.tile(arch, kernel, dtype, d)
    lanes = tiles.power_of_two(d)
    choices: dict[str, list[Any]] = {name: [value] for name, value in default._asdict().items()}
    for name in ("block_m", "block_n", "block_d"):
        if name != "block_d" or kernel != "gradient":  # which holds whole rows
            here = choices[name][0]
            choices[name] = [size for size in (here, here // 2, here * 2) if 16 <= size <= LARGEST]
    choices["block_d"] = [size for size in choices["block_d"] if size <= lanes] or [lanes]
    choices["warps"] += [warps for warps in WARPS if warps != default.warps]
    choices["stages"] += [s for s in (default.stages - 1, default.stages + 1) if 1 <= s <= MOST_STAGES]
    for name, value in default._asdict().items():
        if isinstance(value, bool):  # such as loads through tensor descriptors
            choices[name] = [value, not value]
    found = [Tile(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]
    found = [t for t in found if changed(t._replace(tma=default.tma), default) <= FIELDS_CHANGED]
    found = [t for t in found if t == default or (fits(t, arch, kernel, dtype, d) and takes(t, arch, kernel, dtype, d))]
    return sorted(found, key=lambda t: changed(t, default))


def changed(tile: Tile, default: Tile) -> int:
    """The number of fields in which a tile differs from the default."""
    return sum(a != b for a, b in zip(tile, default, strict=True))


def fits(tile: Tile, arch: str, kernel: str, dtype: torch.dtype, d: int) -> bool:
    """Return whether the tiles loaded ahead can fit the shared memory; only a compiler knows for sure."""
    whole = kernel == "gradient" or (kernel in ("statistics", "columns") and d <= tile.block_d)
    rows = tile.block_m + tile.stages * tile.block_n if whole else tile.stages * (tile.block_m + tile.block_n)
    return rows * tile.block_d * dtype.itemsize <= SHARED_KIB.get(arch, 1 << 20) * 1024


def takes(tile: Tile, arch: str, kernel: str, dtype: torch.dtype, d: int) -> bool:
    """Return whether the table hands such a row out as it is, on this architecture."""
    with instead(tile, arch, kernel, dtype):
        return tiles.tile(arch, kernel, dtype, d) == tile


@contextlib.contextmanager
def instead(tile: Tile, arch: str, kernel: str, dtype: torch.dtype) -> Iterator[None]:
    """The table with this tile for every row length."""
    of_arch = tiles.TABLE.get(arch, {})
    row = {**of_arch.get(kernel, {}), tiles.CLASSES[dtype]: ((None, tile),)}
    with mock.patch.dict(tiles.TABLE, {arch: {**of_arch, kernel: row}}):
        yield


def workload(name: str, dtype: torch.dtype, n: int, d: int, device: torch.device) -> Run:
    """A function that launches one of WORKLOADS as `info_nce` of (n, d) rows does, and returns what is compared."""
    from fused_infonce.backends.contract import LOG2E
    from fused_infonce.backends.triton.coefficients import block_of, write_coefficients, write_exponentials
    from fused_infonce.backends.triton.gradient import add_streaming_gradient
    from fused_infonce.backends.triton.launch import Excluded, Side
    from fused_infonce.backends.triton.statistics import merged, row_states, unwritten

    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(2, n, d, device=device, generator=generator).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.full((n,), LOG2E / 0.1, dtype=acc, device=device)  # exp(1 / 0.1) is a float16 number
    inverse = [1 / x.to(acc).norm(dim=1) for x in rows]
    x, y = (Side(r, a, scale=scale) for r, a in zip(rows, inverse, strict=True))
    excluded, limit = Excluded(diagonal=True), 256 * 2**20
    if name in ("statistics", "columns"):
        columns = None if name == "statistics" else unwritten(scale)
        y = y if columns else Side(y.rows, y.inverse)
        return lambda: (row_states(x, y, excluded, columns, limit, unshifted=True, mean=False), *(columns or ())[1:])
    some = slice(0, min(n, 4096))
    if name == "exponentials":
        y = Side(y.rows, y.inverse)
        return lambda: write_exponentials(block_of(x, y, some.stop, n), x, y, some, excluded, mean=False)
    y = Side(y.rows, y.inverse)
    found = merged(row_states(x, y, excluded, None, limit, unshifted=True, mean=False), scale)
    x = Side(x.rows, x.inverse, None, scale, None, found.scale * scale / n)
    if name == "gradient":
        g = torch.empty((1, n, d), dtype=acc, device=device)

        def gradient() -> tuple[Tensor, ...]:
            add_streaming_gradient(g, x, y, excluded, True, False)
            return (g,)

        return gradient

    def coefficients() -> tuple[Tensor, ...]:
        return (write_coefficients(block_of(x, y, some.stop, n), x, y, some, slice(0, n), excluded),)

    return coefficients


def result(name: str, run: Run) -> list[Tensor]:
    """The results that do not depend on the tile: the states of slots are merged first."""
    from fused_infonce.backends.triton.statistics import merged

    first, *rest = run()
    found = merged(first, first[0, 0])[1:] if name in ("statistics", "columns") else (first,)
    return [x.detach().clone() for x in (*found, *rest)]


def error_of(found: list[Tensor], want: list[Tensor]) -> float:
    """The largest Frobenius-relative error."""
    errors = [
        torch.linalg.vector_norm(a.double() - b.double()) / b.double().norm() for a, b in zip(found, want, strict=True)
    ]
    return max(error.item() for error in errors)


def measure(run: Run) -> float:
    """The median time of a function in milliseconds."""
    from triton.testing import do_bench

    return do_bench(run, warmup=10, rep=50, return_mode="median")


def tune(
    arch: str, name: str, dtype: torch.dtype, n: int, d: int, device: torch.device, until: float,
    timer: Callable[[Run], float] = measure,
) -> list[dict[str, Any]]:  # fmt: skip
    """Records of the candidates, the table's tile first; those that there is no time for are left out."""
    kernel, run = WORKLOADS[name], workload(name, dtype, n, d, device)
    chosen = candidates(arch, kernel, dtype, d)
    want, default_ms = result(name, run), timer(run)
    about = {
        "arch": arch,
        "kernel": name,
        "dtype": str(dtype).split(".")[1],
        "n": n,
        "d": d,
        "default_ms": default_ms,
    }
    records = [{**about, "tile": chosen[0], "default": True, "outcome": "ok", "error": 0.0, "median_ms": default_ms}]
    for tile in tqdm(chosen[1:], desc=f"{name} {about['dtype']} D={d}", leave=False):
        if time.monotonic() > until:
            tqdm.write(f"{name}, D = {d}: out of time after {len(records)} of {len(chosen)} candidates")
            break
        found = {**about, "tile": tile, "default": False, "outcome": "ok", "error": "", "median_ms": ""}
        with instead(tile, arch, kernel, dtype):
            try:
                found["error"] = error_of(result(name, run), want)
                if found["error"] <= BOUNDS[tiles.CLASSES[dtype]]:
                    found["median_ms"] = timer(run)
                else:
                    found["outcome"] = "wrong"
            except Exception as error:  # whatever the compiler or the driver raises: shared memory, registers
                found["outcome"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        records.append(found)
    return records


def best(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest, or the table's tile where none is faster by a margin."""
    default = records[0]
    timed = [found for found in records if found["outcome"] == "ok"]
    fastest = min(timed, key=lambda found: found["median_ms"])
    return fastest if fastest["median_ms"] <= GAIN * default["median_ms"] else default


def pasted(found: dict[int, Tile], kernel: str) -> str:
    """Rows of one dtype class as `tiles.TABLE` has them; the last width stands for all above, except for gradients."""
    rows: list[tuple[int | None, Tile]] = []
    for d, tile in sorted(found.items()):
        if kernel == "gradient":
            tile = tile._replace(block_d=16)
        if rows and rows[-1][1] == tile:
            rows.pop()
        rows.append((d, tile))
    if kernel != "gradient":
        rows[-1] = (None, rows[-1][1])
    return "(" + ", ".join(f"({d}, {written(tile)})" for d, tile in rows) + ",)"


def written(tile: Tile) -> str:
    """Return a row as the table has it, with defaults left out."""
    optional = {name for name in tile._fields if tile._asdict()[name] == Tile._field_defaults.get(name, object())}
    values = [f"{n}={v}" if isinstance(v, bool) else str(v) for n, v in tile._asdict().items() if n not in optional]
    return f"Tile({', '.join(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--dtype", nargs="+", choices=["bfloat16", "float16", "float32", "float64"], default=["bfloat16"]
    )
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128, 256, 512, 768])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--minutes", type=float, default=0.5, help="at most, for each workload, dtype and width")
    parser.add_argument("--record", help="append every figure to this CSV file, absolute or relative to benchmarks/")
    parser.add_argument("--list", action="store_true", help="print the candidates and time nothing")
    parser.add_argument("--arch", choices=sorted(SHARED_KIB), help="with --list; else it is the GPU's")
    args = parser.parse_args()
    if not args.list and not torch.cuda.is_available():
        parser.exit(2, "tuning needs a GPU and torch sees none; --list prints the candidates without one\n")
    device = torch.device("cuda")
    arch = (
        args.arch if args.list and args.arch else tiles.architecture(device) if torch.cuda.is_available() else "sm_90"
    )
    if args.arch and args.arch != arch:
        parser.error(f"this GPU's rows are those of {arch}, not of {args.arch}")
    for name, dtype in itertools.product(args.kernel, [getattr(torch, dtype) for dtype in args.dtype]):
        kernel, found, about = WORKLOADS[name], {}, f"{name} {str(dtype).split('.')[1]}"
        for d in [d for d in args.dim if kernel != "gradient" or d <= tiles.STREAMING_MAX_D[dtype]]:
            if args.list:
                listed = candidates(arch, kernel, dtype, d)
                print(f"{arch} {about} D = {d}: {len(listed)} candidates, the first is the table's")
                print("\n".join(f"    {written(tile)}" for tile in listed))
                continue
            records = tune(arch, name, dtype, args.rows, d, device, time.monotonic() + 60 * args.minutes)
            winner = best(records)
            found[d] = winner["tile"]
            speed = winner["default_ms"] / winner["median_ms"]
            tqdm.write(f"{about} D = {d}: {written(winner['tile'])}, {speed:.2f} times as fast as the table's")
            if args.record:
                rows = [{**record.provenance(device), **r, "tile": written(r["tile"])} for r in records]
                record.append(args.record, rows, FIELDS)
        if found:
            row = f'"{arch}": {{"{kernel}": {{"{tiles.CLASSES[dtype]}": {pasted(found, kernel)}}}}},'
            print(f"{row}  # by {name}")


if __name__ == "__main__":
    main()
