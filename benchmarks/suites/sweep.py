"""A sweep of 17 temperatures, with means, variances and ranks, against one forward and against 17 of them.

    python -m benchmarks.suites.sweep                              8192 x 8192 at D = 768 and 256
    python -m benchmarks.suites.sweep --record results/sweep.csv   the same, appended to a CSV file
    python -m benchmarks.suites.sweep --n 100000 --d 64 --memory   the peak of memory beyond the inputs alone

In turn on one thread, on fresh inputs each round, medians of processor time, which other programs on the machine change
least; first the log-sums of both must agree. A forward computes InfoNCE without gradients.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import record
from fused_infonce import info_nce
from fused_infonce.temperature import Sweep, sweep

FIELDS = (
    *("date", "commit", "device", "torch", "n", "d", "contestant"),
    *("median_ms", "p20_ms", "p80_ms", "time_ratio", "peak_extra_mib"),
)
SWEEP, ONE, EVERY = "sweep of 17 temperatures", "one forward", "17 forwards"
CPU = torch.device("cpu")
RANGE = (1 / 256, 1.0)


def pair(n: int, d: int) -> tuple[Tensor, Tensor]:
    query = torch.randn(n, d)
    return query, torch.randn(n, d).mul_(3).add_(query)


def forwards(query: Tensor, key: Tensor, temperatures: list[float]) -> Tensor:
    return torch.stack([info_nce(query, key, temperature=t) for t in temperatures])


def same(found: Sweep, query: Tensor, key: Tensor) -> None:
    """Check that a sweep has the losses of forwards at two of its temperatures."""
    for t in found.temperatures[[0, 8]].tolist():
        torch.testing.assert_close(found.nll(t), info_nce(query, key, temperature=t), rtol=1e-4, atol=0)


def play(n: int, d: int, rounds: int) -> list[dict[str, Any]]:
    """Time all contestants of one size, and return a CSV row for each."""
    query, key = pair(n, d)
    found = sweep(query, key, RANGE)
    same(found, query, key)
    temperatures = found.temperatures.tolist()
    runs: dict[str, Callable[..., Any]] = {
        SWEEP: partial(sweep, temperatures=RANGE), ONE: partial(forwards, temperatures=[0.0625]),
        EVERY: partial(forwards, temperatures=temperatures),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        query, key = pair(n, d)
        for name, run in runs.items():
            start = time.process_time()
            run(query, key)
            times[name].append(1e3 * (time.process_time() - start))
    base = np.median(times[ONE])
    return [
        {
            **about(n, d, name), "median_ms": f"{np.median(t):.4g}", "p20_ms": f"{np.percentile(t, 20):.4g}",
            "p80_ms": f"{np.percentile(t, 80):.4g}", "time_ratio": f"{np.median(t) / base:.3f}",
        }
        for name, t in times.items()
    ]  # fmt: skip


def about(n: int, d: int, contestant: str) -> dict[str, Any]:
    """Return where a figure comes from."""
    known = {k: v for k, v in record.provenance(CPU).items() if k in FIELDS}
    return {**dict.fromkeys(FIELDS, ""), **known, "n": n, "d": d, "contestant": contestant}


def memory(n: int, d: int) -> list[dict[str, Any]]:
    """Measure the peak of the process in one sweep beyond what its inputs take, results included."""
    query, key = pair(n, d)
    sweep(query[:100], key[:100], RANGE)  # whose code is loaded then
    before = resident()
    sweep(query, key, RANGE)
    return [{**about(n, d, SWEEP), "peak_extra_mib": f"{resident() - before:.1f}"}]


def resident() -> float:
    """Return the most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="append the results to this CSV file, absolute or relative to benchmarks/")
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--d", type=int, nargs="+", default=[768, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure the peak of memory and time nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for d in options.d:
        rows = memory(options.n, d) if options.memory else play(options.n, d, options.rounds)
        for row in rows:
            print(*(f"{row[name]!s:>26}" for name in ("contestant", "d", "median_ms", "time_ratio", "peak_extra_mib")))
        if options.record:
            record.append(options.record, rows, FIELDS)


if __name__ == "__main__":
    main()
