"""Tiles whose rows are loaded by warps of their own, which the tuning tries, give what loads through pointers give."""

from __future__ import annotations

import pytest
import torch
from support.helpers import every_pair, newer_interpreter
from support.problems import LIMIT, backend, make, one_pass, upstream_of
from torch import Tensor

from fused_infonce.backends.contract import Problem
from fused_infonce.backends.plan import Plan
from fused_infonce.backends.triton import coefficients, launch, tiles

pytest.importorskip("triton", reason="triton is not installed")
# for a GPU: benchmarks/tiles/tune.py, which compares every candidate with the table's tile
pytestmark = [pytest.mark.interpreter, newer_interpreter]


@pytest.fixture
def apart(monkeypatch):
    """Turns the candidate on or off; what it returns has (APART, PEEL) of every launch since."""
    launched: list[tuple[bool, str]] = []
    arch, run = tiles.INTERPRETER, launch.run
    table = tiles.TABLE[arch]

    def counted(kernel, grid, **arguments):
        launched.append((arguments["APART"], arguments["PEEL"]))
        run(kernel, grid, **arguments)

    def switch(on: bool) -> list[tuple[bool, str]]:
        tile = tiles.Tile(32, 32, 32, 4, 1, apart=on)
        monkeypatch.setitem(tiles.TABLE, arch, {**table, "coefficients": {"half": ((None, tile),)}})
        launched.clear()
        return launched

    monkeypatch.setattr(coefficients, "run", counted)
    monkeypatch.setattr(launch, "PEELED", 2)
    return switch


def results(problem: Problem, plan: Plan) -> list[Tensor]:
    torch.manual_seed(0)
    if plan.one_pass:
        found = one_pass(problem, plan, torch.rand(len(problem.query.rows)), [True] * 3)
        return [x for x in found if x is not None]
    stats = backend.statistics(problem, plan)
    return backend.gradients(problem, plan, stats, upstream_of(problem), [problem.acc_dtype] * 2)


@every_pair(name=["workspace", "onepass"], targets=[False, True], dtype=[torch.bfloat16, torch.float64])
def test_the_bits_of_pointer_loads(name, targets, dtype, apart):
    """Where some tiles meet the diagonal and have a launch of their own, and with targets, where none has."""
    plan = Plan(name, 64, 96, LIMIT, 0, "", bounded=True)
    problem = make(70, 70, 40, dtype, target=torch.randint(70, (70,)) if targets else None)
    apart(False)
    want = results(problem, plan)
    launched = apart(True)
    got = results(problem, plan)
    assert set(launched) == ({(True, "")} if targets else {(True, "off"), (False, "on")})
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
