"""Blocks on a GPU are as high as whole waves of a library product's output tiles, within the workspace limit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import set_limit

from fused_infonce import explain
from fused_infonce.backends import Options, device, plan
from fused_infonce.backends.contract import STATE_SLOTS

H200 = SimpleNamespace(multi_processor_count=132, total_memory=150_000_000_000)
SIXTEEN_BIT = {"itemsize": 2, "acc_itemsize": 4}


def chosen(n: int, m: int, d: int, limit: int = H200.total_memory // 128, **more: Any) -> plan.Plan:
    facts = {"gradients": True, "columns": False, "self_similar": False, "reduced": True, "per_row": False}
    facts |= {"plain": True, "bounded": True, **SIXTEEN_BIT, **more}
    return plan.choose(backend="triton", device="cuda", n=n, m=m, d=d, limit=limit, **facts)


def idle(rows: int, d: int, width: int, processors: int = 132) -> int:
    """Return how many processors have no output tile in the last wave of (rows x M) @ (M x d)."""
    return -(-(-rows // 128) * -(-d // width)) % processors


def share(rows: int, d: int, processors: int = 132) -> float:
    """Return the share of its waves that a product fills, of the better of both widths of tiles."""
    tiles = [-(-rows // 128) * -(-d // width) for width in plan.PRODUCT_WIDTHS]
    return max(t / (t + -t % processors) for t in tiles)


@pytest.mark.parametrize(("n", "d", "rows"), [(65536, 768, 5632), (131072, 768, 2816), (65536, 1024, 4224)])
def test_a_chunk_of_one_pass_is_a_wave_of_an_h200(n, d, rows):
    """With 256 MiB and no regard for waves these had 1280, 640 and 1280 rows: .45, .23 and .61 of a wave at best."""
    found = chosen(n, n, d)
    assert (found.name, found.rows, found.cols) == ("onepass", rows, n)
    assert share(rows, d) == 1
    assert f"in blocks of {rows} x {n} scores, with at most 1118 MiB of workspace" in str(found)


@pytest.mark.parametrize("d", [256, 512, 768, 1024])
@pytest.mark.parametrize("n", [65536, 1 << 20])
def test_blocks_of_coefficients_fill_both_products(n, d):
    found = chosen(n, n, d, columns=True, per_row=True)
    assert found.name == "workspace"
    assert min(share(found.rows, d), share(found.cols, d)) >= 0.95
    found = chosen(n, n, d, self_similar=True)
    assert (found.name, found.rows) == ("triangular", found.cols)
    assert share(found.rows, d) >= (0.95 if d > 256 else 0.7)  # where a wave is higher than TRIANGULAR_SIDE


@given(
    st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.integers(1, 4096), st.integers(1, 304), st.integers(16, 34),
    st.sampled_from(["one", "both", "self"]),
)  # fmt: skip
def test_blocks_keep_the_limit_and_fill_whole_waves(n, m, d, processors, bits, direction):
    """Where a block holds all rows, or no wave fits, there is nothing to choose."""
    m = m if direction == "one" else n
    more = {"columns": direction == "both", "self_similar": direction == "self"}
    found = chosen(n, m, d, limit=1 << bits, processors=processors, **more)
    assert 1 <= found.rows <= n
    assert 1 <= found.cols <= m
    assert found.rows * found.cols * 2 <= max(1 << bits, 2)
    if found.name == "onepass" and found.rows < n:
        state = STATE_SLOTS * 4 * -(-m // plan.STATE_BLOCK)
        most = ((1 << bits) - (1 << bits) // plan.PRODUCT_SHARE) // (2 * m + state)
        across = {width: -(-d // width) for width in plan.PRODUCT_WIDTHS}
        if most // 128 * across[128] >= processors:
            assert min(idle(found.rows, d, w, processors) - c - processors // 20 for w, c in across.items()) <= 0
        else:
            assert found.rows > most / 2 - 128


def test_the_limit_of_a_gpu_is_a_part_of_its_memory(monkeypatch):
    monkeypatch.setattr(device, "_FACTS", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H200)
    gpu = torch.device("cuda", 0)
    assert device.facts(gpu) == ("cuda", 132, H200.total_memory // 128)
    assert Options().limit(gpu) == 1_171_875_000
    assert Options(workspace_limit=1 << 20).limit(gpu) == 1 << 20
    set_limit(monkeypatch, str(1 << 21))
    assert Options().limit(gpu) == 1 << 21
    assert Options(workspace_limit=1 << 20).limit(gpu) == 1 << 20


@pytest.mark.interpreter
def test_without_a_gpu_plans_are_made_for_an_assumed_one():
    rows = torch.empty(8192, 768, dtype=torch.bfloat16, requires_grad=True)
    (found,) = explain(rows, rows, temperature=0.05, backend="triton", workspace_limit=140 * plan.MIB)
    assert (found.name, found.rows) == ("onepass", 5632)
