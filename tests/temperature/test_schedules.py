"""Temperatures that follow a function of the step."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from fused_infonce import ClipLoss, FusedInfoNCELoss, MatryoshkaLoss, NTXentLoss
from fused_infonce.temperature import CosineTemperature, TemperatureSchedule


def test_a_cosine_has_the_temperatures_of_the_authors_code():
    """Theirs, with half a period as `t_max`: min + 0.5 (max - min) (1 + cos(pi epoch / t_max))."""
    loss = NTXentLoss()
    schedule = CosineTemperature(loss, low=0.1, high=0.5, period=400)
    for epoch in range(900):
        want = 0.1 + 0.5 * (0.5 - 0.1) * (1 + torch.cos(torch.tensor(torch.pi * epoch / 200, dtype=torch.float64)))
        assert loss.temperature == pytest.approx(want.item(), rel=1e-12)
        returned = schedule.step()
        assert returned == loss.temperature
        assert 0.1 <= returned <= 0.5
    assert schedule.steps == 900


def test_a_training_goes_on_from_a_saved_step():
    first, second = FusedInfoNCELoss(), FusedInfoNCELoss()
    schedule = CosineTemperature(first, 0.05, 0.2, 12.5)
    for _ in range(17):
        schedule.step()
    again = CosineTemperature(second, 0.05, 0.2, 12.5)
    again.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert second.temperature == first.temperature
    assert again.step() == schedule.step()
    with pytest.raises(ValueError, match="the state must hold steps, got"):
        again.load_state_dict({"steps": 3, "temperature": 0.1})


def test_any_function_is_a_schedule_and_the_loss_is_of_its_temperature():
    query, key = torch.randn(6, 4), torch.randn(6, 4)
    loss = FusedInfoNCELoss()
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 0.5 / (1 + step)

    follow = TemperatureSchedule(loss, schedule)
    for step in range(3):
        torch.testing.assert_close(loss(query, key), FusedInfoNCELoss(0.5 / (1 + step))(query, key))
        follow.step()
    assert seen == [0, 1, 2, 3]


def test_a_tensor_that_a_compiled_loss_holds_is_filled_and_nothing_compiled_anew():
    torch._dynamo.reset()
    loss = FusedInfoNCELoss(torch.tensor(0.5))
    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    schedule = CosineTemperature(loss, 0.05, 0.5, period=10)
    for step in range(4):
        query, key = torch.randn(2, 6, 4)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            value = run(query, key)
        torch.testing.assert_close(value, FusedInfoNCELoss(float(loss.temperature))(query, key))
        assert schedule.step() == pytest.approx(loss.temperature.item())
    assert isinstance(loss.temperature, torch.Tensor)
    rows = FusedInfoNCELoss(torch.full((6,), 0.1))  # of which each has its own: it gets one for all
    assert CosineTemperature(rows, 0.05, 0.5, period=10).step() == rows.temperature


def test_a_number_of_torch_is_no_python_number_that_a_schedule_returns():
    with pytest.raises(TypeError, match="the temperature of a schedule must be a number, got Tensor"):
        TemperatureSchedule(NTXentLoss(), lambda step: torch.tensor(0.1))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_temperature_leaves_the_old_one(value):
    loss = NTXentLoss()
    schedule = TemperatureSchedule(loss, lambda step: value if step == 2 else 0.3)
    schedule.step()
    with pytest.raises(ValueError, match="the temperature of a schedule must be positive and finite"):
        schedule.step()
    assert (loss.temperature, schedule.steps) == (0.3, 1)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: CosineTemperature(NTXentLoss(), 0.5, 0.1, 10), ValueError, "high must not be below low, 0.5, got 0.1"),
        (lambda: CosineTemperature(NTXentLoss(), 0.1, 0.5, 0), ValueError, "period must be positive and finite"),
        (lambda: CosineTemperature(NTXentLoss(), 0.0, 0.5, 1), ValueError, "low must be positive and finite"),
        (lambda: TemperatureSchedule(NTXentLoss(), 0.1), TypeError, "schedule must be a function of the step"),
        (
            lambda: TemperatureSchedule(ClipLoss(learnable_temperature=True), math.exp),
            ValueError,
            "loss learns its temperature",
        ),
        (
            lambda: TemperatureSchedule(MatryoshkaLoss(NTXentLoss(), [4]), math.exp),
            TypeError,
            "loss must be a loss of fused_infonce that holds a temperature, got MatryoshkaLoss",
        ),
    ],
)  # fmt: skip
def test_mistakes(make, error, said):
    with pytest.raises(error, match=said):
        make()


def test_a_schedule_can_be_pickled():
    schedule = CosineTemperature(FusedInfoNCELoss(), low=0.1, high=1.0, period=10)
    schedule.step()
    again = pickle.loads(pickle.dumps(schedule))
    assert again.loss is not schedule.loss
    assert again.step() == schedule.step()
    assert again.loss.temperature == schedule.loss.temperature != FusedInfoNCELoss().temperature
