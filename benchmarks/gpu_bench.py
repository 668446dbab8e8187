"""The GPU suite: every size, dtype and direction, every peer, beside the floor of bare matmuls. Stops within 8 minutes.

    python benchmarks/gpu_bench.py [--record results/gpu.csv] [--minutes 7.5]
    python benchmarks/gpu_bench.py --list                      the cases in their order, without a GPU

First our results are checked against float64: if they are wrong, nothing is timed. Then, case by case, every contestant
is checked against ours and timed: medians of `triton.testing.do_bench`, or of three passes that take long. Who runs out
of memory, fails or disagrees is recorded as such, with no figures. Time's end is final even in the midst of a case.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import contest
import torch
from contest import FLOOR, Contest
from contestants import OURS, Case
from peers import TEMPERATURE
from torch import Tensor
from tqdm import tqdm

from fused_infonce import info_nce, nt_xent

WIDTHS = (64, 128, 256, 512, 768, 1024, 2048, 4096)
DIRECTIONS = ("one", "symmetric", "self")
COMPILED = "dense compiled"  # compiling takes longer than measuring: at few cases only
ALL_ROWS = 1 << 18  # beyond, only ours, the floor and the dense loss, which then says that it cannot
GATE = ((1000, 100), (2048, 768), (4096, 128))  # rows and widths at which we are checked first
BOUNDS = {"bfloat16": (1e-5, 5e-3), "float16": (1e-5, 5e-3), "float32": (1e-5, 1e-5)}  # of loss and gradients
SLOW = 0.1  # seconds: such a pass is timed three times and no more


class OutOfTime(BaseException):
    """No `except Exception` stops it."""


def case(n: int, d: int, dtype: str = "bfloat16", direction: str = "one", mode: str = "fwd_bwd") -> Case:
    """n rows in all."""
    rows = n // 2 if direction == "self" else n
    return Case(direction, rows, rows, d, dtype, mode)


def cases() -> list[Case]:
    """In the order of what they say, so that a short run is still worth something."""
    two = DIRECTIONS[1:]
    chosen = [case(n, 768) for n in (16384, 65536, 8192, 32768, 2048, 131072, 512)]
    chosen += [case(16384, 768, direction=direction) for direction in two]
    chosen += [case(16384, d) for d in WIDTHS if d != 768]
    chosen += [case(8192, 768, dtype) for dtype in ("float16", "float32")]
    chosen += [case(n, 768, mode="fwd") for n in (16384, 65536, 2048)]
    chosen += [case(n, 256) for n in (1 << 20, 1 << 18)]
    chosen += [case(n, 768, direction=direction) for n in (32768, 131072, 8192, 2048, 512) for direction in two]
    chosen += [case(16384, d, direction=direction) for d in (256, 128, 1024) for direction in two]
    chosen += [case(8192, 768, dtype, direction) for dtype in ("float16", "float32") for direction in two]
    chosen += [case(16384, 768, direction=direction, mode="fwd") for direction in two]
    chosen += [case(n, d) for n in (512, 4096, 65536) for d in (128, 256, 1024)]
    chosen += [case(16384, d, direction=direction) for d in (64, 512, 2048, 4096) for direction in two]
    return chosen


def taking_part(case: Case, names: list[str]) -> list[str]:
    """Who is asked to run this case."""
    rows = case.n * (2 if case.direction == "self" else 1)
    common = case.d == 768 and case.dtype == "bfloat16" and case.mode == "fwd_bwd"
    if rows > ALL_ROWS:
        return [name for name in names if name in (OURS, "dense")]
    return [name for name in names if name != COMPILED or (common and rows in (8192, 16384))]


def gate(device: torch.device) -> list[str]:
    """What is wrong with our loss and gradients, against the dense loss in float64 on the same inputs."""
    complaints = []
    for direction in DIRECTIONS:
        for n, d in GATE:
            for dtype, bounds in BOUNDS.items():
                this = case(n, d, dtype, direction)
                rows = this.inputs(device, seed=7)
                exact = [x.detach().double().requires_grad_() for x in rows]
                ours, truth = evaluate(direction, rows, "auto"), evaluate(direction, exact, "reference")
                for value, want, bound in zip(ours, truth, (bounds[0], bounds[1], bounds[1]), strict=True):
                    error = (torch.linalg.vector_norm(value - want) / torch.linalg.vector_norm(want)).item()
                    if not error <= bound:
                        complaints.append(f"{this}: off by {error:.1e}, more than {bound:.0e}")
    return complaints


def evaluate(direction: str, rows: Any, backend: str) -> list[Tensor]:
    """Loss and gradients, these under a loss scale: float16 cannot hold them otherwise."""
    if direction == "self":
        loss = nt_xent(*rows, TEMPERATURE, backend=backend)
    else:
        loss = info_nce(*rows, temperature=TEMPERATURE, symmetric=direction == "symmetric", backend=backend)
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss * 1024, rows))]


def measure(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """The rows of a case; of who cannot run it, one that says so in place of a time."""
    run = Contest(case, device)
    run.losses = {name: run.losses[name] for name in taking_part(case, list(run.losses))}
    if COMPILED in run.losses:
        torch._dynamo.reset()
    absent: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    try:
        mine = run.result(OURS)
    except Exception as error:
        return [failed(run, OURS, why(error))]
    query, key = case.inputs(device, seed=1)
    for name in [OURS, FLOOR, *(name for name in run.losses if name != OURS)]:
        try:  # each on its own: what cannot run must not take the others with it
            if name not in (OURS, FLOOR) and (wrong := run.disagreement(name, mine)):
                absent[name] = f"disagrees: {wrong}"
            else:
                times[name] = timed(run, name, query, key)
        except Exception as error:  # whatever a peer raises
            absent[name] = why(error)
        if name in absent:
            clean(device)
    rows = []
    if OURS in times and FLOOR in times:
        ours = times.pop(OURS)
        run.times = times
        rows = run.rows(ours)
    return [*rows, *(failed(run, name, reason) for name, reason in absent.items())]


def timed(run: Contest, name: str, query: Tensor, key: Tensor) -> list[float]:
    """Seconds of passes, the first ones not counted."""
    from triton.testing import do_bench

    def once() -> float:
        query.grad = key.grad = None
        start = time.perf_counter()
        run.step(name, query, key)
        return time.perf_counter() - start

    if once() > SLOW:
        return [once() for _ in range(3)]
    milliseconds = do_bench(
        lambda: run.launch(name, query, key), warmup=10, rep=100, grad_to_none=[query, key], return_mode="all"
    )
    return [t / 1e3 for t in milliseconds]


def why(error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        return "out of memory"
    return f"failed: {type(error).__name__}: {text.splitlines()[0][:120] if text else ''}"


def failed(run: Contest, name: str, reason: str) -> dict[str, Any]:
    """The first words of the reason stand where the time would."""
    tqdm.write(f"{run.case}: {name}: {reason}")
    return {**run.about(name), "median_ms": reason.split(":")[0]}


def clean(device: torch.device) -> None:
    """After a failure. Raises if it was one that a GPU's context does not survive."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the main thread when they are over."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def run_all(chosen: list[Case], device: torch.device, minutes: float, record: Path | None) -> bool:
    """Whether everything of ours that was run is right."""
    right, done = True, 0
    try:
        with time_limit(60 * minutes):
            if complaints := gate(device):
                print("our results are wrong, so nothing is timed:", *complaints, sep="\n  ", file=sys.stderr)
                return False
            for this in tqdm(chosen):
                rows = measure(this, device)
                for row in rows:
                    if "floor_ratio" in row:
                        figures = f"{row['median_ms']:>10} ms  {row['floor_ratio']:>7} x floor"
                        tqdm.write(f"{this!s:45} {row['contestant']:24} {figures}")
                    elif row["contestant"] == OURS:
                        right = False
                if record:
                    contest.append(record, rows)
                done += 1
                clean(device)
    except OutOfTime:
        print("no time left for", *chosen[done:], sep="\n  ", file=sys.stderr)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="append the results to this CSV file, relative to benchmarks/")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--list", action="store_true", help="print the cases and time nothing")
    args = parser.parse_args()
    if args.list:
        return print(*cases(), sep="\n")
    if not torch.cuda.is_available():
        parser.exit(2, "the suite needs a GPU and torch sees none; --list prints the cases without one\n")
    record = Path(__file__).parent / args.record if args.record else None
    sys.exit(not run_all(cases(), torch.device("cuda"), args.minutes, record))


if __name__ == "__main__":
    main()
