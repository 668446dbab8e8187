"""The forward of a loss that something else has replaced, as libraries do that wrap it."""

from __future__ import annotations

import copy

import pytest
import torch

from fused_infonce import FusedInfoNCELoss


def test_it_is_not_dropped_by_an_option_that_has_a_forward_of_its_own():
    query, key = torch.randn(2, 8, 16)
    loss = FusedInfoNCELoss()
    value, inner, seen = loss(query, key), loss.forward, []
    loss.forward = lambda *args: seen.append(args) or inner(*args)
    loss.record = loss.distributed = False  # which asks for nothing
    assert loss(query, key) == value
    assert len(seen) == 1
    for name in ("record", "distributed"):
        with pytest.raises(RuntimeError, match="forward of this FusedInfoNCELoss has been replaced, by"):
            setattr(loss, name, True)
        assert getattr(loss, name) is False
    assert loss(query, key) == value
    assert copy.copy(loss)(query, key) == value
    assert len(seen) == 3
    del loss.forward
    loss.record = True
    inner = loss.forward
    loss.forward = lambda *args: seen.append(args) or inner(*args)
    with pytest.raises(RuntimeError, match="has been replaced"):
        loss.record = False
    torch.testing.assert_close(loss(query, key), value)  # made of other operators, so that the last bits may differ
    assert loss.recorded is not None
    assert loss._replicate_for_data_parallel().forward is loss.forward
