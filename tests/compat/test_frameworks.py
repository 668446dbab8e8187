"""The snippets of docs/distributed.md in real trainings: two processes end with the weights of one with all rows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support import frameworks
from support.libraries import REQUIRED

LIMIT = 180  # seconds
pytestmark = pytest.mark.skipif(not REQUIRED, reason="make test-compat runs it, with the frameworks")


def run(framework, folder, *launcher):
    command = [sys.executable, *launcher, frameworks.__file__, framework, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("framework", frameworks.FRAMEWORKS)
def test_two_processes_train_as_one_with_all_rows(framework, tmp_path):
    run(framework, tmp_path)
    run(framework, tmp_path, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    (start, one), (same, two) = (torch.load(tmp_path / world) for world in ("1", "2"))
    for name, x in one.items():
        assert start[name].equal(same[name])
        moved = x - start[name]
        assert moved.abs().max() > 1e-6
        assert (two[name] - x).norm() <= 1e-3 * moved.norm()
