"""Every warning has a planted case, which raises it and no other; a training that is well raises none."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from support.helpers import both_backends
from support.planted import PLANTED, D, N, called, duplicates, learned, pairs
from torch import Tensor, nn

from fused_infonce import FusedInfoNCELoss, NTXentLoss, SigLipLoss
from fused_infonce.temperature import diagnose, diagnose_step, fit, sweep
from fused_infonce.temperature.rules import FACTOR, RULES, judged


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


@pytest.mark.parametrize("factor", [1 / 60, 60.0])
def test_what_is_further_off_than_a_fit_looks_is_called_so_too(factor):
    query, key = pairs()
    found = diagnose(query, key, factor * fit(query, key).temperature)
    assert ("cold" if factor < 1 else "warm") in [each.name for each in found.warnings]
    assert found.gauges["fitted_ratio"] == pytest.approx(32 if factor < 1 else 1 / 32)


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
        (lambda q, k: diagnose(q, k, 0.1, loss=learned(), optimizer="adam"), TypeError, "torch.optim.Optimizer"),
        (lambda q, k: diagnose_step(nn.Linear(1, 1)), TypeError, "one of this package that records, got Linear"),
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
