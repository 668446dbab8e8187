"""Tuning of tile sizes: candidates around those of `backends/triton/tiles.py` are timed on a GPU, and rows proposed.

    python -m benchmarks.tiles.tune --kernel exponentials coefficients --dim 768 256   what most calls launch: the first
    python -m benchmarks.tiles.tune [--kernel gradient ...] [--dtype bfloat16 ...] [--dim 128 ...] [--record tune.csv]
    python -m benchmarks.tiles.tune --list [--arch sm_90]                              the candidates, without a GPU
    TRITON_INTERPRET=1 python -m benchmarks.tiles.tune --stand-in                      a few of them on a CPU, no times

For up to half of the minutes as many processes as there are processors compile candidates, those first that are nearest
to the table's; in the other half those that have compiled are timed, each workload and width in an equal share.

A candidate takes its place in the table and runs through the launchers as any call would. Its result must be that of
the table's tile, but for rounding. It differs from that tile in two fields at most, loads through tensor descriptors
not counted: on sm_90 these are 60 to 110. The nearest come first, so that a run out of time has tried them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import record
from benchmarks.contest import alive
from benchmarks.tiles.ahead import Machine, compile_all, said, target
from fused_infonce.backends.precision import EXPONENT_ROOM
from fused_infonce.backends.triton import launch, tiles
from fused_infonce.backends.triton.tiles import Tile

# Kernels of the table, of which each is launched as a call launches it; those of most calls come first.
WORKLOADS = ("exponentials", "coefficients", "statistics", "both", "gradient", "columns")
FIELDS_CHANGED = 2  # at most, by a candidate
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # what a program may use
WARPS = (4, 8)
MOST_STAGES = 5
MADE_APART = ("exponentials", "coefficients", "coefficients_columns")  # whose rows warps of their own can load
BOUND = 128  # registers of a thread, with which two programs of 8 warps fit a processor
LARGEST = 256  # side of a tile
GAIN = 0.98  # of the default's time: a smaller gain does not change the table
BOUNDS = {"half": 2e-3, "single": 1e-5, "double": 1e-12}  # of a candidate's result against the default's
FIELDS = (
    *("date", "commit", "device", "driver", "torch", "triton", "arch", "kernel", "dtype", "n", "d", "tile", "default"),
    *("outcome", "error", "median_ms", "default_ms"),
)
COMPILING = 0.5  # of the minutes, at most
CPU = torch.device("cpu")
Run = Callable[[], tuple[Tensor, ...]]


class Job(NamedTuple):
    """One of WORKLOADS for rows of a dtype and a width, whose candidates are compared."""

    kernel: str
    dtype: torch.dtype
    d: int

    def __str__(self) -> str:
        return f"{self.kernel} {str(self.dtype).split('.')[1]} D = {self.d}"


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
    choices["registers"] += [None if default.registers else BOUND]
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
    """Return whether a kernel takes such a tile, and the rows loaded ahead can fit the shared memory, as far as is
    known without a compiler."""
    if tile.apart and (tile.tma or tile.registers or kernel not in MADE_APART):
        return False
    if tile.turned and kernel != "both":
        return False
    whole = kernel == "gradient" or (kernel in ("statistics", "both", "columns") and d <= tile.block_d)
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
    scale = torch.full((n,), LOG2E / 0.1, dtype=acc, device=device)
    inverse = [1 / x.to(acc).norm(dim=1) for x in rows]
    x, y = (Side(r, a, scale=scale) for r, a in zip(rows, inverse, strict=True))
    excluded, limit = Excluded(diagonal=True), 256 * 2**20
    if name in ("statistics", "both", "columns"):
        columns, plain = None if name == "statistics" else unwritten(scale), name != "columns"
        y = y if columns else Side(y.rows, y.inverse)
        return lambda: (row_states(x, y, excluded, columns, limit, plain, mean=not plain), *(columns or ())[1:])
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
    found = merged(first, first[0, 0])[1:] if name in ("statistics", "both", "columns") else (first,)
    return [x.detach().clone() for x in (*found, *rest)]


def error_of(found: list[Tensor], want: list[Tensor]) -> float:
    """The largest Frobenius-relative error."""
    errors = [
        torch.linalg.vector_norm(a.double() - b.double()) / b.double().norm() for a, b in zip(found, want, strict=True)
    ]
    return max(error.item() for error in errors)


def launched(job: Job, arch: str, n: int, tile: Tile) -> None:
    """Launch a workload of n rows with a tile, on CPU tensors."""
    with instead(tile, arch, job.kernel, job.dtype):
        workload(job.kernel, job.dtype, n, job.d, CPU)()


def compile_candidates(jobs: list[Job], machine: Machine, n: int, until: float) -> dict[tuple[Job, Tile], str]:
    """Outcomes of compiling, the nearest candidates of all jobs first; those that there is no time for are absent."""
    every = [(i, job, t) for job in jobs for i, t in enumerate(candidates(machine.arch, job.kernel, job.dtype, job.d))]
    nearest = [found[1:] for found in sorted(every, key=lambda found: found[0])]
    return compile_all([((job, t), partial(launched, job, machine.arch, n, t)) for job, t in nearest], machine, until)


def measure(run: Run) -> float:
    """The median time of a function in milliseconds."""
    from triton.testing import do_bench

    return do_bench(run, warmup=10, rep=50, return_mode="median")


def tune(
    arch: str, name: str, dtype: torch.dtype, n: int, d: int, device: torch.device, until: float,
    timer: Callable[[Run], float] = measure, compiled: Mapping[Tile, str] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Records of the candidates, the table's tile first; those that there is no time for are left out.

    Args:
        compiled: outcomes of compiling; if given, candidates that are not among them are left out too.
    """
    run = workload(name, dtype, n, d, device)
    chosen = candidates(arch, name, dtype, d)
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
    others = [tile for tile in chosen[1:] if compiled is None or tile in compiled]
    for tile in tqdm(others, desc=f"{name} {about['dtype']} D={d}", leave=False):
        if time.monotonic() > until:
            tqdm.write(f"{name}, D = {d}: out of time after {len(records)} of {len(chosen)} candidates")
            break
        outcome = "ok" if compiled is None else compiled[tile]
        found = {**about, "tile": tile, "default": False, "outcome": outcome, "error": "", "median_ms": ""}
        with instead(tile, arch, name, dtype):
            try:
                if outcome == "ok":
                    found["error"] = error_of(result(name, run), want)
                    if found["error"] <= BOUNDS[tiles.CLASSES[dtype]]:
                        found["median_ms"] = timer(run)
                    else:
                        found["outcome"] = "wrong"
            except Exception as error:  # whatever the compiler or the driver raises: shared memory, registers
                found["outcome"] = said(error)
        records.append(found)
        if not alive(device):
            tqdm.write(f"{name}, D = {d}: {written(tile)} has broken the GPU's context: {found['outcome']}")
            break
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
    defaults = Tile._field_defaults
    values = [str(v) for n, v in tile._asdict().items() if n not in defaults]
    values += [f"{n}={v}" for n, v in tile._asdict().items() if n in defaults and v != defaults[n]]
    return f"Tile({', '.join(values)})"


