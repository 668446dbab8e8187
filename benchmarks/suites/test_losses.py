"""Every exported loss beside its dense form at 64, 256 and 1024 rows: fp32, forward and backward, on a CPU.

    pytest benchmarks/suites/test_losses.py --benchmark-only [--record results/cpu.csv]

It takes less than a minute, and comes before the microbenchmarks, whose last cases give way to it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import record
from benchmarks.contest import Contest
from benchmarks.losses import LossCase, cases

CPU = torch.device("cpu")
ROUNDS = {64: 41, 256: 31, 1024: 9}


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels of every loss would be compiled for minutes: make bench is of a CPU"
)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_each_loss(benchmark: Any, case: LossCase, request: pytest.FixtureRequest) -> None:
    """Time one loss at one size, and record it if asked to."""
    run = Contest(case, CPU, case.contestants())
    run.agree()
    benchmark.group = str(case)
    benchmark.pedantic(run.ours, setup=run.round, rounds=ROUNDS[case.n], warmup_rounds=3)
    results = run.rows(benchmark.stats.stats.data)
    for row in results:
        benchmark.extra_info[row["contestant"]] = f"{row['median_ms']} ms"
    if path := request.config.getoption("--record"):
        record.append(path, results)
