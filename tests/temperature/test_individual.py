"""A table of temperatures: looked up, learned by an optimizer or by iSogCLR's steps, saved with its loss."""

from __future__ import annotations

import copy

import pytest
import torch
from support.helpers import elsewhere

from fused_infonce import FusedInfoNCELoss, NTXentLoss, RobustInfoNCELoss, info_nce, nt_xent, robust_info_nce
from fused_infonce.temperature import IndividualTemperature

INDEX = torch.tensor([7, 0, 3, 9, 4, 1])


def spread(**options):
    """Return a table whose temperatures all differ."""
    table = IndividualTemperature(10, 0.1, **options)
    with torch.no_grad():
        table.values.copy_(torch.linspace(0.1, 0.6, 10))
    return table


def test_a_loss_takes_the_temperatures_of_the_samples_of_its_batch():
    table, (query, key) = spread(), torch.randn(2, 6, 4)
    t = torch.linspace(0.1, 0.6, 10)[INDEX]
    loss = FusedInfoNCELoss(temperature=table)
    with pytest.raises(ValueError, match=r"index is missing: pass it, or call select\(index\)"):
        loss(query, key)
    table.select(INDEX)
    assert torch.equal(loss(query, key), info_nce(query, key, temperature=t))
    assert torch.equal(info_nce(query, key, temperature=table(INDEX)), loss(query, key))
    table.select(INDEX.repeat(2))
    assert torch.equal(NTXentLoss(temperature=table)(query, key), nt_xent(query, key, t.repeat(2)))
    assert dict(loss.named_parameters()).keys() == {"temperature.values"}
    again = FusedInfoNCELoss(temperature=IndividualTemperature(10))
    again.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert torch.equal(again.held_temperature.values, table.values)


def test_gradients_reach_the_samples_of_a_batch_and_add_up_where_one_is_there_twice():
    table, index = spread().double(), torch.tensor([7, 0, 7, 9])
    query, key = torch.randn(2, 4, 3, dtype=torch.float64)

    def loss(values):
        t = torch.func.functional_call(table, {"values": values}, (index,))
        return robust_info_nce(query, key, temperature=t)

    assert torch.autograd.gradcheck(loss, table.values)
    (gradient,) = torch.autograd.grad(loss(table.values), table.values)
    assert gradient.nonzero().flatten().tolist() == [0, 7, 9]


def test_an_optimizer_learns_them_within_the_bounds():
    """Queries with many keys that are alike find a higher temperature than those with one that stands out."""
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    hard = torch.nn.functional.normalize(query + 0.1 * torch.randn(8, 16), dim=1)
    negatives = torch.randn(8, 30, 16) / 30
    negatives[:4, 0] = hard[:4]  # one that is hard
    negatives[4:] = hard[4:, None] + negatives[4:]  # all are
    table = IndividualTemperature(8, 0.2, bounds=(0.01, 0.7))
    loss = RobustInfoNCELoss(temperature=table, rho=0.4, negative_mode="paired")
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for step in range(150):
        index = torch.arange(8).roll(step)[:6]
        table.select(index)
        optimizer.zero_grad()
        loss(query[index], query[index], negatives[index]).backward()
        optimizer.step()
        table.clamp_()
    assert table.values.min() >= 0.01
    assert table.values.max() <= 0.7
    assert table.values[4:].max() < table.values[:4].min()