def once(run: Run) -> float:
    """Run a function on a stand-in, whose times mean nothing: each is 1."""
    run()
    return 1.0


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--dtype", nargs="+", choices=["bfloat16", "float16", "float32", "float64"], default=["bfloat16"]
    )
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128, 256, 512, 768])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--minutes", type=float, default=9, help="at most, in all")
    parser.add_argument("--record", help="append every figure to this CSV file, absolute or relative to benchmarks/")
    parser.add_argument("--list", action="store_true", help="print the candidates and time nothing")
    parser.add_argument("--stand-in", action="store_true", help="run a few candidates in the interpreter, on a CPU")
    parser.add_argument("--arch", choices=sorted(SHARED_KIB), help="with --list; else it is the GPU's")
    parser.add_argument("--first", type=int, default=0, help="how many workloads and widths are done")
    return parser, parser.parse_args()


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """What is asked for, all widths of a workload and dtype after each other, but exponentials of dtypes without range
    for them, which no call writes."""
    every = itertools.product(args.kernel, [getattr(torch, dtype) for dtype in args.dtype], args.dim)
    jobs = [Job(*job) for job in every]
    jobs = [job for job in jobs if job.kernel != "exponentials" or EXPONENT_ROOM[job.dtype]]
    return [job for job in jobs if job.kernel != "gradient" or job.d <= tiles.STREAMING_MAX_D[job.dtype]]


