"""What a diagnosis says of a training's last step, from what its loss has recorded, and of a learned temperature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.planted import PLANTED, D, N, all_negatives, good, learned, one_negative, pairs, rounded
from torch import Tensor

from fused_infonce import FusedInfoNCELoss
from fused_infonce.temperature import diagnose, diagnose_step
from fused_infonce.temperature.watching import Watch


def step_of(loss: FusedInfoNCELoss, query: Tensor, key: Tensor, **options: Any) -> list[str]:
    loss(query.requires_grad_(), key, **options).backward()
    return [warned.name for warned in diagnose_step(loss).warnings]


@pytest.mark.parametrize("case", [good, one_negative, all_negatives, rounded], ids=lambda case: case.__name__)
def test_a_step_tells_what_its_rows_are_made_of(case):
    query, key, t, options, _ = case()
    own = options.get("negatives")
    loss = FusedInfoNCELoss(t or (0.03 if own is None else 0.02), negative_mode="paired", record=True)
    more = {} if own is None else {"negative_keys": own}
    loss.in_batch_negatives = True if own is not None else None
    assert step_of(loss, query, key, **more) == ([] if PLANTED[case] is None else [PLANTED[case]])


def test_a_step_of_a_learned_temperature():
    loss = FusedInfoNCELoss(0.05, learnable_temperature=True, max_logit_scale=20, record=True)
    query, key = pairs()
    assert step_of(loss, query, key) == ["clamped"]
    optimizer = torch.optim.AdamW(loss.parameters(), weight_decay=0.2)
    warned = diagnose_step(loss, optimizer=optimizer).warnings
    assert [(each.name, each.number) for each in warned][1] == ("decayed", 0.2)


def test_a_history_says_whether_a_temperature_moves_and_a_gradient_of_zero_does_not():
    loss = learned(record=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    history = []
    for _ in range(60):
        optimizer.zero_grad(set_to_none=False)
        loss(*pairs()).backward()
        optimizer.step()
        history.append(loss.temperature.item())
    optimizer.zero_grad(set_to_none=False)
    known = diagnose_step(loss, optimizer=optimizer, history=history)
    assert known.gauges["movement"] == max(history) / min(history) - 1 > 0.01
    elsewhere = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    assert diagnose_step(loss, optimizer=elsewhere, history=history).gauges == {
        name: x for name, x in known.gauges.items() if name != "weight_decay"
    }
    for short in (None, history[:9]):
        assert "movement" not in diagnose_step(loss, optimizer=optimizer, history=short).gauges
        assert diagnose_step(loss, optimizer=elsewhere, history=short).gauges["movement"] == 0


@pytest.mark.parametrize("left_out", ["target", "weight", "weight, none"])
@pytest.mark.parametrize("direction", ["rows", "both"])
def test_a_step_is_of_the_rows_that_the_loss_counts(left_out, direction):
    """Rows without a positive would have a loss of their whole logsumexp, and hide what is wrong with the others."""
    query, key = pairs()
    key[50:] = key[50:].roll(1, 0)  # pairs that are none
    query[:50] = key[:50] + 0.05 * torch.randn(50, D)
    symmetric = direction == "both"
    if symmetric and left_out == "target":
        return  # a target has one direction
    loss = FusedInfoNCELoss(
        0.05, "none" if "none" in left_out else "mean", symmetric=symmetric, record=True
    )  # fmt: skip
    index = torch.arange(N)
    given = {"target": index.where(index < 50, -100)} if left_out == "target" else {"weight": (index < 50).float()}
    loss(query.requires_grad_(), key, **given).sum().backward()
    counted = (index < 50).repeat(1 + symmetric)
    assert torch.equal(loss.recorded.counted, counted)
    found = diagnose_step(loss)
    plain = FusedInfoNCELoss(0.05, symmetric=symmetric, record=True)
    plain(query, key)
    kept = plain.recorded
    rows = [x[counted] for x in (kept.pos, kept.neg, kept.mean)]
    assert found.gauges["nll"] == pytest.approx(F.softplus(rows[1] - rows[0]).mean().item(), rel=1e-4)
    assert found.gauges["effective_negatives"] == pytest.approx((rows[1] - rows[2]).exp().median().item(), rel=1e-4)
    assert "16 bits lose it" in [warned.name for warned in found.warnings]
    assert "16 bits lose it" not in [warned.name for warned in diagnose_step(plain).warnings]


def test_a_step_without_rows_that_count_has_no_gauges_of_rows():
    loss, (query, key) = FusedInfoNCELoss(0.05, record=True), pairs()
    loss(query[:0], key[:0])
    assert diagnose_step(loss).gauges == {"negatives": 0}
    loss(query, key, target=torch.full((N,), -100))
    assert diagnose_step(loss).gauges == {"negatives": N - 1}
    assert "no warnings" in str(diagnose_step(loss))


@pytest.mark.parametrize("t", [0.008, 0.005])
def test_a_loss_of_zero_is_lost_whole(t):
    key = torch.randn(300, 256)
    query = key + 0.15 * torch.randn(300, 256)
    loss = FusedInfoNCELoss(t, record=True)
    loss(query, key)
    for found in (diagnose_step(loss), diagnose(query, key, t)):
        assert found.gauges["lost_in_16_bits"] > 0.999
        assert "16 bits lose it" in {warned.name for warned in found.warnings}


def test_rows_without_negatives_are_in_no_median():
    query = torch.randn(20, 8)
    key = query + torch.randn(20, 8)
    key_ids = torch.zeros(20, dtype=torch.int64)
    query_ids = torch.cat([key_ids[:12], torch.arange(1, 9)])  # 12 of 20 have no negatives
    loss = FusedInfoNCELoss(0.1, record=True)
    loss(query, key, query_ids=query_ids, key_ids=key_ids)
    step = diagnose_step(loss).gauges["effective_negatives"]
    found = diagnose(query, key, 0.1, query_ids=query_ids, key_ids=key_ids).gauges
    assert found["effective_negatives"] == pytest.approx(step, rel=1e-4)
    assert step > 1
    assert found["hardest_share"] > 0
    assert Watch(loss).figures()["temperature/effective_negatives"].item() == pytest.approx(step, rel=1e-4)
