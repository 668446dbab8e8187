"""The queries of one key are summed in parts of a fixed length, and the parts in their order, however many they are."""

from __future__ import annotations

import pytest
import torch
from support.helpers import DEVICE, TRITON
from torch import Tensor

pytest.importorskip("fused_infonce.backends.triton", reason="triton is not installed", exc_type=ImportError)

from fused_infonce.backends.triton import finish
from fused_infonce.backends.triton.finish import PART, partners_by_target
from fused_infonce.backends.triton.launch import Side, run
from fused_infonce.kernels.finish import parts_kernel

pytestmark = list(TRITON.marks) if isinstance(TRITON.marks, (list, tuple)) else [TRITON.marks]
COUNTS = [  # queries of each key
    [PART], [PART - 1], [PART + 1], [10, 200, 0, PART, PART - 1, 1], [PART] * 3, [1] * 100,
    [3, 2 * PART + 1, 7, 300, 0],
]  # fmt: skip


@pytest.fixture(autouse=True)
def where_the_kernels_run():
    with torch.device(DEVICE["triton"]):
        yield


def targets(counts: list[int], missing: int = 0, outside: int = 0) -> Tensor:
    parts = [torch.full((count,), key) for key, count in enumerate(counts)]
    target = torch.cat([*parts, torch.full((missing,), -1), torch.full((outside,), len(counts) + 2)])
    return target[torch.randperm(len(target))]


def of_queries(target: Tensor, d: int) -> tuple[Side, Tensor, Tensor]:
    n = len(target)
    side = Side(torch.randn(n, d).double(), torch.rand(n).double())
    return side, torch.randn(n).double(), torch.rand(n).double() + 0.5


def summed(query: Side, v: Tensor, t: Tensor, target: Tensor, key: Side) -> Tensor:
    partners = partners_by_target(query, v, t, target, len(key))
    return finish.finish(None, key, key.rows.shape[1], False, partners, None, torch.float64)


@pytest.mark.parametrize(("missing", "outside"), [(0, 0), (5, 3), (PART + 6, PART // 2 + 1)])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_sums_are_those_of_all_queries(counts, missing, outside):
    target, m, d = targets(counts, missing, outside), len(counts), 32
    query, v, t = of_queries(target, d)
    key = Side(torch.randn(m, d).double(), torch.rand(m).double())
    there = (target >= 0) & (target < m)
    rows = ((v / t * query.inverse)[:, None] * query.rows)[there]
    want = torch.zeros(m, d).double().index_add_(0, target[there], rows) * key.inverse[:, None]
    torch.testing.assert_close(summed(query, v, t, target, key), want)


@pytest.mark.parametrize("d", [16, 272])
def test_a_sum_does_not_depend_on_the_queries_of_other_keys(d):
    """Its bits, though the queries lie elsewhere among all that are sorted."""
    target = targets([40, 150, 70])
    query, v, t = of_queries(target, d)
    key = Side(torch.randn(3, d).double(), torch.rand(3).double())
    first = summed(query, v, t, target, key)
    assert torch.equal(first, summed(query, v, t, target, key))
    for moved in (-1, 2):
        other = summed(query, v, t, torch.where(target == 0, moved, target), key)
        assert torch.equal(other[1], first[1])
        assert not torch.equal(other[0], first[0])


def test_only_keys_of_many_queries_are_summed_in_parts(monkeypatch):
    """Their number is known from the number of queries; left unwritten, they are NaN."""

    def all_but_parts(kernel, grid, **arguments):
        if kernel is parts_kernel:
            grids.append(grid)
            arguments["PARTS_ptr"].fill_(torch.nan)
        else:
            run(kernel, grid, **arguments)

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(finish, "run", all_but_parts)
    target = targets([PART - 1, PART, 1, 3 * PART])
    query, v, t = of_queries(target, 16)
    found = summed(query, v, t, target, Side(torch.randn(4, 16).double(), None))
    assert found.isnan().any(1).tolist() == [False, True, False, True]
    assert grids == [(len(target) // (PART // 2), 1)]
    few = targets([PART - 2, 1])
    summed(*of_queries(few, 16), few, Side(torch.randn(2, 16).double(), None))
    assert len(grids) == 1
