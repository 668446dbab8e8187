"""The kernels compile for every target without a GPU, with tensor-core instructions and without spills."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILE = ROOT / "tests" / "support" / "ahead_of_time.py"
AOT = [sys.executable, "-m", "benchmarks.tiles.aot"]
RECORD = ROOT / "benchmarks" / "results" / "tiles.csv"
DESCRIBED = {"statistics_kernel", "gradient_kernel", "coefficients_kernel", "exponentials_kernel"}
TILED = DESCRIBED | {"dense_scores_kernel", "dense_gradient_kernel"}
FORWARD = {"profile_kernel"}  # tiled too, but for no loss

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.serial, pytest.mark.timeout(600)]  # compiles on all cores


@pytest.fixture(scope="module")
def compiled():
    """In a process of its own: kernels decorated under TRITON_INTERPRET cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(COMPILE)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def kernels():
    """The names of all kernels, from the sources."""
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return {
        line.split()[1].split("(")[0] for line in text.splitlines() if line.startswith("def ") and "_kernel(" in line
    }


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *[(target, "bfloat16") for target in ("sm_80", "sm_90", "sm_100", "gfx942")],
        *[(target, "float32") for target in ("sm_90", "gfx942")],
    ],
)
class TestDefaults:
    def results(self, compiled, target, dtype):
        return [result for result in compiled if (result["target"], result["dtype"]) == (target, dtype)]

    def test_every_kernel(self, compiled, target, dtype):
        assert {result["kernel"] for result in self.results(compiled, target, dtype)} == kernels()

    def test_no_spills(self, compiled, target, dtype):
        assert not [result for result in self.results(compiled, target, dtype) if result["spilled_bytes"]]

    def test_shared_memory_fits(self, compiled, target, dtype):
        for result in self.results(compiled, target, dtype):
            assert result["shared_kib"] <= result["shared_limit_kib"], result

    def test_tensor_cores(self, compiled, target, dtype):
        """Of 16-bit tiles; float32 ones are multiplied in IEEE arithmetic, for which only AMD's matrix cores do."""
        for result in self.results(compiled, target, dtype):
            if result["kernel"] in TILED | FORWARD:
                assert bool(result["tensor_core"]) == (dtype == "bfloat16" or target == "gfx942"), result

    def test_tensor_descriptors(self, compiled, target, dtype):
        """Every kernel over many 16-bit tiles also compiles to TMA loads where there are any, and to none unasked."""
        described = [result for result in self.results(compiled, target, dtype) if result["tma"]]
        there = dtype == "bfloat16" and target in ("sm_90", "sm_100")
        assert {result["kernel"] for result in described} == (DESCRIBED if there else set())
        for result in self.results(compiled, target, dtype):
            assert bool(result["tma_loads"]) == (result["tma"] or result["apart"]), result


def test_warps_apart(compiled):
    """A tile that asks for them gets them: the compiler may leave them out without a word."""
    assert {(r["target"], r["kernel"]) for r in compiled if r["apart"]} == {
        (target, "exponentials_kernel") for target in ("sm_90", "sm_100")
    }


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_tensor_cores_multiply_float32_rows_where_tf32_is_allowed(compiled, target):
    """In tiles of their own, larger than those of IEEE arithmetic. A gradient holds rows too long for Hopper's, and of
    few scores too few rows: theirs are the older instructions, which alone take factors as they lie in memory."""
    results = [result for result in compiled if (result["target"], result["dtype"]) == (target, "tf32")]
    assert {result["kernel"] for result in results} == TILED
    for result in results:
        assert not result["spilled_bytes"], result
        assert result["shared_kib"] <= result["shared_limit_kib"], result
        if result["kernel"] not in ("gradient_kernel", "dense_gradient_kernel"):
            assert result["tensor_core"], result
            assert result["block_m"] * result["block_n"] > 64 * 64


def test_the_recorded_table_is_of_these_sources():
    """Regenerate it with `make tiles`."""
    environment = {**os.environ, "TRITON_INTERPRET": ""}
    sources = subprocess.run([*AOT, "--hash"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    with RECORD.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["sources"] for row in rows} == {sources.stdout.strip()}


def test_the_recorded_table_fits_its_targets():
    """Every tile in shared memory; 16-bit kernels on sm_90 with both Tritons, tiles of one direction elsewhere, and
    float32 ones of those GPUs that no test compiles them for, without spills.

    On sm_90 the last pass over a gradient may spill 8 bytes where rows are not aligned: it waits for memory, and
    with any number of warps the assembler does so at some length of rows.
    """
    with RECORD.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} == kernels()
    assert {row["triton"] for row in rows if row["target"] == "sm_90"} == {"3.6.0", "3.7.1"}
    assert {row["target"] for row in rows if row["tma"] == "True"} == {"sm_90", "sm_100"}
    for row in rows:
        assert float(row["shared_kib"]) <= float(row["shared_limit_kib"]), row
        if row["dtype"] in ("bfloat16", "float16"):
            assert row["tensor_core"] or row["kernel"] not in TILED | FORWARD, row
            if row["target"] == "sm_90" or row["variant"] in ("plain", "profile"):
                most = 8 if (row["kernel"], row["d"]) == ("finish_kernel", "200") else 0
                assert int(row["spilled_bytes"]) <= most, row
        if row["dtype"] == "float32" and row["target"] in ("sm_80", "sm_90", "sm_100"):
            assert not row["tensor_core"], row
            assert row["spilled_bytes"] == "0", row
        assert (int(row["tma_loads"]) > 0) == (row["tma"] == "True"), row
