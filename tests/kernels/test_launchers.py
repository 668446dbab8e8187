"""The launchers of the Triton backend against a dense float64 computation, plan by plan.

Small blocks make a small problem run through every loop: several blocks of coefficients each way, several column
splits, several super-blocks of rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from support.helpers import DEVICE, TRITON, embeddings, error, every_pair, stretch
from support.problems import (
    LIMIT,
    PLANS,
    backend,
    both_plans,
    check,
    dense,
    dense_gradients,
    make,
    natural,
    one_pass,
    problem_of,
    upstream_of,
    with_segments,
)
from torch import Tensor

from fused_infonce.backends.contract import RowStatistics, Temperature
from fused_infonce.backends.plan import Plan

launch = pytest.importorskip(
    "fused_infonce.backends.triton.launch", reason="triton is not installed", exc_type=ImportError
)
kernels = pytest.importorskip("fused_infonce.kernels.statistics", exc_type=ImportError)

pytestmark = list(TRITON.marks) if isinstance(TRITON.marks, (list, tuple)) else [TRITON.marks]


@pytest.fixture(autouse=True)
def where_the_kernels_run():
    with torch.device(DEVICE["triton"]):
        yield


SHAPES = [(1, 1, 20), (1, 17, 1), (2, 15, 16), (15, 2, 33), (16, 16, 32), (17, 33, 70), (33, 127, 20), (129, 33, 7)]


@both_plans
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_ragged_shapes_keep_the_bounds(n, m, d, plan):
    target = None if n <= m else torch.randint(m, (n,))
    check(make(n, m, d, target=target, normalize=d > 1), plan)


@pytest.fixture
def apart(monkeypatch):
    """Every launch is divided into the tiles that need a mask and the others, however few they are."""
    monkeypatch.setattr(launch, "PEELED", 1)


@every_pair(
    call=[
        (70, 129, {}), (33, 96, {}), (64, 64, {"columns": True}), (97, 97, {"columns": True}),
        (40, 77, {"in_batch": False}), (40, 96, {"in_batch": False}),
    ],
    shared_t=[False, True], bounded=[False, True], plan=PLANS,
)  # fmt: skip
def test_tiles_without_a_mask_keep_the_bounds(call, shared_t, bounded, plan, apart):
    n, m, options = call
    problem = make(n, m, 20, **options)
    if shared_t:
        problem = replace(problem, temperature=Temperature(torch.full((1,), 0.3, dtype=torch.float64)))
    if not problem.in_batch:  # keys of no diagonal
        problem = with_segments(problem, m)
    check(problem, replace(plan, bounded=bounded))


@pytest.mark.parametrize("shared", [None, 77, 96])
@pytest.mark.parametrize(("n", "m", "rows"), [(70, 129, 40), (129, 129, 64), (33, 64, 33)])
def test_one_pass_without_a_mask_equals_one_with(n, m, rows, shared, apart, monkeypatch):
    problem = with_segments(make(n, m, 20), shared)
    wanted = [True] * (len(problem.inputs) + 1)
    chosen, weight, found = Plan("onepass", rows, m, LIMIT, 0, "", bounded=True), torch.rand(n), []
    for peeled in (1, 1000):
        monkeypatch.setattr(launch, "PEELED", peeled)
        found.append(one_pass(problem, chosen, weight, wanted))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel", ["coefficients", "exponentials", "statistics"])
@pytest.mark.parametrize(("shared", "want"), [(96, {"off": 9}), (77, {"off": 9, "on": 3})])
def test_keys_of_no_diagonal_have_masks_in_their_last_columns_alone(kernel, shared, want, apart, monkeypatch):
    """Tiles of 32 x 32; where the last is whole, none has a mask, and there is one launch."""
    coefficients, statistics = (
        import_module(f"fused_infonce.backends.triton.{name}") for name in ("coefficients", "statistics")
    )
    launched = {}
    module = statistics if kernel == "statistics" else coefficients
    monkeypatch.setattr(module, "run", lambda _, grid, **options: launched.update({options["PEEL"]: math.prod(grid)}))
    x, y = (launch.Side(torch.empty(n, 20), None, weight=torch.empty(n)) for n in (70, shared))
    block, rows, excluded = coefficients.block_of(x, y, 70, shared), slice(0, 70), launch.Excluded()
    if kernel == "coefficients":
        coefficients.write_coefficients(block, x, y, rows, slice(0, shared), excluded)
    elif kernel == "exponentials":
        coefficients.write_exponentials(block, x, y, rows, excluded, mean=False)
    else:
        statistics.row_states(x, y, excluded, None, LIMIT, unshifted=True, mean=False)
    assert launched == want


@both_plans
@pytest.mark.parametrize("n", [1, 2, 17, 70])
@pytest.mark.parametrize("ids", [False, True])
def test_column_statistics_do_not_depend_on_the_limit(n, ids, plan):
    """A limit of one byte takes every block of rows on its own; the states merge to the same result."""
    problem = with_segments(make(n, n, 20, columns=True), shared=5, ids=ids)
    whole, _ = check(problem, plan)
    parts = backend.statistics(problem, replace(plan, limit=1))
    for x, y in zip(whole.tensors(), parts.tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@every_pair(
    target=[False, True], segments=[(None, None), (21, None), (None, 3), (40, 18)], ids=[False, True],
    in_batch=[True, False], plan=PLANS,
)  # fmt: skip
def test_segments_ids_and_targets_keep_the_bounds(target, segments, ids, in_batch, plan):
    shared, own = segments
    problem = make(18, 35, 20, in_batch=in_batch)
    if target:
        index = torch.randint(-1, 35, (18,))
        index[:5] = torch.tensor([7, 7, -1, 7, 34])  # shared and missing targets
        problem = replace(problem, target=index)
    check(with_segments(problem, shared, own, ids), plan)


def of_itself(n, kind, bounded, **options):
    """Rows against themselves: two views in order, pairs in any order, or no targets but the rows."""
    if kind == "pairs":
        order = torch.randperm(n // 2 * 2)
        a, b = order.chunk(2)
        target = torch.arange(n).scatter(0, torch.cat([a, b]), torch.cat([b, a]))
    else:
        target = torch.arange(n).roll(n // 2) if kind == "views" else None
    problem = make(n, n, 20, target=target, self_similar=True, two_views=kind == "views", **options)
    if bounded:  # where all rows share a temperature, one exponential serves both directions
        problem = replace(problem, temperature=Temperature(torch.full((1,), 0.3, dtype=torch.float64)))
    return replace(problem, keys=(problem.query,))


@every_pair(
    rows=[(70, "views", 1000), (134, "views", 1), (69, "pairs", 1), (97, "alone", 1)],
    normalize=[True, False],
    bounded=[False, True],
    plan=PLANS,
)
def test_self_similarity_gives_one_gradient_for_both_sides(rows, normalize, bounded, plan, monkeypatch):
    """A row is no negative of its own or of its partner; one state serves its row and its column, and one gradient both
    sides. Of 134 rows in tiles of 32 those on three diagonals and the last have launches of their own."""
    n, kind, peeled = rows
    monkeypatch.setattr(launch, "PEELED", peeled)
    problem = of_itself(n, kind, bounded, normalize=normalize)
    plan = replace(plan, rows=70, cols=70, bounded=bounded)  # square blocks, as `choose` makes them
    stats, upstream = backend.statistics(problem, plan), upstream_of(problem)
    for name, x, y in zip(RowStatistics._fields, natural(stats.rows), dense(problem)[1].rows, strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    both, none = backend.gradients(problem, plan, stats, upstream, [torch.float64, None])
    assert none is None
    assert error(both, sum(dense_gradients(problem, upstream))) < 1e-10


@pytest.mark.parametrize(("kind", "peeled"), [("views", 1), ("pairs", 1000)])
def test_half_of_the_scores_are_made_whatever_the_limit(kind, peeled, monkeypatch):
    """And no score twice: with a limit of one byte every block of rows is merged on its own."""
    monkeypatch.setattr(launch, "PEELED", peeled)
    problem, tiles = of_itself(134, kind, bounded=True), []
    add_tile = kernels.add_tile
    monkeypatch.setattr(kernels, "add_tile", lambda *arguments: tiles.append(arguments[4:6]) or add_tile(*arguments))
    plan = replace(PLANS[0], bounded=True)
    whole, again, parts = (backend.statistics(problem, replace(plan, limit=limit)) for limit in (LIMIT, LIMIT, 1))
    if launch.INTERPRETED:
        assert len(tiles) == 3 * 15  # of 5 x 5
    assert all(torch.equal(x, y) for x, y in zip(whole.rows, again.rows, strict=True))
    for x, y in zip(whole.rows, parts.rows, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@both_plans
@pytest.mark.parametrize("wide", [False, True])
def test_many_rows_of_one_target_are_summed_in_steps(plan, wide):
    """The queries of one key are summed in more than one step."""
    check(make(70, 3, 300 if wide else 5, target=torch.full((70,), 1)), plan)


@both_plans
@pytest.mark.parametrize("target", [False, True])
def test_rows_longer_than_a_block_are_finished_in_steps(plan, target, monkeypatch):
    from fused_infonce.backends.triton import tiles

    blocks = []

    def narrow(arch, d, gather):
        blocks.append(d)
        return 4, 32, 4, 4

    monkeypatch.setattr(tiles, "finish_tile", narrow)
    check(make(18, 20, 70, target=torch.randint(20, (18,)) if target else torch.arange(18)), plan)
    assert blocks == [70, 70]


@every_pair(
    rows=[("tight", 0.01), ("medium", 0.02), ("loose", 1.0), ("cone_98", 0.05)], normalize=[True, False],
    dtype=[torch.float32, torch.bfloat16, torch.float16], plan=PLANS,
)  # fmt: skip
def test_tight_loose_and_cone_shaped_rows_keep_the_bounds(rows, normalize, dtype, plan):
    kind, t = rows
    query, key, negative = embeddings(kind, 40, 40, 40, 3)
    low, high = (0.1, 10) if normalize else (0.8, 1.25)
    query, key, negative = (stretch(x, low, high).to(dtype) for x in (query, key, negative))
    temperature = torch.full((1,), t)
    problem = problem_of(
        query, key, temperature, columns=True, normalize=normalize, negatives=(negative,), negative_ids=(None,)
    )
    check(problem, plan, scale=16.0)


@both_plans
def test_strided_tensors_are_read_as_their_copies(plan):
    """Rows with gaps between them, columns in memory order, one row for all, vectors with gaps: what is read is what
    contiguous copies hold."""
    query, key = torch.randn(40, 50, dtype=torch.float64)[3:33:2, 5:25], torch.randn(20, 33, dtype=torch.float64).T
    shared = torch.randn(1, 20, dtype=torch.float64).expand(9, 20)
    own = torch.randn(15, 7, 2, 20, dtype=torch.float64)[:, ::2, 1]
    ids = torch.randint(4, (60,))
    problem = problem_of(
        query, key, torch.full((1,), 0.3, dtype=torch.float64), target=torch.arange(0, 30)[::2],
        negatives=(shared, own),
        row_ids=ids[::4], key_ids=ids[:33], negative_ids=(ids[::6][:9], torch.randint(4, (4, 15)).T),
    )  # fmt: skip
    got = check(problem, plan)
    tensors = [x if x is None else x.contiguous() for x in problem.tensors()]
    torch.manual_seed(0)
    want = check(problem.with_tensors(tensors), plan)
    assert all(torch.equal(x, y) for x, y in zip(got[0].rows, want[0].rows, strict=True))


@both_plans
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_rows_divided_by_powers_of_two_keep_the_bounds(dtype, plan):
    """Rows divided by powers of two beforehand."""
    problem = with_segments(make(17, 20, 20, dtype, normalize=False, t=2.0), 5, 3)
    query, *keys = (
        s._replace(scale=2.0 ** torch.randint(-1, 2, s.rows.shape[:-1]).to(problem.acc_dtype)) for s in problem.sets
    )
    check(replace(problem, query=query, keys=tuple(keys)), plan, scale=16.0)


@both_plans
def test_gradients_that_are_not_wanted_are_not_made(plan):
    problem = with_segments(make(17, 33, 20), 21, 3)
    stats, upstream = backend.statistics(problem, plan), upstream_of(problem)
    every = [torch.float64] * 4
    want = backend.gradients(problem, plan, stats, upstream, every)
    for wanted in ([0], [1], [2], [3], [0, 3], [1, 2], []):
        got = backend.gradients(
            problem, plan, stats, upstream, [torch.float64 if i in wanted else None for i in range(4)]
        )
        for i, (x, y) in enumerate(zip(got, want, strict=True)):
            assert x is None if i not in wanted else torch.equal(x, y)


@both_plans
def test_gradients_come_in_the_dtype_that_is_asked_for(plan):
    problem = make(17, 17, 20, torch.float16)
    stats, upstream = backend.statistics(problem, plan), upstream_of(problem)
    exact = backend.gradients(problem, plan, stats, upstream, [torch.float32, torch.float32])
    half = backend.gradients(problem, plan, stats, upstream, [torch.float16, torch.bfloat16])
    assert [x.dtype for x in exact + half] == [torch.float32, torch.float32, torch.float16, torch.bfloat16]
    assert torch.equal(half[0], exact[0].half())
    assert torch.equal(half[1], exact[1].bfloat16())


@both_plans
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_float16_coefficients_keep_their_range(size, plan):
    """Unscaled, the coefficients of these rows would over- or underflow."""
    query, key, _ = embeddings("loose", 33, 20)
    problem = problem_of((query * size).half(), (key * size).half(), torch.full((1,), 0.1))
    want = dense_gradients(problem, upstream := upstream_of(problem))
    got = backend.gradients(problem, plan, backend.statistics(problem, plan), upstream, [torch.float32] * 2)
    for x, y in zip(got, want, strict=True):
        assert error(x, y) < 5e-3


@both_plans
def test_a_repeated_launch_gives_the_same_bits(plan):
    problem = with_segments(make(33, 33, 20, torch.float32, columns=True), 21, 3, ids=True)
    upstream = upstream_of(problem)

    def once() -> list[Tensor]:
        stats = backend.statistics(problem, plan)
        return [*stats.tensors(), *backend.gradients(problem, plan, stats, upstream, [torch.float32] * 4)]

    first = once()
    for x, y in zip(first, once(), strict=True):
        assert torch.equal(x, y)


@both_plans
def test_inputs_are_left_alone(plan):
    problem = with_segments(make(17, 17, 20, torch.float16, columns=True), 5, 3, ids=True)
    before = [None if x is None else x.clone() for x in problem.tensors()]
    check(problem, plan, scale=16.0)
    for x, y in zip(problem.tensors(), before, strict=True):
        assert x is None or torch.equal(x, y)


def test_streaming_splits_few_rows_over_programs():
    """Partial sums in several slots, no more of them than the limit allows, give the same gradient."""
    from fused_infonce.backends.triton.gradient import gradient_slots
    from fused_infonce.backends.triton.launch import Side

    problem = make(17, 200, 20)
    side = Side(problem.query.rows, None)
    assert gradient_slots(side, side, 200, LIMIT) > 1
    assert gradient_slots(side, side, 200, 1) == 1
    check(problem, PLANS[0])
    check(problem, replace(PLANS[0], limit=1))


def test_a_plan_counts_the_vectors_of_a_state_as_the_kernels_do():
    from fused_infonce.backends.contract import STATE_SLOTS
    from fused_infonce.backends.triton.statistics import SLOTS

    assert STATE_SLOTS == SLOTS
