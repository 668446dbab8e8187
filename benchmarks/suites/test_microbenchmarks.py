"""Microbenchmarks of InfoNCE: forward, and forward with backward, beside the dense loss and the bare matmuls.

    pytest benchmarks --benchmark-only                              a few sizes, on the GPU if there is one
    pytest benchmarks --benchmark-only --record results/cpu.csv     the same, appended to a CSV file

On a CPU a case that by arithmetic would not end within 9 minutes is skipped: the largest of the sweep over N come last.
With --at-leisure none is, and the large cases have 5 rounds instead of 3.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks import contestants, record
from benchmarks.cases import COMPILED, Case, square
from benchmarks.contest import Contest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH = 384  # of the sweep over N that the plots are drawn from
SIZES = {
    "cpu": [
        *((64, 128), (256, 256), (1024, 256), (8192, 768)),
        *((n, WIDTH) for n in (512, 1024, 2048, 4096, 8192, 16384)),
    ],
    "cuda": [(1024, 256), (8192, 768), (32768, 768)],
}
DTYPES = {"cpu": ["float32"], "cuda": ["bfloat16", "float32"]}
SIXTEEN = {"cpu": [(1024, 256), (8192, 768)], "cuda": []}  # bfloat16, one direction, beside those dtypes
ROWS = {"cpu": [(64, 128), (1024, 256), (8192, 768)], "cuda": []}  # reduction="none", in the first of those dtypes
SIGMOID = {"cpu": [(64, 128), (1024, 256), (8192, 768)], "cuda": [(8192, 768)]}  # SigLIP's loss, likewise
BIASED = {"cpu": [(8192, 768)], "cuda": [(8192, 768)]}  # with a bias a key, likewise, in one direction and in both
LONG = 8192  # from here on fewer rounds
LIMIT = 540  # seconds
RATE = 110e9  # FLOP/s of float32 matmuls on 2 cores, to begin with; then what the session's own cases say
# All contestants together, in multiples of the floor.
RATIOS = {
    "one": 6.6,
    "symmetric": 9.0,
    "self": 6.3,
    "rows": 3.9,
    "sigmoid": 7.0,
    "biased": 5.5,
    "biased symmetric": 7.0,
}


def modes(device: str, n: int, d: int) -> tuple[str, ...]:
    """The passes that are timed at one size."""
    return ("fwd_bwd",) if device == "cpu" and (n > 1024 or d == WIDTH) else ("fwd", "fwd_bwd")


def cases(device: str) -> list[Case]:
    """All cases of a device; on a CPU what a short run can do without comes last, the large sizes of two directions."""
    chosen = [
        square(n, d, dtype, direction, mode)
        for n, d in SIZES[device]
        for dtype in DTYPES[device]
        for direction in ("one", "symmetric", "self")
        for mode in modes(device, n, d)
    ]
    chosen += [square(n, d) for n, d in SIXTEEN[device]]
    chosen += [square(n, d, DTYPES[device][0], "rows") for n, d in ROWS[device]]
    chosen += [square(n, d, DTYPES[device][0], "sigmoid") for n, d in SIGMOID[device]]
    both = ("biased", "biased symmetric")
    chosen += [square(n, d, DTYPES[device][0], direction) for n, d in BIASED[device] for direction in both]
    largest = max(case.rows for case in chosen)

    def cost(case: Case) -> float:
        spare = case.d == WIDTH and case.rows >= LONG and not (case.direction == "one" and case.n == largest)
        return seconds(case) if spare else 0

    return sorted(chosen, key=cost) if device == "cpu" else chosen


def rounds(case: Case, at_leisure: bool = False) -> int:
    """The number of times that each contestant is timed."""
    if case.rows < 256:  # medians of fewer differ by a tenth from run to run
        return 501
    return 31 if case.rows < 2048 else 5 if case.rows < LONG or at_leisure else 3


def seconds(case: Case, rate: float = RATE) -> float:
    """An estimate by arithmetic of the seconds of a case: every round, and one pass to check and warm up."""
    products = 2 if case.mode == "fwd" else 6
    return products * case.rows**2 * case.d / rate * RATIOS[case.direction] * (rounds(case) + 1)


class Clock:
    """The time that the session has taken, and how that compares with the estimates."""

    def __init__(self) -> None:
        self.start, self.estimated, self.taken = time.monotonic(), 0.0, 0.0

    def enough(self, case: Case) -> bool:
        """Return whether a case is likely to end in time."""
        slower = self.taken / self.estimated if self.estimated > 20 else 1.0  # small cases are overhead
        return time.monotonic() - self.start + seconds(case) * slower < LIMIT

    def add(self, case: Case, taken: float) -> None:
        """Note the seconds that a case has taken."""
        if case.rows >= 2048:
            self.estimated += seconds(case)
            self.taken += taken


CLOCK = Clock()


@pytest.mark.parametrize("case", cases(DEVICE.type), ids=str)
def test_loss(benchmark: Any, case: Case, request: pytest.FixtureRequest) -> None:
    """Time one case, and record it if asked to."""
    at_leisure = request.config.getoption("--at-leisure")
    if DEVICE.type == "cpu" and not at_leisure and not CLOCK.enough(case):
        pytest.skip(f"no time left within {LIMIT} s")
    start = time.monotonic()
    run = Contest(case, DEVICE, contestants.losses(case, DEVICE, without=(COMPILED,)), contestants.floor(case))
    run.agree()
    benchmark.group = str(case)
    benchmark.pedantic(run.ours, setup=run.round, rounds=rounds(case, at_leisure), warmup_rounds=int(case.rows < LONG))
    results = run.rows(benchmark.stats.stats.data)
    CLOCK.add(case, time.monotonic() - start)
    for row in results:
        benchmark.extra_info[row["contestant"]] = f"{row['median_ms']} ms, {row['floor_ratio']} times the floor"
    if path := request.config.getoption("--record"):
        record.append(path, results)
