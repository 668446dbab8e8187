"""Tiles loaded through tensor descriptors give what the loads through pointers give."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from support.helpers import every_pair, newer_interpreter
from support.problems import LIMIT, PLANS, backend, both_plans, check, make, one_pass, upstream_of, with_segments
from torch import Tensor

from fused_infonce.backends.contract import KeySet, Problem
from fused_infonce.backends.plan import Plan
from fused_infonce.backends.triton import launch, tiles

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.interpreter, newer_interpreter]  # for a GPU: tests/gpu/test_compiled_kernels.py


@pytest.fixture
def tma(monkeypatch):
    """Turns descriptors on or off; what it returns counts the launches with them."""
    counts = []
    arguments = launch.pair_arguments

    def counted(*args, **options):
        result = arguments(*args, **options)
        counts.append(result["TMA"])
        assert result["TMA"] == (not isinstance(result["X_ptr"], Tensor)) == (not isinstance(result["Y_ptr"], Tensor))
        return result

    def switch(on: bool) -> list[bool]:
        monkeypatch.setattr(tiles, "FORCE_TMA", on)
        counts.clear()
        return counts

    for launcher in ("statistics", "gradient", "coefficients"):
        monkeypatch.setattr(import_module(f"fused_infonce.backends.triton.{launcher}"), "pair_arguments", counted)
    return switch


def run(problem: Problem, plan: Plan, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    stats = backend.statistics(problem, plan)
    grads = backend.gradients(problem, plan, stats, upstream_of(problem), [problem.acc_dtype] * len(problem.inputs))
    return [x for x in (*stats.tensors(), *grads) if x is not None]


def same(problem: Problem, plan: Plan, tma) -> None:
    """Bit for bit: the same numbers reach the same products."""
    tma(False)
    want = run(problem, plan)
    counts = tma(True)
    got = run(problem, plan)
    assert counts
    assert all(counts)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@every_pair(
    shape=[(1, 1), (1, 17), (17, 33), (127, 17), (33, 127)], d=[24, 40, 64],
    dtype=[torch.bfloat16, torch.float32, torch.float64], plan=PLANS,
)  # fmt: skip
def test_ragged_shapes_give_the_bits_of_pointer_loads(shape, d, dtype, plan, tma):
    n, m = shape
    target = None if n <= m else torch.randint(m, (n,))
    same(make(n, m, d, dtype, target=target), plan, tma)


@pytest.mark.parametrize(("plan", "limit"), zip(PLANS, [1, LIMIT], strict=True))
def test_columns_ids_and_segments_give_the_bits_of_pointer_loads(limit, plan, tma):
    """Also in super-blocks of rows that start inside of a tensor."""
    problem = with_segments(make(70, 70, 24, torch.float32, columns=True), 21, 3, ids=True)
    same(problem, replace(plan, limit=limit), tma)


@both_plans
def test_descriptors_keep_the_bounds(plan, tma):
    counts = tma(True)
    check(with_segments(make(33, 70, 40), 21, ids=True), plan)
    assert all(counts)


def test_one_pass_gives_the_bits_of_pointer_loads(tma):
    plan = Plan("onepass", 40, 40, LIMIT, 0, "")
    for dtype in (torch.bfloat16, torch.float32):
        problem = make(70, 33, 24, dtype, target=torch.randint(33, (70,)))
        weight, results = torch.rand(70), []
        for on in (False, True):
            counts = tma(on)
            results.append(one_pass(problem, plan, weight, [True] * 3))
            assert set(counts) == {on}
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(("plan", "value"), zip(PLANS, [math.nan, math.inf], strict=True))
def test_what_is_not_finite_shows(value, plan, tma):
    """In the rows that see it alone: blocks of coefficients end inside of the tensors."""
    for side in (0, 1):
        problem = make(70, 70, 24, torch.float32)
        problem.inputs[side][50, 3] = value
        same(problem, plan, tma)


def test_rows_with_gaps_need_no_copy(tma):
    """Strides that are multiples of 16 bytes need no copy, whatever lies between the rows."""
    wide = torch.full((40, 80), math.nan)
    wide[:, 16:48] = torch.randn(40, 32)
    problem = make(20, 40, 32, torch.float32)
    problem = replace(problem, keys=(KeySet(wide[:, 16:48]),))
    assert launch.padded_rows(problem.inputs[1]) is None
    same(problem, PLANS[0], tma)


def described(key: Tensor, plan: Plan, tma) -> list[bool]:
    """Return which launches over these keys load through descriptors."""
    assert not launch.describable(key)
    problem = make(20, 40, key.shape[1], torch.float32)
    problem = replace(problem, keys=(KeySet(key),))
    counts = tma(True)
    check(problem, plan)
    assert counts
    return counts


@pytest.mark.parametrize(
    "key", [torch.randn(40, 33)[:, :32], torch.randn(40 * 32 + 1)[1:].view(40, 32), torch.randn(40, 17)],
    ids=["stride", "base", "odd"],
)  # fmt: skip
@both_plans
def test_unaligned_rows_are_copied_first(key, plan, tma):
    assert all(described(key, plan, tma))


@pytest.mark.parametrize(
    "key", [torch.randn(1, 32).expand(40, 32), torch.randn(40 * 32).as_strided((40, 32), (16, 1))],
    ids=["expanded", "overlapping"],
)  # fmt: skip
@both_plans
def test_rows_that_share_memory_take_the_pointers(key, plan, tma):
    assert not any(described(key, plan, tma))


def test_empty_rows_take_the_pointers():
    assert not launch.describable(torch.empty(0, 24))
    assert not launch.describable(torch.empty(4, 0))


def test_a_triton_without_descriptors_takes_the_pointers(monkeypatch, tma):
    monkeypatch.setattr(launch, "TensorDescriptor", None)
    counts = tma(True)
    check(make(17, 33, 24), PLANS[0])
    assert not any(counts)


def test_the_table_is_overruled_only_where_there_are_descriptors(monkeypatch):
    for force in (None, False, True):
        monkeypatch.setattr(tiles, "FORCE_TMA", force)
        for arch in tiles.TABLE:
            for dtype in tiles.CLASSES:
                there = arch == "interpreter" or (arch in ("sm_90", "sm_100") and dtype.itemsize == 2)
                assert tiles.tile(arch, "statistics", dtype, 128).tma == (bool(force) and there)


@pytest.mark.parametrize(("setting", "want"), [(None, None), ("0", False), ("1", True)])
def test_the_environment_overrules_the_table(setting, want, monkeypatch):
    """Read once, at import."""
    name = "FUSED_INFONCE_TMA"
    monkeypatch.delenv(name, raising=False) if setting is None else monkeypatch.setenv(name, setting)
    spec = importlib.util.find_spec("fused_infonce.backends.triton.tiles")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert want is module.FORCE_TMA


def test_the_environment_says_0_or_1(monkeypatch):
    monkeypatch.setenv("FUSED_INFONCE_TMA", "true")
    with pytest.raises(ValueError, match="FUSED_INFONCE_TMA must be 0 or 1, got 'true'"):
        tiles.forced_tma()
