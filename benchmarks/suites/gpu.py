"""Suite for a GPU, of 8 minutes: every size, dtype and direction, every peer, beside the floor of bare matmuls.

    python -m benchmarks.suites.gpu [--record results/gpu.csv] [--minutes 7.5] [--without NAME ...]
    python -m benchmarks.suites.gpu --list                      the cases in their order, without a GPU
    TRITON_INTERPRET=1 python -m benchmarks.suites.gpu --stand-in         tiny cases on a CPU, no times

Before the first case of a direction and dtype our results are checked against float64: where they are wrong, no such
case is timed, and the exit status is 1. Then, case by case, every contestant is checked against ours. Who runs out of
memory, fails or disagrees is recorded as such, with no figures. The others are timed in turn, three times, and the
floor once more at the end: medians of `triton.testing.do_bench`, or of single passes that take long. Small cases are
also replayed as graphs, which the host does not slow down. The rows of a case are recorded as soon as they are known;
time's end is final even in the midst of a case. A failure that the GPU's context does not survive ends the process: the
rest runs in a new one, without the contestant, or where it was ours without the case, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import contestants, record
from benchmarks.cases import AGAIN, BIAS, COMPILED, DENSE, FLOOR, OURS, REPLAYED, SCALE, TEMPERATURE, Case, square
from benchmarks.contest import Contest, alive, forget_gradients
from fused_infonce import info_nce, nt_xent, siglip_loss
from fused_infonce.backends import BackendName, registry

WIDTHS = (64, 128, 256, 512, 768, 1024, 2048, 4096)
UNEVEN = ((16381, 768), (16384, 312), (8191, 312))  # rows and widths that no tile or 16-byte load divides
DIRECTIONS = ("one", "symmetric", "self")
ALL_ROWS = 1 << 18  # beyond, only ours, the floor and the dense loss, which then says that it cannot
GATE = ((1000, 100), (1001, 312), (2048, 768), (4096, 128))  # rows and widths at which we are checked first
BOUNDS = {  # of loss and both gradients
    "bfloat16": (1e-5, 5e-3, 5e-3),
    "float16": (1e-5, 5e-3, 5e-3),
    "float32": (1e-5, 1e-5, 1e-5),
}
SLOW = 0.1  # seconds: such a pass is timed once a turn
TURNS = 3
REPLAYED_ROWS = 4096  # above them the host is no matter
STAND_IN = (  # direction, dtype and pass of the cases without a GPU
    ("one", "bfloat16", "fwd_bwd"),
    ("symmetric", "float16", "fwd"),
    ("self", "float32", "fwd_bwd"),
    ("sigmoid", "bfloat16", "fwd_bwd"),
)
Pass = Callable[[], object]


class Disagrees(Exception):
    """What a contestant computes is something else."""


class OutOfTime(BaseException):
    """Time's end, which no `except Exception` stops."""


