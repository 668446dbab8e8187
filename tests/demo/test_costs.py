"""The demo's costs: times of the contestants, their spread, and the load of others beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's packages are absent")
pytest.importorskip("matplotlib", reason="the demo's packages are absent")
pytest.importorskip("tqdm", reason="the demo's packages are absent")

from examples.retrieval import cost, show


def test_contestants_agree_and_cost_something() -> None:
    costs = cost.measure_costs([], 8, 0.05, torch.device("cpu"))
    assert costs == []
    losses, times = cost._interleaved_times(33, 8, 0.05, torch.device("cpu"), seconds=0.0)
    assert losses["fused"] == pytest.approx(losses["dense"], rel=1e-5)
    assert all(len(of_one) == cost.MIN_ROUNDS and min(of_one) > 0 for of_one in times.values())


def costs_of(fused: list[float], dense: list[float], batch: int = 64, others: float | None = None) -> list[cost.Cost]:
    times = {"fused": fused, "dense": dense}
    return [cost._cost(name, batch, 8, times, None, None, 1.0) for name in cost.CONTESTANTS]


def test_spread_and_speedup_over_the_rounds() -> None:
    # Other load doubles both times of the last two rounds, and not their ratio.
    fused, dense = costs_of([1.0, 1.0, 1.0, 2.0, 2.0], [1.5, 1.5, 1.5, 3.0, 3.0])
    assert (fused.milliseconds, fused.spread) == (1000, (1000, 2000))
    assert (fused.speedup, fused.speedup_spread) == (1.5, (1.5, 1.5))
    assert dense.speedup == 1


def test_a_gain_within_the_spread_is_not_called_one() -> None:
    faster, uncertain = ([1.0] * 5, [2.0] * 5), ([1.0] * 5, [0.5, 0.5, 2.0, 2.0, 2.0])
    assert cost.faster_from(costs_of(*uncertain, 64) + costs_of(*faster, 128) + costs_of(*faster, 256)) == 128
    assert cost.faster_from(costs_of(*faster, 64) + costs_of(*uncertain, 128)) is None
    assert cost.faster_from([]) is None


def test_times_beside_other_load_decide_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.disturbed([0.02, None, 0.05]) is None
    assert cost.disturbed([0.02, 0.6, None]) == 0.6
    costs = costs_of([1.0] * 5, [2.0] * 5)
    show.print_gain(costs, None, 64, (4000.0, 4100.0), cost.step_savings(costs, 64, 4000.0))
    assert "faster from batch 64 on" in capsys.readouterr().out
    show.print_gain(costs, 0.6, 64, (4000.0, 4100.0), None)
    printed = capsys.readouterr().out
    assert "Other programs used up to 60%" in printed
    assert "faster from" not in printed


def test_the_share_of_the_processor_that_others_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0])  # the work takes 4 seconds of 2 cores, of which others use 2
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(cost.os, "cpu_count", lambda: 2)
    seconds = iter([50.0, 52.0])
    monkeypatch.setattr(cost, "_other_seconds", lambda: next(seconds))
    assert cost.with_other_load(lambda: "done") == ("done", 0.25)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_the_processor_seconds_of_others_only_grow() -> None:
    before = cost._other_seconds()
    assert sum(range(3_000_000)) > 0  # our own work
    after = cost._other_seconds()
    assert before is not None
    assert after is not None
    assert after >= before - 0.1  # /proc/stat counts in hundredths of a second a core


def test_share_of_a_training_step_that_the_loss_saves() -> None:
    costs = costs_of([0.001] * 5, [0.002] * 5, 100) + costs_of([0.010] * 5, [0.030] * 5, 1000)
    # A step of 11 ms at batch 100 leaves 10 ms for the rest, 100 ms at batch 1000.
    assert cost.step_savings(costs, 100, 11.0) == pytest.approx({100: 1 / 12, 1000: 20 / 130})
    assert cost.step_savings(costs, 77, 11.0) is None
