"""Suite for a GPU, of 8 minutes: every size, dtype and direction, every peer, beside the floor of bare matmuls.

    python -m benchmarks.suites.gpu [--record results/gpu.csv] [--minutes 7.5] [--without NAME ...]
    python -m benchmarks.suites.gpu --list                      the cases in their order, without a GPU

Before the first case of a direction and dtype our results are checked against float64: where they are wrong, no such
case is timed, and the exit status is 1. Then, case by case, every contestant is checked against ours and timed: medians
of `triton.testing.do_bench`, or of three passes that take long. Who runs out of memory, fails or disagrees is recorded
as such, with no figures. A row is recorded as soon as it is known; time's end is final even in the midst of a case.
A failure that the GPU's context does not survive ends the run, which says who it was: `--without NAME` leaves a
contestant out.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import contestants, record
from benchmarks.cases import COMPILED, DENSE, FLOOR, OURS, TEMPERATURE, Case, square
from benchmarks.contest import Contest, forget_gradients
from fused_infonce import info_nce, nt_xent
from fused_infonce.backends import BackendName

WIDTHS = (64, 128, 256, 512, 768, 1024, 2048, 4096)
DIRECTIONS = ("one", "symmetric", "self")
ALL_ROWS = 1 << 18  # beyond, only ours, the floor and the dense loss, which then says that it cannot
GATE = ((1000, 100), (2048, 768), (4096, 128))  # rows and widths at which we are checked first
BOUNDS = {  # of loss and both gradients
    "bfloat16": (1e-5, 5e-3, 5e-3),
    "float16": (1e-5, 5e-3, 5e-3),
    "float32": (1e-5, 1e-5, 1e-5),
}
SLOW = 0.1  # seconds: such a pass is timed three times and no more


class OutOfTime(BaseException):
    """Time's end, which no `except Exception` stops."""


class Broken(BaseException):
    """A GPU's context that nothing more can be run in; the argument is who was running."""


def cases() -> list[Case]:
    """All cases in the order of what they say, so that a short run is still worth something."""
    two = DIRECTIONS[1:]
    chosen = [square(n, 768) for n in (16384, 65536, 8192, 32768, 2048, 512, 131072)]
    chosen += [square(16384, 768, direction=direction) for direction in two]
    chosen += [square(16384, d) for d in WIDTHS if d != 768]
    chosen += [square(8192, 768, dtype) for dtype in ("float16", "float32")]
    chosen += [square(n, 768, mode="fwd") for n in (16384, 65536, 2048)]
    chosen += [square(n, 256) for n in (1 << 20, 1 << 18)]
    chosen += [square(n, 768, direction=direction) for n in (32768, 131072, 8192, 2048, 512) for direction in two]
    chosen += [square(16384, d, direction=direction) for d in (256, 128, 1024) for direction in two]
    chosen += [square(8192, 768, dtype, direction) for dtype in ("float16", "float32") for direction in two]
    chosen += [square(16384, 768, direction=direction, mode="fwd") for direction in two]
    chosen += [square(n, d) for n in (512, 4096, 65536) for d in (128, 256, 1024)]
    chosen += [square(16384, d, direction=direction) for d in (64, 512, 2048, 4096) for direction in two]
    return chosen


def taking_part(this: Case, names: list[str]) -> list[str]:
    """The contestants that are asked to run a case."""
    if this.rows > ALL_ROWS:
        return [name for name in names if name in (OURS, DENSE)]
    compiled = this in [square(8192, 768, direction=direction) for direction in ("one", "symmetric")]
    return [name for name in names if name != COMPILED or compiled]


def kind(this: Case) -> str:
    """The name of the cases that are checked together with this one."""
    return f"{this.direction}-{this.dtype}"


def gate(direction: str, dtype: str, device: torch.device) -> list[str]:
    """Complaints about our loss and gradients, against the dense loss in float64 on the same inputs."""
    complaints = []
    for n, d in GATE:
        this = square(n, d, dtype, direction)
        try:
            rows = this.inputs(device, seed=7)
            exact = [x.detach().double().requires_grad_() for x in rows]
            ours, truth = evaluate(direction, rows, "auto"), evaluate(direction, exact, "reference")
            for value, want, bound in zip(ours, truth, BOUNDS[dtype], strict=True):
                error = (torch.linalg.vector_norm(value - want) / torch.linalg.vector_norm(want)).item()
                if not error <= bound:
                    complaints.append(f"{this}: off by {error:.1e}, more than {bound:.0e}")
        except Exception as error:
            complaints.append(f"{this}: {why(error)}")
    return complaints


