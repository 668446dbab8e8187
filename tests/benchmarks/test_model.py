"""The model of a GPU follows its rules, and the plans are those that it prefers."""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import ROOT
from benchmarks.tiles import model, pipes

PIPES = dict.fromkeys(pipes.PIPES, 0)
STEP = PIPES | {"issue": 100, "tensor": 500}
EPILOGUE = PIPES | {"issue": 1000, "exponentials": 1500}
# of three bare products, at 16384 x 768; of a learned temperature nothing was asked, and this is what there is
BOUNDS = {"one": 1.12, "both": 1.45, "self": 1.0, "one-learned": 1.55, "both-learned": 1.9, "self-learned": 1.05}


def test_a_tile_alone_and_beside_another():
    """10 steps of 500 cycles, then 1500 of exponentials; two programs are bound by the tensor cores."""
    tile = model.Counts(((10, STEP), (1, EPILOGUE), (0, PIPES | {"alu": 70})), programs=2, loads=0)
    assert (tile.alone(), tile.tile(1), tile.tile(2), tile.besides) == (6500, 6500, 5000, 70)
    assert tile.alone(0.5) == 11500
    short = tile._replace(parts=((2, STEP), (1, EPILOGUE)))
    assert (short.tile(1), short.tile(2)) == (2500, 1500)
    assert tile._replace(loads=6000).tile(2) == 6000
    one_step = tile._replace(parts=((1, PIPES | {"tensor": 400, "alu": 300}),))  # a loop over tiles, not over steps
    assert one_step.alone() == 700


@pytest.mark.parametrize(("rows", "waves"), [(128 * 132, 2), (128 * 133, 2.25), (128 * 66, 1)])
def test_products_run_in_whole_waves(rows, waves):
    """512 columns are two tiles of 128 x 256, four or eight narrower ones, for each 128 rows."""
    a, b = torch.empty(rows, 4096, device="meta"), torch.empty(4096, 512, device="meta")
    machine = model.H200
    tile = 2 * 128 * 256 * 4096 / (machine.product / machine.processors)
    found = model.product(machine, "mm", [a, b], torch.empty(rows, 512, device="meta"))
    assert found.worst == pytest.approx(waves * tile)


def test_few_output_tiles_divide_the_sum():
    a, b = torch.empty(128, 1 << 20, device="meta"), torch.empty(1 << 20, 256, device="meta")
    found = model.product(model.H200, "mm", [a, b], torch.empty(128, 256, device="meta"))
    assert found.worst > 7 * found.expected  # 132 times less work a processor, but no fewer bytes


@pytest.mark.parametrize(
    ("rows", "cols", "block_m", "block_n"),
    [((0, 600), (0, 600), 128, 64), ((256, 513), (0, 1000), 64, 128), ((0, 300), (300, 700), 128, 128)],
)
def test_tiles_of_a_launch_are_those_that_the_kernel_makes(rows, cols, block_m, block_n):
    """As `tile_start` of kernels/coefficients.py says which."""
    every = list(itertools.product(range(*rows, block_m), range(*cols, block_n)))
    meets = [m < n + block_n and n < m + block_m for m, n in every]
    masked = sum(a or n + block_n > cols[1] for a, (_, n) in zip(meets, every, strict=True))
    sizes = {"row_start": rows[0], "row_end": rows[1], "col_start": cols[0], "col_end": cols[1]}
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "C_ptr": None}
    found = [model.made({**sizes, **blocks, "PEEL": peel}, (len(every),)) for peel in ("", "off", "on")]
    assert found == [(n, n) for n in (len(every), len(every) - masked, masked)]
    assert 0 < masked < len(every)


@pytest.fixture(scope="module")
def modelled():
    """In a process of its own: kernels decorated under TRITON_INTERPRET cannot be recorded."""
    half = torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
    try:
        torch.mm(half, half, out_dtype=torch.float32)
    except TypeError:
        pytest.skip("PyTorch 2.9 knows no shape of a product with another dtype")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    sizes = ["--rows", "16384", "--dim", "64", "256", "768", "--triton", *model.TRITONS]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.tiles.model", *sizes], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return list(csv.DictReader(run.stdout.splitlines(), delimiter="\t"))


@pytest.mark.parametrize("triton", model.TRITONS)
@pytest.mark.parametrize("direction", model.DIRECTIONS)
def test_the_chosen_plan_is_the_fastest_by_the_model(direction, triton, modelled):
    for d in ("64", "256", "768"):
        case = (triton, direction, d)
        rows = [row for row in modelled if (row["triton"], row["direction"], row["d"]) == case]
        (chosen,) = (float(row["of_floor"]) for row in rows if row["chosen"] == "True")
        assert chosen <= 1.03 * min(float(row["of_floor"]) for row in rows), rows


@pytest.mark.parametrize("triton", model.TRITONS)
def test_times_of_three_bare_products(triton, modelled):
    case = (triton, "768", "True")
    found = {
        row["direction"]: float(row["of_floor"]) for row in modelled if (row["triton"], row["d"], row["chosen"]) == case
    }
    assert all(0.5 < found[name] <= bound for name, bound in BOUNDS.items()), found
