"""The states of parts of a row, merged a block of slots at a time, against float64."""

import math

import pytest
import torch
from support.helpers import DEVICE, TRITON

pytest.importorskip("fused_infonce.backends.triton", reason="triton is not installed", exc_type=ImportError)

from fused_infonce.backends.triton.statistics import MERGED, merge, unwritten

SLOTS, ROWS = MERGED
EMPTY = (-(2.0**127), 0.0, 0.0)


@pytest.mark.parametrize("device", [pytest.param(DEVICE["triton"], marks=TRITON.marks)])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("slots", [2, SLOTS, SLOTS + 1, 2 * SLOTS + 1])
@pytest.mark.parametrize("size", [1, ROWS - 1, ROWS + 1])
def test_blocks_of_slots_merge_to_the_state_of_the_whole_row(size, slots, first, device):
    """Some rows have no logit in some slots, or in none; what lies before the first slot is not read."""
    states = torch.randn(slots, 3, size, dtype=torch.float64, device=device)
    states[:, 0] *= 30
    states[:, 1] = states[:, 1].abs() + 0.1
    left_out = torch.rand(slots, size, device=device) < torch.rand(size, device=device).round()
    states = torch.where(left_out[:, None], states.new_tensor(EMPTY)[:, None], states)
    states[:first] = math.nan
    maxima, sums, products = states[first:].unbind(1)
    top = maxima.amax(0)
    total, product = ((values * torch.exp2(maxima - top)).sum(0) for values in (sums, products))
    none = total == 0
    want = {
        "neg": torch.where(none, -math.inf, (top + total.log2()) * math.log(2)),
        "mean": torch.where(none, 0, product / total * math.log(2)),
        "maximum": torch.where(none, 0, top),
        "scale": torch.where(none, 0, 1 / total),
    }
    into = unwritten(states.new_zeros(size))
    merge(states, first, slots, into)
    for name, values in want.items():
        torch.testing.assert_close(getattr(into, name), values, msg=lambda text, n=name: f"{n}: {text}")
    merge(states, first, slots)
    for found, values in zip(states[0], (top, total, product), strict=True):
        torch.testing.assert_close(found, values)