def evaluate(direction: str, rows: Sequence[Tensor], backend: BackendName) -> list[Tensor]:
    """Our loss and gradients, these under a loss scale: float16 cannot hold them otherwise."""
    query, key = rows
    if direction == "self":
        loss = nt_xent(query, key, TEMPERATURE, backend=backend)
    else:
        loss = info_nce(query, key, temperature=TEMPERATURE, symmetric=direction == "symmetric", backend=backend)
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss * 1024, rows))]


def measure(case: Case, device: torch.device, without: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The row of each contestant as soon as it is known; of who cannot run, one that says so in place of a time."""
    run = Contest(case, device, contestants.losses(case, device), contestants.floor(case))
    names = [name for name in [FLOOR, *taking_part(case, list(run.losses))] if name not in without]
    if COMPILED in names:
        torch._dynamo.reset()
    times: dict[str, list[float]] = {}
    mine: list[Tensor] = []
    inputs = case.inputs(device, seed=1)
    for name in names:
        try:  # each on its own: what cannot run must not take the others with it
            if name == OURS:
                mine = run.result(OURS)
            if name not in (OURS, FLOOR) and (wrong := run.disagreement(name, mine)):
                row = failed(run, name, f"disagrees: {wrong}")
            else:
                times[name] = timed(run, name, inputs)
                row = run.row(name, times[name], times.get(FLOOR, []))
        except Exception as error:  # whatever a peer raises
            row = failed(run, name, why(error))
        yield row
        clean(device, name)
        if name == OURS and not mine:
            return  # nothing to check the others against


def timed(run: Contest, name: str, inputs: tuple[Tensor, ...]) -> list[float]:
    """Seconds of a contestant's passes, the first ones not counted."""
    from triton.testing import do_bench

    def once() -> float:
        forget_gradients(inputs)
        start = time.perf_counter()
        run.step(name, *inputs)
        return time.perf_counter() - start

    if once() > SLOW:
        return [once() for _ in range(3)]
    milliseconds = do_bench(
        lambda: run.launch(name, *inputs), warmup=10, rep=100, grad_to_none=list(inputs), return_mode="all"
    )
    return [t / 1e3 for t in milliseconds]


def why(error: Exception) -> str:
    """The reason of a failure, in one line."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        return "out of memory"
    return f"failed: {type(error).__name__}: {text.splitlines()[0][:120] if text else ''}"


def failed(run: Contest, name: str, reason: str) -> dict[str, Any]:
    """The row of a contestant that could not run: the first words of the reason stand where the time would."""
    tqdm.write(f"{run.case}: {name}: {reason}")
    return {**run.about(name), "median_ms": reason.split(":")[0]}


def clean(device: torch.device, name: str) -> None:
    """Free what a contestant leaves behind, so that it is no matter of the next."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            raise Broken(name) from error


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread when the seconds are over."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def run_all(
    chosen: list[Case], device: torch.device, minutes: float, path: str | None, without: Collection[str] = ()
) -> bool:
    """Run cases until they are done or time ends, and return whether all went well.

    Args:
        path: the CSV file that every row is appended to as soon as it is known.
        without: contestants that are left out.
    """
    done, checked, wrong = 0, set[str](), list[str]()
    try:
        with time_limit(60 * minutes):
            for this in tqdm(chosen):
                if kind(this) not in checked:
                    checked.add(kind(this))
                    if complaints := gate(this.direction, this.dtype, device):
                        wrong.append(kind(this))
                        print(f"ours is wrong, so no {kind(this)} is timed:", *complaints, sep="\n  ", file=sys.stderr)
                    clean(device, OURS)
                for row in () if kind(this) in wrong else measure(this, device, without):
                    if path:
                        record.append(path, [row])
                    if "p20_ms" in row:
                        figures = f"{row['median_ms']:>10} ms  {row['floor_ratio']:>7} x floor"
                        tqdm.write(f"{this!s:45} {row['contestant']:24} {figures}")
                    elif row["contestant"] == OURS:
                        wrong.append(str(this))
                done += 1
    except OutOfTime:
        print("no time left for", *chosen[done:], sep="\n  ", file=sys.stderr)
    except Broken as broken:
        print(
            f"{chosen[done]}: {broken} has broken the GPU's context, so nothing more can be run in this process.",
            f"Rows so far are recorded; to run the others, leave it out: --without {str(broken)!r}",
            sep="\n", file=sys.stderr,
        )  # fmt: skip
        return False
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="append the results to this CSV file, absolute or relative to benchmarks/")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--list", action="store_true", help="print the cases and time nothing")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contestants that are left out")
    args = parser.parse_args()
    if args.list:
        return print(*cases(), sep="\n")
    if not torch.cuda.is_available():
        parser.exit(2, "the suite needs a GPU and torch sees none; --list prints the cases without one\n")
    sys.exit(not run_all(cases(), torch.device("cuda"), args.minutes, args.record, args.without))


if __name__ == "__main__":
    main()