@pytest.mark.parametrize("clip", [None, 0.3])
def test_steps_are_those_of_the_authors_code(clip):
    """Moving averages of gradients, of samples in the batch alone; a sample that is there twice counts once."""
    table = spread(lr=0.2, beta=0.8, clip=clip, bounds=(0.08, 0.55))
    assert not list(table.parameters())
    u, tau = torch.zeros(10, dtype=torch.float64), table.values.double()
    met = set()
    for _ in range(20):
        index = torch.randperm(10)[:6]
        gradient = torch.randn(6)
        table.step(torch.cat([index, index[:2]]), torch.cat([torch.randn(2), gradient[2:], gradient[:2]]))
        bounded = gradient.double() if clip is None else gradient.double().clamp(-clip, clip)
        u[index] = 0.2 * u[index] + 0.8 * bounded
        tau[index] = (tau[index] - 0.2 * u[index]).clamp(0.08, 0.55)
        met |= {0.08, 0.55} & set(tau.tolist())
    torch.testing.assert_close(table.values.double(), tau, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(table.gradient.double(), u, rtol=1e-5, atol=1e-6)
    assert met == {0.08, 0.55}


def test_a_gradient_that_is_not_finite_leaves_its_sample_as_it_is():
    table = spread(lr=0.1)
    table.step(torch.tensor([2, 5, 6]), torch.tensor([torch.nan, 1.0, -torch.inf]))
    moved = (table.values != torch.linspace(0.1, 0.6, 10)).nonzero().flatten()
    assert moved.tolist() == [5]
    assert table.gradient.nonzero().flatten().tolist() == [5]


def test_a_step_by_the_gradient_of_a_loss_lowers_it():
    query, key = torch.randn(2, 6, 4)
    table = IndividualTemperature(10, 0.3, lr=0.05, beta=1.0)
    before = robust_info_nce(query, key, temperature=table(INDEX), reduction="sum")
    t = table(INDEX).requires_grad_()
    robust_info_nce(query, key, temperature=t, reduction="sum").backward()
    table.step(INDEX, t.grad)
    assert robust_info_nce(query, key, temperature=table(INDEX), reduction="sum") < before


def test_it_shows_itself_and_starts_again():
    table = spread(lr=0.1)
    assert repr(table) == "IndividualTemperature(10, 0.1, bounds=(0.05, 0.7), lr=0.1, beta=0.9, clip=None)"
    assert repr(spread()) == "IndividualTemperature(10, 0.1, bounds=(0.05, 0.7))"
    table.step(INDEX, torch.ones(6))
    table.reset_parameters()
    assert torch.equal(table.values, torch.full((10,), 0.1))
    assert not table.gradient.any()


MADE = {"samples": 10, "temperature": 0.1}


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be 1 or more, got 0"),
        ({"samples": 3.0}, TypeError, "samples must be an integer"),
        ({"temperature": 0.9}, ValueError, "temperature must be within the bounds, 0.05 to 0.7, got 0.9"),
        ({"bounds": (0.5, 0.1)}, ValueError, "bounds must be increasing"),
        ({"lr": 0}, ValueError, "lr must be positive and finite"),
        ({"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        ({"beta": 0}, ValueError, "beta must be more than 0"),
        ({"clip": -1}, ValueError, "clip must be positive and finite"),
    ],
)
def test_a_bad_table_is_refused(bad, kind, message):
    with pytest.raises(kind, match=message):
        IndividualTemperature(**MADE | bad)


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        (torch.tensor([0, 10]), ValueError, r"index must be in \[0, 10\), got 10"),
        (torch.tensor([-1]), ValueError, r"index must be in \[0, 10\), got -1"),
        (torch.tensor([0.0]), TypeError, "index must be an integer tensor"),
        (torch.tensor([[0]]), ValueError, r"index must have 1 dimension \(N,\)"),
        ([0, 1], TypeError, r"index must be an integer tensor of shape \(N,\), got list"),
        (elsewhere(2, dtype=torch.int64), ValueError, "index must be on cpu as the table is"),
    ],
)
def test_a_bad_index_is_refused(index, kind, message):
    table = spread(lr=0.1)
    for call in (table, table.select, lambda index: table.step(index, torch.ones(2))):
        with pytest.raises(kind, match=message):
            call(index)


def test_a_bad_step_is_refused():
    with pytest.raises(ValueError, match="gradient must be a floating tensor of shape"):
        spread(lr=0.1).step(INDEX, torch.ones(5))
    with pytest.raises(ValueError, match="a table is stepped with lr="):
        spread().step(INDEX, torch.ones(6))
