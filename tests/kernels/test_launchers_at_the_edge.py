"""The launchers of the Triton backend where there is little, nothing, or what is not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.helpers import DEVICE, TRITON, error
from support.problems import (
    backend,
    both_plans,
    check,
    dense,
    dense_gradients,
    make,
    upstream_of,
    with_ids,
    with_segments,
)

from fused_infonce.backends.contract import Upstream

pytest.importorskip("fused_infonce.backends.triton.launch", reason="triton is not installed", exc_type=ImportError)

pytestmark = list(TRITON.marks) if isinstance(TRITON.marks, (list, tuple)) else [TRITON.marks]


@pytest.fixture(autouse=True)
def where_the_kernels_run():
    with torch.device(DEVICE["triton"]):
        yield


@both_plans
@pytest.mark.parametrize(
    ("n", "m", "shared", "own"), [(0, 0, None, None), (0, 5, 3, 2), (3, 0, None, None), (3, 5, 0, 0)]
)
def test_empty_sides_have_no_negatives(n, m, shared, own, plan):
    target = torch.full((n,), -1) if m < n else None
    problem = with_segments(make(n, m, 8, target=target, in_batch=shared is None), shared, own)
    stats, grads = check(problem, plan)
    assert (stats.rows.neg == -math.inf).all()
    assert (stats.rows.mean == 0).all()
    if shared is None:
        assert not any(g.any() for g in grads)


@both_plans
def test_rows_without_negatives_have_a_logsumexp_of_minus_infinity(plan):
    problem = with_ids(make(5, 5, 8), torch.zeros(5).long(), torch.zeros(5).long())
    stats, _ = check(problem, plan)
    assert (stats.rows.neg == -math.inf).all()


@both_plans
def test_a_zero_row_has_no_gradient_and_disturbs_no_other(plan):
    """A zero row has no gradient and does not disturb the others, whatever the temperature."""
    problem = make(9, 9, 20, torch.float32, t=0.01, columns=True)
    query, key = problem.inputs
    query[3] = 0
    key[[1, 4]] = 0
    key[4, 0] = 1e-13  # below EPS, but a logit of up to 10
    query[4, 0] = -3
    stats = backend.statistics(problem, plan)
    torch.testing.assert_close(stats.rows.neg.double(), dense(problem)[1].rows.neg.detach(), rtol=1e-5, atol=1e-3)
    dq, dk = backend.gradients(problem, plan, stats, upstream_of(problem), [torch.float32] * 2)
    assert dq.isfinite().all()
    assert dk.isfinite().all()
    assert not dq[3].any()
    assert not dk[[1, 4]].any()
    assert dq[[0, 1, 2]].any(1).all()


@both_plans
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(value, plan):
    for side, normalize in ((0, True), (1, True), (0, False), (1, False), (3, True)):
        problem = with_segments(make(5, 6, 8, normalize=normalize, target=torch.tensor([0, 1, 2, 2, -1])), 3, 2)
        x = problem.inputs[side]
        x[2, ..., 3] = value
        stats = backend.statistics(problem, plan)
        sees = torch.arange(5) == 2 if side in (0, 3) else torch.tensor([True, True, False, False, True])
        assert torch.equal(stats.rows.neg.isnan(), sees), (side, normalize)
        assert torch.equal(stats.rows.mean.isnan(), sees)
        if side < 2:
            missing = torch.arange(5) == 2 if side == 0 else torch.tensor([False, False, True, True, False])
            assert torch.equal(~stats.rows.pos.isfinite(), missing)
        grads = backend.gradients(problem, plan, stats, upstream_of(problem), [torch.float64] * 4)
        assert grads[0][sees].isnan().all()


@both_plans
def test_infinitely_small_logits_show(plan):
    """An overflow to -inf is an error, not a probability of 0."""
    problem = make(3, 3, 2, torch.float32, normalize=False)
    query, key = problem.inputs
    query[0], key[1] = torch.tensor([1e30, 0.0]), torch.tensor([-1e30, 0.0])
    stats = backend.statistics(problem, plan)
    assert stats.rows.neg.isnan().tolist() == [True, False, False]


@both_plans
def test_a_target_out_of_range_makes_its_row_alone_nan(plan):
    """That row alone is NaN, and nothing is read or written for it."""
    problem = make(4, 5, 8, target=torch.tensor([1, 5, -7, 1 << 40]))
    stats = backend.statistics(problem, plan)
    assert stats.rows.pos.isnan().tolist() == [False, True, True, True]
    assert stats.rows.neg.isfinite().all()
    upstream = Upstream(torch.ones(4).double(), torch.ones(4).double())
    grads = backend.gradients(problem, plan, stats, upstream, [torch.float64] * 2)
    valid = replace(problem, target=torch.tensor([1, -1, -1, -1]))
    for x, y in zip(grads, dense_gradients(valid, upstream), strict=True):
        assert error(x, y) < 1e-12