def time_all(
    jobs: list[Job], arch: str, device: torch.device, end: float, args: argparse.Namespace,
    compiled: Mapping[tuple[Job, Tile], str] | None,
) -> None:  # fmt: skip
    """Tune every job in an equal share of the time that is left, and print the rows that it proposes.

    Where a candidate breaks the GPU's context, the other jobs run in a new process.
    """
    found: dict[tuple[str, torch.dtype], dict[int, Tile]] = {}
    for i, job in enumerate(jobs):
        until = time.monotonic() + (end - time.monotonic()) / (len(jobs) - i)
        known = None if compiled is None else {t: outcome for (of, t), outcome in compiled.items() if of == job}
        timer = once if args.stand_in else measure
        try:
            records = tune(arch, *job[:2], args.rows, job.d, device, until, timer, known)
        except Exception as error:
            tqdm.write(f"{job}: the table's tile cannot run: {said(error)}")
            records = []
        if args.record:
            rows = [{**record.provenance(device), **r, "tile": written(r["tile"])} for r in records]
            record.append(args.record, rows, FIELDS)
        if args.stand_in:
            print(f"{job}: {', '.join(r['outcome'] for r in records)}")
        elif records:
            winner = best(records)
            found.setdefault(job[:2], {})[job.d] = winner["tile"]
            speed = winner["default_ms"] / winner["median_ms"]
            tqdm.write(f"{job}: {written(winner['tile'])}, {speed:.2f} times as fast as the table's")
        if not alive(device):
            sys.stdout.flush()
            left = ["--minutes", f"{(end - time.monotonic()) / 60:.2f}", "--first", str(args.first + i + 1)]
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.tiles.tune", *sys.argv[1:], *left])
    for (kernel, dtype), of_d in found.items():
        print(f'"{arch}": {{"{kernel}": {{"{tiles.CLASSES[dtype]}": {pasted(of_d, kernel)}}}}},')


def stand_in(args: argparse.Namespace) -> None:
    """Run the table's tile and two candidates of every workload on a CPU, in Triton's interpreter."""
    print("CPU tensors stand in for a GPU: nothing is timed, proposed or recorded")
    args.rows, args.dim = 40, [24]
    with mock.patch.dict(globals(), candidates=lambda *sizes, of=candidates: of(*sizes)[:3]):
        time_all(jobs_of(args), tiles.architecture(CPU), CPU, time.monotonic() + 60 * args.minutes, args, None)


def main() -> None:
    start = time.monotonic()
    parser, args = arguments()
    if args.stand_in and args.record:
        parser.error("times of a stand-in are not recorded")
    if args.stand_in and not launch.INTERPRETED:
        parser.exit(2, "the interpreter stands in for a GPU: set TRITON_INTERPRET=1\n")
    if args.stand_in:
        return stand_in(args)
    if not args.list and not torch.cuda.is_available():
        parser.exit(2, "tuning needs a GPU and torch sees none; --list prints the candidates without one\n")
    device = torch.device("cuda")
    arch = (
        args.arch if args.list and args.arch else tiles.architecture(device) if torch.cuda.is_available() else "sm_90"
    )
    if args.arch and args.arch != arch:
        parser.error(f"this GPU's rows are those of {arch}, not of {args.arch}")
    jobs = jobs_of(args)[args.first :]
    if args.list:
        for job in jobs:
            listed = candidates(arch, job.kernel, job.dtype, job.d)
            print(f"{arch} {job}: {len(listed)} candidates, the first is the table's")
            print("\n".join(f"    {written(tile)}" for tile in listed))
        return
    machine = Machine(arch, target(), tiles.processors(device))
    compiled = compile_candidates(jobs, machine, args.rows, start + 60 * args.minutes * COMPILING)
    time_all(jobs, arch, device, start + 60 * args.minutes, args, compiled)


if __name__ == "__main__":
    main()
