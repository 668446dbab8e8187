"""Every warning has a planted case, which raises it and no other; a training that is well raises none."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.helpers import both_backends
from torch import Tensor, nn

from fused_infonce import FusedInfoNCELoss, NTXentLoss, SigLipLoss
from fused_infonce.temperature import diagnose, diagnose_step, fit, sweep
from fused_infonce.temperature.rules import FACTOR, RULES, judged
from fused_infonce.temperature.watching import Watch

N, D = 300, 32


def pairs(noise: float = 1.2) -> tuple[Tensor, Tensor]:
    query = torch.randn(N, D)
    return query, query + noise * torch.randn(N, D)


class Planted(NamedTuple):
    """Arguments of `diagnose`; factor: of the fitted temperature, where none is given."""

    query: Tensor
    key: Tensor
    temperature: float | None = None
    options: dict[str, Any] = {}  # noqa: RUF012
    factor: float = 1.0


def good() -> Planted:
    return Planted(*pairs())


def cold() -> Planted:
    return Planted(*pairs(), factor=1 / 1.8)


def warm() -> Planted:
    return Planted(*pairs(), factor=1.8)


def at_cosine(query: Tensor, mean: float, spread: float) -> Tensor:
    """Return unit rows at about this cosine of unit rows."""
    other = torch.randn_like(query)
    other = F.normalize(other - (other * query).sum(1, keepdim=True) * query, dim=-1)
    cosine = mean + spread * torch.randn(len(query), 1)
    return cosine * query + (1 - cosine**2).sqrt() * other


def one_negative() -> Planted:
    """Each query has a negative of its own that is nearly as good as its positive."""
    query = F.normalize(torch.randn(N, 256), dim=-1)
    positive, negative = at_cosine(query, 0.6, 0.06), at_cosine(query, 0.45, 0.06)
    return Planted(query, positive, options={"negatives": negative[:, None]})


def all_negatives() -> Planted:
    """Pairs that are none, at a temperature above the spread of their cosines."""
    query, key = torch.randn(2, N, 512)
    return Planted(query, key, 0.5)


def collapse() -> Planted:
    """All rows near one direction."""
    query = 0.15 * torch.randn(N, D) + 1
    return Planted(query, query + 0.15 * torch.randn(N, D))


def low_rank() -> Planted:
    """Four directions of 64."""
    few, directions = torch.randn(N, 4), torch.randn(4, 64)
    return Planted(few @ directions, (few + 0.15 * torch.randn(N, 4)) @ directions)


def duplicates() -> Planted:
    """A fifth of the keys are copies of another fifth."""
    query, key = pairs()
    key[:60] = key[60:120]
    return Planted(query, key)


def false_negatives() -> Planted:
    """A fifth of the pairs are noisy copies of another fifth."""
    query, key = pairs()
    for x in (query, key):
        x[:60] = x[60:120] + 0.1 * torch.randn(60, D)
    return Planted(query, key)


def modality_gap() -> Planted:
    """Both sides are shifted, in opposite directions."""
    query, key = pairs()
    shift = 7 * F.normalize(torch.randn(D), dim=0)
    return Planted(query + shift, key - shift)


def rounded() -> Planted:
    """Pairs so far from all others that every probability is nearly 1."""
    query = torch.randn(N, 256)
    return Planted(query, query + 0.7 * torch.randn(N, 256), 0.05)


def with_loss(loss: FusedInfoNCELoss, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> Planted:
    return Planted(*pairs(), options={"loss": loss, "optimizer": optimizer, **options})


def learned(**options: Any) -> FusedInfoNCELoss:
    return FusedInfoNCELoss(0.05, learnable_temperature=True, **options)


def clamped() -> Planted:
    """It stands still at its maximum, which is not called stuck."""
    return with_loss(learned(max_logit_scale=20), history=[0.05] * 80)


def decayed() -> Planted:
    loss = learned()
    return with_loss(loss, torch.optim.AdamW(loss.parameters()))


def stuck() -> Planted:
    return with_loss(learned(max_logit_scale=100), history=[0.05] * 80)


def without_optimizer() -> Planted:
    return with_loss(learned(), torch.optim.Adam(nn.Linear(2, 2).parameters()))


def frozen() -> Planted:
    return with_loss(learned().requires_grad_(requires_grad=False))


PLANTED = {
    good: None, cold: "cold", warm: "warm", one_negative: "one negative", all_negatives: "all negatives",
    collapse: "collapse", low_rank: "collapse", duplicates: "duplicates", false_negatives: "false negatives",
    modality_gap: "modality gap", rounded: "16 bits lose it", clamped: "clamped", decayed: "decayed", stuck: "stuck",
    without_optimizer: "stuck", frozen: "stuck",
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_case_raises_its_warning_and_no_other(case, seed):
    torch.manual_seed(seed)
    query, key, t, options, factor = case()
    of_fit = {name: x for name, x in options.items() if name == "negatives"}
    t = factor * fit(query, key, bounds=(0.0005, 2.0), **of_fit).temperature if t is None else t
    found = diagnose(query, key, t, **options)
    assert [warned.name for warned in found.warnings] == ([] if PLANTED[case] is None else [PLANTED[case]])
    for warned in found.warnings:
        (rule,) = [x for x in RULES if x.name == warned.name and found.gauges.get(x.number) == warned.number][:1]
        assert rule.cause in str(found)
        assert rule.remedy in str(found)


def test_every_warning_has_a_planted_case():
    assert {rule.name for rule in RULES} == set(PLANTED.values()) - {None}


def test_the_nll_is_a_tenth_above_its_least_where_the_temperature_is_called_wrong():
    query, key = pairs()
    t, every = fit(query, key).temperature, sweep(query, key)
    for other in (t / FACTOR, t * FACTOR):
        assert every.nll(other) > 1.1 * every.nll(t)


def towers(steps: int):
    """Return two encoders, their loss and optimizer after a training, the history of the temperature, and new pairs."""
    maps = torch.randn(2, 24, 48) / 24**0.5

    def draw(n: int) -> list[Tensor]:
        latent = torch.randn(n, 24)
        return [torch.tanh((latent + 0.5 * torch.randn(n, 24)) @ each) for each in maps]

    encoders = nn.ModuleList(nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(2))
    loss = FusedInfoNCELoss(0.1, symmetric=True, learnable_temperature=True, max_logit_scale=100, record=True)
    optimizer = torch.optim.Adam([*encoders.parameters(), *loss.parameters()], lr=3e-3)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*(encoder(x) for encoder, x in zip(encoders, draw(128), strict=True))).backward()
        optimizer.step()
        history.append(loss.temperature.item())
    with torch.no_grad():
        held_out = [encoder(x) for encoder, x in zip(encoders, draw(400), strict=True)]
    return held_out, {"loss": loss, "optimizer": optimizer, "history": history}


def test_a_training_that_is_well_raises_none():
    held_out, training = towers(200)
    found = diagnose(*held_out, training["loss"].temperature, symmetric=True, **training)
    assert found.gauges["recall_at_1"] > 0.5
    assert found.warnings == ()
    assert str(found).endswith("no warnings")
    step = diagnose_step(**training)
    assert step.warnings == ()
    shared = {"nll", "effective_negatives", "effective_share", "lost_in_16_bits", "movement", "weight_decay"}
    assert shared <= set(step.gauges) <= set(found.gauges)


@both_backends
def test_gauges_are_what_they_say(backend):
    query, key = pairs()
    query, key, t = query[:40], key[:40], 0.07
    found = diagnose(query, key, t, backend=backend).gauges
    x, y = F.normalize(query.double(), dim=-1), F.normalize(key.double(), dim=-1)
    logits = (x @ y.T) / t
    p = torch.softmax(logits, 1).diagonal()
    q = torch.softmax(logits.fill_diagonal_(-torch.inf), 1)
    entropy = -torch.special.xlogy(q, q).sum(1)
    cosines = [(z @ z.T)[~torch.eye(40, dtype=torch.bool)].mean().item() for z in (x, y)]
    ranks = []
    for z in (x, y):
        e = torch.linalg.svdvals(z - z.mean(0)) ** 2
        ranks.append(torch.exp(torch.distributions.Categorical(e / e.sum()).entropy()).item() / 32)
    spread = math.sqrt(sum((z - z.mean(0)).square().sum(1).mean().item() for z in (x, y)) / 2)
    expected = {
        "temperature": t, "nll": -p.log().mean().item(), "negatives": 39, "hardest_share": q.amax(1).median().item(),
        "effective_negatives": entropy.exp().median().item(),
        "effective_share": entropy.exp().median().item() / 39,
        "lost_in_16_bits": ((1 - p) * (p.bfloat16() == 1)).sum().item() / (1 - p).sum().item(),
        "mean_cosine": max(cosines), "rank_share": min(ranks),
        "modality_gap": (x.mean(0) - y.mean(0)).norm().item() / spread, "equal_keys": 0, "near_positive": 0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_ids_leave_duplicates_out_and_a_target_names_positives():
    query, key, *_ = duplicates()
    ids = torch.cat([torch.arange(60, 120), torch.arange(60, N)])
    assert diagnose(query, key, 0.06, key_ids=ids).gauges["equal_keys"] == 0
    order = torch.randperm(N)
    shuffled = key[order]
    by_target = diagnose(query, shuffled, 0.06, target=order.argsort()).gauges
    assert by_target == pytest.approx(diagnose(query, key, 0.06).gauges, rel=1e-3)


def test_rows_of_any_length_have_a_temperature_of_their_own_scale():
    """Of products, and not cosines, the fitted temperature may be far above 1."""
    query, key = pairs()
    t = fit(query, key).temperature
    longer = [F.normalize(x, dim=-1) * 20 for x in (query, key)]
    found = diagnose(*longer, 800 * t, normalize=False)
    assert found.gauges["fitted_temperature"] == pytest.approx(400 * t, rel=1e-3)
    assert [warned.name for warned in found.warnings] == ["warm"]
    assert "every pair is ranked first" in str(diagnose(query, query, t))


def called(query: Tensor, key: Tensor) -> FusedInfoNCELoss:
    loss = FusedInfoNCELoss(0.05, record=True)
    loss(query, key)
    return loss


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


@pytest.mark.parametrize("ids", [False, True])
def test_padding_has_no_part_in_a_diagnosis(ids):
    query, key = pairs()
    target = torch.randperm(N)[:200]
    padding = torch.cat([key, 5 * torch.ones(900, D)])
    order = torch.randperm(len(padding))
    place = order.argsort()
    names = torch.arange(len(padding)) // 2
    bias = torch.zeros(len(padding)).masked_fill(order >= N, -torch.inf)
    without = diagnose(query[target], key, 0.035, target=target, key_ids=names[:N] if ids else None)
    found = diagnose(
        query[target], padding[order], 0.035, target=place[target], key_bias=bias, key_ids=names[order] if ids else None
    )
    assert found.gauges == pytest.approx(without.gauges, rel=1e-3)
    assert found.warnings == () == without.warnings
    assert found.gauges["negatives"] == N - 1


def test_gauges_that_are_not_known_are_left_out():
    found = diagnose(torch.ones(8, 4), torch.ones(8, 4), 0.1)  # no spread, which a gap would be measured in
    assert "modality_gap" not in found.gauges
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["gauges"] == found.gauges


def test_it_is_a_dictionary_for_json_and_prints_as_a_table():
    query, key = pairs()
    found = diagnose(query, key, torch.tensor([0.08]))
    again = json.loads(json.dumps(found.as_dict()))
    assert again["gauges"] == found.gauges
    assert [each["name"] for each in again["warnings"]] == ["warm"]
    assert set(again["warnings"][0]) == {"name", "number", "cause", "remedy"}
    assert again["fit"] == found.fit == "converged"
    assert "fitted_ratio" in str(found)
    assert f"warm ({found.gauges['fitted_ratio']:.4g}): " in str(found)


def test_what_is_not_known_is_not_judged():
    assert judged({}) == ()
    assert judged({"fitted_ratio": math.nan, "fitted_sigmas": math.nan, "mean_cosine": math.nan}) == ()
    assert judged({"fitted_ratio": 9.0, "fitted_sigmas": 1.0}) == ()  # of few pairs
    assert [each.name for each in judged({"mean_cosine": 1.0, "rank_share": 0.0, "equal_keys": 1.0})] == ["collapse"]


def test_rows_that_are_all_one_are_collapsed():
    found = diagnose(torch.ones(8, 4), torch.ones(8, 4), 0.1)
    assert [each.name for each in found.warnings] == ["all negatives", "collapse"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k: diagnose(q, k, torch.ones(3)), ValueError, "temperature must be one number for all rows"),
        (lambda q, k: diagnose(q, k, -1.0), ValueError, "temperature must be"),
        (lambda q, k: diagnose(q[:1], k[:1], 0.1), ValueError, "2 rows or more"),
        (lambda q, k: diagnose(q * math.nan, k, 0.1), ValueError, "must be finite"),
        (lambda q, k: diagnose(q, k, 0.1, history=[0.1]), ValueError, "pass loss too"),
        (lambda q, k: diagnose(q, k, 0.1, loss=nn.Linear(1, 1)), TypeError, "a loss of fused_infonce that holds"),
        (lambda q, k: diagnose(q, k, 0.1, loss=learned(), history=[0.0] * 50), ValueError, "history must be"),
        (lambda q, k: diagnose_step(NTXentLoss()), ValueError, "make it with record=True"),
        (lambda q, k: diagnose_step(NTXentLoss(record=True)), ValueError, "and call it"),
        (lambda q, k: diagnose_step(SigLipLoss()), ValueError, "SigLIP's loss, a sigmoid of every pair, has none"),
        (lambda q, k: diagnose_step(called(q * math.nan, k)), ValueError, "must be finite, got nan among 300 of 300"),
        (lambda q, k: diagnose(q, k, 0.1, key_bias=torch.full((N,), -math.inf)), ValueError, "for a row's positive"),
    ],
)  # fmt: skip
def test_what_cannot_be_diagnosed_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*pairs())


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