class Broken(BaseException):
    """A GPU's context that nothing more can be run in: who was running, and how many cases were done."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name, self.done = name, 0


def cases() -> list[Case]:
    """All cases in the order of what they say, so that a short run is still worth something."""
    two = DIRECTIONS[1:]
    chosen = [square(n, 768) for n in (16384, 65536, 8192, 32768, 2048, 512, 131072)]
    chosen += [square(16384, 768, direction=direction) for direction in two]
    chosen += [square(16384, d) for d in WIDTHS if d != 768]
    chosen += [square(n, 768, direction="sigmoid") for n in (16384, 65536, 8192)]
    chosen += [square(16384, 768, direction=direction) for direction in ("biased", "biased symmetric")]
    chosen += [square(8192, 768, dtype) for dtype in ("float16", "float32")]
    chosen += [square(8192, 768, dtype, "sigmoid") for dtype in ("float16", "float32")]
    chosen += [square(n, d) for n, d in UNEVEN]
    chosen += [square(n, 768, mode="fwd") for n in (16384, 65536, 2048)]
    chosen += [square(n, 256) for n in (1 << 20, 1 << 18)]
    chosen += [square(n, 768, direction=direction) for n in (32768, 131072, 8192, 2048, 512) for direction in two]
    chosen += [square(16384, d, direction=direction) for d in (256, 128, 1024) for direction in two]
    chosen += [square(n, d, direction=direction) for n, d in UNEVEN[:2] for direction in two]
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
    names = [name for name in names if name != COMPILED or compiled]
    return names + [f"{name}{REPLAYED}" for name in (OURS, DENSE) if name in names and this.rows <= REPLAYED_ROWS]


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
    elif direction == "sigmoid":
        loss = siglip_loss(query, key, SCALE, BIAS, normalize=True, backend=backend)
    else:
        bias = contestants.bias_of(key) if "biased" in direction else None
        symmetric = "symmetric" in direction
        loss = info_nce(query, key, temperature=TEMPERATURE, symmetric=symmetric, key_bias=bias, backend=backend)
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss * 1024, rows))]


def measure(case: Case, device: torch.device, without: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a case: of who cannot run at once, saying so; of the others when they have been timed, in turn.

    What ends the run is raised after the rows of those that have been timed.
    """
    run = Contest(case, device, contestants.losses(case, device), contestants.floor(case))
    names = [FLOOR, *taking_part(case, list(run.losses))]
    names = [name for name in names if not {name, name.removesuffix(REPLAYED)} & {*without}]
    if COMPILED in names:
        torch._dynamo.reset()
    passes: dict[str, Pass] = {}
    times: dict[str, list[float]] = {}
    inputs, mine = case.inputs(device, seed=1), list[Tensor]()
    end: BaseException | None = None
    try:
        for name in names:  # each on its own: what cannot run must not take the others with it
            try:
                passes[name] = checked(run, name, inputs, mine)
            except Exception as error:  # whatever a peer raises
                yield failed(run, name, why(error))
            clean(device, name)
            if name == OURS and not mine:
                break  # nothing to check the others against
        for name in [*passes] * TURNS + [AGAIN]:
            of = FLOOR if name == AGAIN else name
            if of not in passes:
                continue
            try:
                times[name] = times.get(name, []) + timed(name, passes[of], inputs)
            except Exception as error:
                del passes[of]
                times.pop(name, None)
                yield failed(run, name, why(error))
            clean(device, name)
    except (OutOfTime, Broken) as stop:
        end = stop
    for name, seconds in times.items():
        yield run.row(name, seconds, times.get(FLOOR, []))
    if end:
        raise end


def checked(run: Contest, name: str, inputs: tuple[Tensor, ...], mine: list[Tensor]) -> Pass:
    """A function that runs one pass of a contestant, whose results and peak of memory are known from here on.

    Args:
        mine: our results, which are put there when it is our turn.

    Raises:
        Disagrees: its results are not ours.
    """
    of = name.removesuffix(REPLAYED)
    if name == FLOOR:
        run.peaks[AGAIN] = run.peak(FLOOR)
    elif name == OURS:
        mine += run.result(OURS)
    elif name != of:
        run.peaks[name] = run.peak(of)
        return captured(lambda *rows: run.launch(of, *rows), inputs)
    elif wrong := run.disagreement(name, mine):
        raise Disagrees(wrong)
    return partial(run.launch, name, *inputs)


