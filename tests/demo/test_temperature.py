"""The demo of the temperature, small: every policy sets it as its name says, and a run ends in a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo's packages are absent")
pytest.importorskip("sklearn", reason="the demo's packages are absent")
pytest.importorskip("tqdm", reason="the demo's packages are absent")

from examples.temperature import train as demo
from examples.temperature.__main__ import main
from examples.temperature.rules import RULES
from examples.temperature.task import digits, embedded
from fused_infonce.temperature import fit

ROOT = Path(__file__).resolve().parents[2]


def test_what_the_temperature_does_in_each_training() -> None:
    task = digits(seed=0, epochs=3)
    assert task.steps == 9
    ticks: list[int] = []
    runs = {policy: demo.train(task, policy, 0, lambda: ticks.append(0)) for policy in demo.POLICIES}
    assert len(ticks) == 9 * len(runs)
    for policy, run in runs.items():
        assert len(run.history) == 9
        assert run.temperature == run.history[-1]
        if policy.kind == "fixed":
            assert set(run.history) == {policy.start}
        elif policy.kind == "learned":
            assert len(set(run.history)) == 9
            assert 0.8 < run.history[0] / demo.LEARNED_FROM < 1.25
        elif policy.kind == "rule":
            assert all(0 < t <= 3 for t in run.history)
        else:
            assert len(set(run.history)) == 2  # fits at the first and the sixth of nine
            assert len(set(run.history[:5])) == 1
    torch.manual_seed(0)
    untrained = fit(*embedded(task, task.model(), task.fitting))
    first = next(run for policy, run in runs.items() if policy.start is None)
    # of float32 embeddings, products of which round as their memory lies
    assert first.history[0] == pytest.approx(untrained.temperature, rel=1e-5)


def test_the_sets_of_pairs_are_apart() -> None:
    task = digits(seed=1, epochs=1)
    every = torch.cat([task.train, task.fitting, task.test])
    assert [len(x) for x in (task.train, task.fitting, task.test)] == [997, 400, 400]
    assert every.sort().values.equal(torch.arange(1797))
    assert not digits(seed=2, epochs=1).test.equal(task.test)


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--held-out", "4", "--dim", "8", "--batch", "16", "--epochs", "1", "--digit-epochs", "1", "--seeds", "3"]
    source = ["--source", str(ROOT / "fused_infonce" / "backends")]
    status = main([*sizes, *source, "--output", str(tmp_path), "--strict"])
    report = json.loads((tmp_path / "temperature.json").read_text())
    assert list(report["tasks"]) == ["docstrings", "digits"]
    for task in report["tasks"].values():
        assert list(task["runs"]) == [str(policy) for policy in demo.POLICIES]
        assert all(
            len(run["history"]) == -(-task["steps"][0] // demo.EVERY) for runs in task["runs"].values() for run in runs
        )
    assert status == (0 if all(claim["shown"] for claim in report["claims"]) else 1)
    assert (tmp_path / "temperature.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(str(policy) in printed for policy in demo.POLICIES)


def test_what_the_rules_say_of_a_batch() -> None:
    query, key = torch.randn(2, 50, 8, dtype=torch.float64)
    key = query + 0.5 * key
    scores = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(key, dim=1).T
    others = ~torch.eye(50, dtype=torch.bool)
    off = scores.masked_fill(~others, -torch.inf)
    t = RULES["effective negatives"](query, key, 0.1)
    p = (off / t).softmax(1)
    counts = torch.special.entr(p).sum(1).exp()
    assert counts.median().item() == pytest.approx(4.9, rel=1e-3)
    b = (off / 0.1).exp().sum(1).mean()
    angle = scores.diagonal().acos().median().clamp(max=torch.pi / 4)
    assert RULES["AdaCos"](query, key, 0.1) == pytest.approx((angle.cos() / b.log()).item(), rel=1e-6)
    gap = scores.diagonal().mean() - scores[others].mean()
    assert RULES["variance"](query, key, 0.1) == pytest.approx((scores[others].var() / gap).item(), rel=1e-9)
