"""Microbenchmarks of the loss: forward, and forward with backward, beside the dense loss and the bare matmuls.

pytest benchmarks --benchmark-only                              a few sizes, on the GPU if there is one
pytest benchmarks --benchmark-only --record results/cpu.csv     and append them to a CSV file under benchmarks/
"""

from __future__ import annotations

from pathlib import Path

import contest
import pytest
import torch
from contest import Contest
from contestants import Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {
    "cpu": [(64, 128), (256, 256), (1024, 256), (4096, 768), (8192, 768), (16384, 384)],
    "cuda": [(1024, 256), (8192, 768), (32768, 768)],
}[DEVICE.type]
DTYPES = {"cpu": ["float32"], "cuda": ["bfloat16", "float32"]}[DEVICE.type]
MODES = {"cpu": lambda n: ("fwd_bwd",) if n > 1024 else ("fwd", "fwd_bwd"), "cuda": lambda n: ("fwd", "fwd_bwd")}


def case(direction: str, n: int, d: int, dtype: str, mode: str) -> Case:
    rows = n // 2 if direction == "self" else n  # n rows in all
    return Case(direction, rows, rows, d, dtype, mode)


CASES = [
    case(direction, n, d, dtype, mode)
    for n, d in SIZES
    for dtype in DTYPES
    for direction in ("one", "symmetric", "self")
    for mode in MODES[DEVICE.type](n)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss(benchmark, case: Case, request: pytest.FixtureRequest) -> None:
    run = Contest(case, DEVICE)
    run.agree()
    rounds = 5 if case.n >= 2048 else 31
    benchmark.group = str(case)
    benchmark.pedantic(run.ours, setup=run.round, rounds=rounds, warmup_rounds=1)
    rows = run.rows(benchmark.stats.stats.data)
    for row in rows:
        benchmark.extra_info[row["contestant"]] = f"{row['median_ms']} ms, {row['floor_ratio']} times the floor"
    if record := request.config.getoption("--record"):
        contest.append(Path(__file__).parent / record, rows)
