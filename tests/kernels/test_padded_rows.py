"""Rows that Triton would read an element at a time are copied, with zeros after them, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.helpers import DEVICE, TRITON
from support.problems import LIMIT, backend, both_plans, check, make, one_pass, problem_of, upstream_of, with_segments
from torch import Tensor

from fused_infonce.backends.contract import KeySet, Problem
from fused_infonce.backends.plan import Plan

pytest.importorskip("fused_infonce.backends.triton", reason="triton is not installed", exc_type=ImportError)

from fused_infonce.backends.triton.launch import padded_rows
from fused_infonce.backends.triton.rows import side

pytestmark = list(TRITON.marks) if isinstance(TRITON.marks, (list, tuple)) else [TRITON.marks]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def where_the_kernels_run():
    with torch.device(DEVICE["triton"]):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (torch.randn(33, 100), 112), (torch.randn(1, 1), 16), (torch.randn(5, 312), 320),
        (torch.randn(5, 1030), 1040), (torch.randn(5, 33)[:, :32], 32), (torch.randn(5 * 32 + 1)[1:].view(5, 32), 32),
        (torch.randn(17, 9).T, 32),
    ],
    ids=["100", "1", "312", "1030", "stride", "base", "transposed"],
)  # fmt: skip
def test_copies_are_aligned_and_end_in_zeros(rows, width, normalize, dtype):
    whole = torch.empty(rows.untyped_storage().nbytes() // 4, dtype=dtype)  # of the same strides
    x = whole.as_strided(rows.shape, rows.stride(), rows.storage_offset()).copy_(rows)
    found, _ = side(KeySet(x), normalize)
    assert found.rows.shape == (len(x), width)
    assert padded_rows(found.rows) is None
    assert torch.equal(found.rows, F.pad(x, (0, width - x.shape[1])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 64, 112, 768])
def test_rows_that_are_aligned_are_not_copied(d, dtype):
    x = torch.randn(5, 2 * d).to(dtype)
    for rows in (x, x[:, :d], x[2:, d:]):
        assert side(KeySet(rows), True)[0].rows is rows


def results(problem: Problem, plan: Plan) -> list[Tensor]:
    if plan.name == "onepass":
        wanted = [True] * (len(problem.inputs) + 1)
        loss, logits, *grads = one_pass(problem, plan, 1 / len(problem.inputs[0]), wanted)
        return [x for x in (*grads, loss, logits) if x is not None]
    torch.manual_seed(0)
    found = backend.statistics(problem, plan)
    dtypes = [x.dtype for x in problem.inputs]
    return [*backend.gradients(problem, plan, found, upstream_of(problem), dtypes), *found.tensors()]


PLANS = [Plan(name, 40, 40, LIMIT, 0, "", bounded=True) for name in ("streaming", "workspace", "onepass")]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize(
    ("n", "m", "d", "dtype", "normalize"),
    [(17, 33, 7, torch.bfloat16, True), (33, 17, 20, torch.float32, False), (17, 17, 100, torch.float64, True)],
    ids=str,
)
def test_padding_by_hand_gives_the_same_bits(n, m, d, dtype, normalize, plan):
    target, t = (torch.randint(m, (n,)) if n > m else None), (0.3 if normalize else 20.0)
    problem = with_segments(make(n, m, d, dtype, t, target=target, normalize=normalize), shared=21, own=3)
    sets = [s._replace(rows=F.pad(s.rows, (0, -d % 16))) for s in problem.sets]
    by_hand = replace(problem, query=sets[0], keys=tuple(sets[1:]))
    got, want = results(problem, plan), results(by_hand, plan)
    for x, grad, padded in zip(problem.inputs, got, want, strict=False):
        assert grad.shape == x.shape
        assert grad.is_contiguous()
        assert torch.equal(grad, padded[..., :d])
    for x, y in zip(got[len(problem.inputs) :], want[len(problem.inputs) :], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@both_plans
def test_a_guide_of_any_width_keeps_the_bounds(plan):
    """The guide leaves out the same pairs as one padded by hand."""
    query, key, guide = torch.randn(33, 20), torch.randn(33, 20), torch.randn(33, 5)
    ceiling, t = torch.full((33,), 0.5), torch.full((1,), 0.1)
    found = [
        results(problem_of(query, key, t, guides=[g, g.clone()], ceiling=ceiling), plan)
        for g in (guide, F.pad(guide, (0, 11)))
    ]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert not torch.equal(found[0][0], results(problem_of(query, key, t), plan)[0])


@both_plans
@pytest.mark.parametrize("d", [1, 15, 33])
def test_ragged_rows_keep_the_bounds(d, plan):
    check(with_segments(make(33, 33, d, columns=True, normalize=d > 1), 21, 3, ids=True), plan)