def captured(launch: Callable[..., object], inputs: tuple[Tensor, ...]) -> Pass:
    """A function that replays a pass, captured as a graph; on a CPU it runs the pass."""
    inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    if not inputs[0].is_cuda:
        return partial(launch, *inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            launch(*inputs)
            forget_gradients(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(*inputs)
    return graph.replay


def timed(name: str, once: Pass, inputs: tuple[Tensor, ...]) -> list[float]:
    """Seconds of a contestant's passes in one turn, the first ones not counted where passes are short."""
    forget_gradients(inputs)
    start = time.perf_counter()
    once()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if seconds > SLOW or not inputs[0].is_cuda:
        return [seconds]
    from triton.testing import do_bench

    milliseconds = do_bench(once, warmup=5, rep=35, grad_to_none=list(inputs), return_mode="all")
    return [t / 1e3 for t in milliseconds]


def why(error: Exception) -> str:
    """The reason of a failure, in one line."""
    text = str(error)
    if isinstance(error, Disagrees):
        return f"disagrees: {text}"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        return "out of memory"
    return f"failed: {type(error).__name__}: {text.splitlines()[0][:120] if text else ''}"


def failed(run: Contest, name: str, reason: str) -> dict[str, Any]:
    """The row of a contestant that could not run: the first words of the reason stand where the time would."""
    tqdm.write(f"{run.case}: {name}: {reason}")
    return {**run.about(name), "median_ms": reason.split(":")[0]}


def clean(device: torch.device, name: str) -> None:
    """Free what a contestant leaves behind, so that it is no matter of the next."""
    if not alive(device):
        raise Broken(name)
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
        path: the CSV file that the rows of a case are appended to as soon as they are known.
        without: contestants that are left out.

    Raises:
        Broken: nothing more can be run in this process.
    """
    done, seen, wrong = 0, set[str](), list[str]()
    try:
        with time_limit(60 * minutes):
            for this in tqdm(chosen):
                if kind(this) not in seen:
                    seen.add(kind(this))
                    if complaints := gate(this.direction, this.dtype, device):
                        wrong.append(kind(this))
                        print(f"ours is wrong, so no {kind(this)} is timed:", *complaints, sep="\n  ", file=sys.stderr)
                    clean(device, OURS)
                for row in () if kind(this) in wrong else measure(this, device, without):
                    if path:
                        record.append(path, [row])
                    if "p20_ms" in row:
                        figures = f"{row['median_ms']:>10} ms  {row['floor_ratio']:>7} x floor"
                        figures = figures if device.type == "cuda" else "has run, on a stand-in"
                        tqdm.write(f"{this!s:45} {row['contestant']:24} {figures}")
                    elif row["contestant"] == OURS:
                        wrong.append(str(this))
                done += 1
    except OutOfTime:
        print("no time left for", *chosen[done:], sep="\n  ", file=sys.stderr)
    except Broken as broken:
        broken.done = done
        print(f"{chosen[done]}: {broken.name} has broken the GPU's context, so a new process goes on", file=sys.stderr)
        raise
    return not wrong


def rest(args: argparse.Namespace, broken: Broken, minutes: float) -> list[str]:
    """The arguments of a process that runs what is left: without who broke the context, or without the case."""
    ours = broken.name.removesuffix(REPLAYED) in (OURS, FLOOR)
    without = [*args.without, *([] if ours else [broken.name])]
    found = ["--minutes", f"{minutes:.2f}", "--first", str(args.first + broken.done + ours), "--failed"]
    found += ["--record", args.record] if args.record else []
    return found + (["--without", *without] if without else [])


def stand_in() -> bool:
    """Run tiny cases on a CPU, with the Triton backend in its interpreter, and return whether all went well."""
    print("CPU tensors stand in for a GPU: nothing is timed or recorded")
    chosen = [Case(direction, 20, 20, 24, dtype, mode) for direction, dtype, mode in STAND_IN]
    triton = mock.patch.object(registry, "resolve", lambda name, _: "triton" if name == "auto" else name)
    with triton, mock.patch.dict(globals(), GATE=((33, 24),), TURNS=1):
        return run_all(chosen, torch.device("cpu"), minutes=2, path=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="append the results to this CSV file, absolute or relative to benchmarks/")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--list", action="store_true", help="print the cases and time nothing")
    parser.add_argument("--stand-in", action="store_true", help="run tiny cases in the interpreter, on a CPU")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contestants that are left out")
    parser.add_argument("--first", type=int, default=0, help="the place of the first case in --list")
    parser.add_argument("--failed", action="store_true", help="exit with status 1, since an earlier part has failed")
    args = parser.parse_args()
    if args.list:
        return print(*cases(), sep="\n")
    if args.stand_in and args.record:
        parser.error("times of a stand-in are not recorded")
    if args.stand_in and not os.environ.get("TRITON_INTERPRET"):
        parser.exit(2, "the interpreter stands in for a GPU: set TRITON_INTERPRET=1\n")
    if args.stand_in:
        sys.exit(not stand_in())
    if not torch.cuda.is_available():
        parser.exit(2, "the suite needs a GPU and torch sees none; --list prints the cases without one\n")
    start = time.monotonic()
    try:
        well = run_all(cases()[args.first :], torch.device("cuda"), args.minutes, args.record, args.without)
    except Broken as broken:
        left = args.minutes - (time.monotonic() - start) / 60
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.suites.gpu", *rest(args, broken, left)])
    sys.exit(args.failed or not well)


if __name__ == "__main__":
    main()
