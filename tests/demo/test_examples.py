"""Every script of examples/ runs, as a stranger runs it, in a folder of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "__init__.py")
NEEDS = {"sentence_transformers_trainer.py": ("sentence_transformers", "datasets", "accelerate")}


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script)]
    # The interpreter would run the kernels on the CPU, which is for tests and takes minutes.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs(script: str, tmp_path: Path) -> None:
    done = run(script, tmp_path)
    missing = [name for name in NEEDS.get(script, ()) if importlib.util.find_spec(name) is None]
    if missing:
        assert done.returncode == 1
        assert "pip install" in done.stderr
        pytest.skip(f"{script} said that it needs {', '.join(missing)}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir())


def test_no_example_hides_a_library_from_the_others() -> None:
    # The folder of a script comes first on Python's path.
    names = {script.removesuffix(".py") for script in SCRIPTS}
    assert names.isdisjoint({"sentence_transformers", "open_clip", "lightly", "info_nce", "torch", "fused_infonce"})
