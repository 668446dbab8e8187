"""The host's work of a small call on a GPU, whose launches are stood in for, is less than that of the dense loss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOAL, BUSY = 0.6, 1.25  # of the dense loss's time, and what a busy machine may add

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.serial
def test_a_small_call_takes_less_of_the_host_than_the_dense_loss():
    """In a process of its own: kernels decorated under TRITON_INTERPRET cannot be compiled."""
    command = [sys.executable, "-m", "benchmarks.tiles.host_time", "--dims", "128"]
    environment = {**os.environ, "TRITON_INTERPRET": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.rsplit(maxsplit=5) for line in run.stdout.splitlines()[1:]]
    assert [name for name, *_ in rows] == [
        "one direction", "both directions", "self-similarity", "learned temperature"
    ]  # fmt: skip
    for name, *_, ratio, kernels in rows:
        assert float(ratio) <= GOAL * BUSY, name
        assert int(kernels) == 4, name
