"""A profile of what no sweep asks for: rows against one another, a guide, several sets and tables, in parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import make, with_segments

from fused_infonce import contrast
from fused_infonce.backends import Options
from fused_infonce.backends.contract import KeySet, Problem
from fused_infonce.backends.ladder import Ladder, Profile

# of CPU tensors, which compiled kernels cannot read
both_backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
LADDER = Ladder.over(0.03, 1.0)


def assert_same(found: Profile, want: Profile, tolerance: float = 1e-12) -> None:
    for name, x, y in zip(Profile._fields, found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * 30, msg=lambda m, n=name: f"{n}: {m}")


def views(n: int) -> Problem:
    rows = torch.randn(n, 6, dtype=torch.float64)
    target = (torch.arange(n) + n // 2) % n
    return replace(
        make(n, n, 6), query=KeySet(rows), keys=(KeySet(rows),), target=target, self_similar=True, two_views=True
    )  # fmt: skip


def guided(n: int, m: int) -> Problem:
    problem = make(n, m, 5, target=torch.arange(n) % m)
    query, key = (x._replace(guide=torch.randn(len(x.rows), 4, dtype=torch.float64)) for x in problem.sets)
    return replace(problem, query=query, keys=(key,), ceiling=torch.rand(n, dtype=torch.float64) / 2)


def table(n: int) -> Problem:
    rows, index = torch.randn(9, 6, dtype=torch.float64), torch.randint(-1, 9, (n, 4))
    problem = make(n, n, 6)
    return replace(problem, keys=(*problem.keys, KeySet(rows, indices=index)))


PROBLEMS = {
    "views": lambda: views(20),
    "views in many tiles": lambda: views(100),
    "guided": lambda: guided(40, 35),
    "sets with ids": lambda: with_segments(make(35, 40, 5, target=torch.arange(35)), shared=3, own=2, ids=True),
    "only other keys": lambda: with_segments(make(6, 6, 5, in_batch=False), shared=50),
    "only own keys": lambda: with_segments(make(6, 6, 5, in_batch=False), own=4),
    "many columns": lambda: make(3, 700, 5, target=torch.tensor([699, 0, 31])),
    "a row without a target": lambda: make(3, 4, 5, target=torch.tensor([-1, 0, 2])),
}


@both_backends
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_that_of_the_reference(name, backend):
    problem = PROBLEMS[name]()
    want = contrast.profile(problem, Options("reference"), LADDER)
    for limit in (3000, None):
        found = contrast.profile(problem, Options(backend, limit), LADDER)
        assert_same(found, want)


def test_keys_by_their_places_in_a_table():
    problem = table(5)
    assert_same(*(contrast.profile(problem, Options(name), LADDER) for name in ("torch", "reference")))


@pytest.mark.interpreter
def test_keys_by_their_places_in_a_table_are_refused_by_the_kernels():
    problem = table(5)
    with pytest.raises(ValueError, match="in a table have no kernel for sweeps: pass backend='torch'"):
        contrast.profile(problem, Options("triton"), LADDER)


@both_backends
def test_a_ladder_of_one_rung_and_one_of_an_even_number(backend):
    problem = make(5, 7, 4, target=torch.arange(5))
    for ladder in (Ladder.over(0.1, 0.1), Ladder.over(0.08, 0.1), Ladder.over(0.01, 2.0)):
        want = contrast.profile(problem, Options("reference"), ladder)
        assert want.log_z.shape == (ladder.rungs, 5)
        assert_same(contrast.profile(problem, Options(backend), ladder), want)


@both_backends
def test_columns_without_keys(backend):
    problem = make(3, 0, 4, target=torch.full((3,), -1))
    assert_same(
        contrast.profile(problem, Options(backend), LADDER), contrast.profile(problem, Options("reference"), LADDER)
    )


def test_torch_compile_is_told_that_it_cannot_record_one():
    problem = make(3, 4, 5, target=torch.arange(3))
    from fused_infonce.backends.operators import Recorded

    with pytest.raises(RuntimeError, match=r"torch\.compile cannot record a sweep or a fit"):
        Recorded("torch").profile(problem, None, LADDER)  # type: ignore[arg-type]
