"""A test that breaks the GPU's context fails, and no other, with a PyTorch that has nothing but the GPU's errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TORCH = """
class cuda:
    broken = False
    is_initialized = staticmethod(lambda: True)

    @staticmethod
    def synchronize():
        if cuda.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
TESTS = """
import pytest, torch

@pytest.mark.parametrize("i", range(6))
def test(i):
    torch.cuda.synchronize()
    torch.cuda.broken = i == 2  # found out only when something waits for the GPU
"""


@pytest.mark.parametrize(
    ("arguments", "failed", "passed"),
    [
        (["-n", "2", "--dist", "worksteal"], {"2"}, {"0", "1", "3", "4", "5"}),
        (["-p", "no:xdist"], {"2"}, {"0", "1"}),
    ],
    ids=["in processes", "in one"],
)
def test_the_tests_after_it_are_not_blamed(arguments, failed, passed, tmp_path):
    if "-n" in arguments:
        pytest.importorskip("xdist")
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(
        "from support.broken_context import pytest_runtest_call, pytest_runtest_protocol"
    )
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    run = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    for outcome, want in (("FAILED", failed), ("PASSED", passed)):
        assert set(re.findall(rf"^{outcome} test_it.py::test\[(\d)\]", run.stdout, re.MULTILINE)) == want
    assert "illegal memory access" in run.stdout
    assert ("the tests after it were not run" in run.stdout) is ("-n" not in arguments)
