"""What `record=True` costs a step, forward and backward, of 8192 pairs at D = 768.

    python -m benchmarks.suites.recording                                  one direction, and both
    python -m benchmarks.suites.recording --record results/recording.csv   the same, appended to a CSV file

The same step with and without, in turn and in both orders, on one thread; the ratio is the median of the rounds', of
processor time, which other programs on the machine change least. A learned temperature is timed beside both directions,
whose statistics are made before the gradients: what is recorded is what its gradient is made of.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import record
from fused_infonce import FusedInfoNCELoss

FIELDS = ("date", "commit", "device", "torch", "n", "d", "contestant", "median_ms", "time_ratio")
CPU = torch.device("cpu")


def contestants(symmetric: bool) -> dict[str, FusedInfoNCELoss]:
    """Return the losses of one comparison, the plain one first."""
    name = "both directions" if symmetric else "one direction"
    options: dict[str, Any] = {"temperature": 0.05, "symmetric": symmetric}
    return {
        name: FusedInfoNCELoss(**options), f"{name}, recorded": FusedInfoNCELoss(**options, record=True),
        f"{name}, learned temperature": FusedInfoNCELoss(**options, learnable_temperature=True),
    }  # fmt: skip


def step(loss: Callable[..., Tensor], query: Tensor, key: Tensor) -> float:
    """Return the milliseconds of processor time of a step."""
    query.grad = key.grad = None
    start = time.process_time()
    loss(query, key).backward()
    return 1e3 * (time.process_time() - start)


def play(n: int, d: int, symmetric: bool, rounds: int) -> list[dict[str, Any]]:
    """Time the contestants of one comparison, and return a CSV row for each."""
    losses = contestants(symmetric)
    query, key = (x.requires_grad_() for x in torch.randn(2, n, d))
    values = [loss(query, key).item() for loss in losses.values()]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds):
        for name in list(losses)[:: 1 if number % 2 else -1]:
            times[name].append(step(losses[name], query, key))
    plain = np.array(next(iter(times.values())))
    known = {k: v for k, v in record.provenance(CPU).items() if k in FIELDS}
    return [
        {
            **known, "n": n, "d": d, "contestant": name, "median_ms": f"{np.median(t):.4g}",
            "time_ratio": f"{np.median(np.array(t) / plain):.3f}",
        }
        for name, t in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="append the results to this CSV file, absolute or relative to benchmarks/")
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for symmetric in (False, True):
        rows = play(options.n, options.d, symmetric, options.rounds)
        for row in rows:
            print(*(f"{row[name]!s:>38}" for name in ("contestant", "median_ms", "time_ratio")))
        if options.record:
            record.append(options.record, rows, FIELDS)


if __name__ == "__main__":
    main()
