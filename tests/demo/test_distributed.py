"""The demo of two processes, small: it runs to its end, and two processes train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the demo's packages are absent")
pytest.importorskip("sklearn", reason="the demo's packages are absent")
pytest.importorskip("tqdm", reason="the demo's packages are absent")
pytest.importorskip("torch.distributed", reason="this PyTorch has no torch.distributed")

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "examples.distributed"),
        *(
            "--source",
            str(ROOT / "fused_infonce" / "backends"),
            "--output",
            str(tmp_path),
            "--steps",
            "3",
            "--batch",
            "16",
        ),
        *("--dim", "8", "--held-out", "2"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "distributed.json").read_text())
    assert report["processes"] == 2
    assert report["largest_difference"] < 1e-4
    assert [len(run["losses"]) for run in report["runs"].values()] == [3, 3, 3]
    assert (tmp_path / "distributed.png").stat().st_size > 1000
