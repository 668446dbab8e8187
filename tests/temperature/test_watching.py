"""`Watch`, which the callbacks of trainers are made of, by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.temperature_callbacks import encoder, held_out, pairs, scheduled, source

from fused_infonce import FusedInfoNCELoss
from fused_infonce.temperature import HeldOutTemperature, fit, sweep
from fused_infonce.temperature.watching import Watch, evaluating


def test_a_schedule_takes_one_step_for_each_of_the_optimizer():
    loss, schedule = source("schedule")
    watch, found = Watch(schedule), []
    for step in range(6):
        for _ in range(3):  # batches that are accumulated
            watch.at(step, encoder())
            found.append(loss.temperature)
    assert found == pytest.approx([t for t in scheduled() for _ in range(3)])


def test_held_out_pairs_are_embedded_where_a_fit_is_due_by_a_model_in_evaluation_mode():
    loss, follow = source("held out")
    model, calls = encoder(), []
    model[0].eval()  # parts may be in modes of their own, as batch normalisations that are frozen

    def counted(given):
        assert given is model
        calls.append(len(follow.history))
        return pairs(given)

    watch = Watch(follow, counted)
    assert set(watch.figures()) == {"temperature", "temperature/scale"}
    for step in range(4):
        watch.at(step, model)
    assert calls == [0, 1]
    assert [module.training for module in model] == [False, True]
    with torch.no_grad(), evaluating(model):
        want = fit(*pairs(model))
    assert loss.temperature == pytest.approx(want.temperature)
    figures = {name: value.item() for name, value in watch.figures().items()}
    assert figures == pytest.approx(
        {
            "temperature": want.temperature, "temperature/scale": 1 / want.temperature,
            "temperature/fitted": want.temperature, "temperature/stderr": want.stderr,
            "temperature/recall_at_1": want.recall.pessimistic,
        }
    )  # fmt: skip


def test_an_error_of_a_model_leaves_it_in_its_mode():
    model = encoder()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / 0  # noqa: B018
    assert all(module.training for module in model.modules())


def test_a_loss_alone_is_told_and_left_alone():
    loss = FusedInfoNCELoss(temperature=0.25, learnable_temperature=True)
    watch = Watch(loss, name="contrast")
    watch.at(0, encoder())
    assert watch.figures() == {"contrast": pytest.approx(0.25), "contrast/scale": pytest.approx(4)}
    several = Watch(FusedInfoNCELoss(temperature=torch.tensor([0.1, 0.5])))
    assert several.figures()["temperature"].item() == pytest.approx(0.3)
    assert several.figures()["temperature/scale"].item() == pytest.approx(6)


def test_effective_negatives_are_told_of_a_loss_that_keeps_its_rows():
    loss, t = FusedInfoNCELoss(temperature=0.25, record=True), 0.25
    watch = Watch(loss)
    assert "temperature/effective_negatives" not in watch.figures()  # before the first call
    query, key = held_out()
    loss(query.requires_grad_(), key)
    want = sweep(query, key, (t, t)).effective_negatives(t).nanmedian()
    torch.testing.assert_close(watch.figures()["temperature/effective_negatives"], want, rtol=1e-4, atol=0)
    target = torch.arange(len(query))
    target[5:] = -100
    loss(query, key, target=target)
    want = sweep(query[:5], key, (t, t), target=target[:5]).effective_negatives(t).nanmedian()
    torch.testing.assert_close(watch.figures()["temperature/effective_negatives"], want, rtol=1e-4, atol=0)


def test_it_goes_on_from_its_state():
    for kind in ("schedule", "held out"):
        whole, parts = (Watch(source(kind)[1], pairs if kind == "held out" else None) for _ in range(2))
        for step in range(3):
            whole.at(step, encoder())
            parts.at(step, encoder())
        loss, stepper = source(kind)
        resumed = Watch(stepper, pairs if kind == "held out" else None)
        resumed.load_state_dict(parts.state_dict())
        for step in range(2, 5):  # the third may be asked for again, for batches that are accumulated
            whole.at(step, encoder())
            resumed.at(step, encoder())
            assert loss.temperature == whole.loss.temperature
        assert resumed.stepper.steps == whole.stepper.steps


def test_what_cannot_be_watched_is_refused():
    loss = FusedInfoNCELoss(temperature=0.1)
    with pytest.raises(TypeError, match="loss must be a loss of fused_infonce that holds a temperature, got Linear"):
        Watch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pairs are for a HeldOutTemperature, which needs them"):
        Watch(HeldOutTemperature(loss))
    with pytest.raises(ValueError, match="pairs are for a HeldOutTemperature, which needs them"):
        Watch(loss, pairs)
    with pytest.raises(TypeError, match="pairs must be a function of the model, got tuple"):
        Watch(HeldOutTemperature(loss), held_out())
    with pytest.raises(TypeError, match="name must be a string, got int"):
        Watch(loss, name=3)


def test_a_drop_in_with_a_temperature_of_its_own_is_a_source():
    drop_in = SimpleNamespace(temperature=0.5)
    follow = HeldOutTemperature(drop_in)
    assert follow.step(*held_out()) is not None
    assert drop_in.temperature == pytest.approx(fit(*held_out()).temperature)
    assert Watch(follow, pairs).figures()["temperature"].item() == pytest.approx(drop_in.temperature)
