"""What pictures of temperatures show, read back from matplotlib's objects."""

from __future__ import annotations

import pytest
import torch

from fused_infonce import FusedInfoNCELoss
from fused_infonce.temperature import HeldOutTemperature, fit, sweep

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure

from fused_infonce.temperature import plots
from fused_infonce.temperature.thresholds import threshold


def pairs(n: int = 200, noise: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    query = torch.randn(n, 12)
    return query, query + noise * torch.randn(n, 12)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved; one is a file in truth, which takes seconds."""
    figures: list[Figure] = []
    original = plots.save

    def save(figure, path):
        figures.append(figure)
        if path.name == "report.png":
            original(figure, path)

    monkeypatch.setattr(plots, "save", save)
    monkeypatch.setattr(plots, "POINTS", 12)
    return figures


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_a_sweep_is_drawn_with_its_best_temperature_and_that_of_the_training(drawn, tmp_path):
    query, key = pairs()
    every, best = sweep(query, key), fit(query, key)
    every.plot(tmp_path / "new" / "report.png", best, torch.tensor([0.07], dtype=torch.float64), torch.randn(500) / 5)
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")
    likelihood, negatives, reliability, densities, ece, hardest = drawn[0].axes
    for axes in (likelihood, negatives):
        assert axes.get_xscale() == "log"
        assert lines(axes)[f"best, t* = {best.temperature:.3g}"].get_xdata() == [best.temperature] * 2
        assert lines(axes)["t = 0.07"].get_xdata() == [0.07, 0.07]
        (interval,) = (patch for patch in axes.patches if patch.get_width() < 1)
        low, high = interval.get_x(), interval.get_x() + interval.get_width()
        assert (high / low) ** 0.5 == pytest.approx(2.718281828 ** (1.96 * best.stderr / best.temperature))
        assert [text.get_text() for text in axes.texts] == ["0.02", "0.05", "0.07", "0.1", "0.5"]
    curves = {
        "NLL": (likelihood, lambda t: every.nll(t).item()),
        "ECE (right)": (ece, lambda t: every.calibration(t).ece),
        "effective negatives, median and middle 80 %": (
            negatives, lambda t: every.effective_negatives(t).double().quantile(0.5).item(),
        ),
        "hardest negative, median (right)": (hardest, lambda t: every.hardest_share(t).median().item()),
    }  # fmt: skip
    for name, (axes, value) in curves.items():
        t, y = (list(x) for x in lines(axes)[name].get_data())
        assert len(t) == plots.POINTS
        assert y[::5] == pytest.approx([value(x) for x in t[::5]], rel=1e-5)
    before, after = (lines(reliability)[name] for name in sorted(lines(reliability), reverse=True))
    for line, t in ((before, 0.07), (after, best.temperature)):
        assert f"t = {t:.3g}: ECE {every.calibration(t).ece:.3f}" in line.get_label()
        assert set(line.get_ydata()) <= set(every.calibration(t).accuracy.tolist())
    cuts = [threshold(every.pos, every.hardest).score]
    assert densities.get_lines()[0].get_xdata() == cuts * 2
    names = [text.get_text() for text in densities.get_legend().get_texts()]
    assert [name.partition(":")[0] for name in names] == ["positives", "hardest negatives", "random negatives"]


def test_nothing_is_marked_where_no_temperature_is_best(drawn, tmp_path):
    query, key = pairs(noise=0.01)
    every, best = sweep(query, key), fit(query, key)
    every.plot(tmp_path / "a.png")
    every.plot(tmp_path / "b.svg", best)
    for figure in drawn:
        assert set(lines(figure.axes[0])) == {"NLL"}
        assert not lines(figure.axes[2])


def test_the_best_temperature_of_a_sweep_alone_has_no_interval(drawn, tmp_path):
    query, key = pairs()
    sweep(query, key).plot(tmp_path / "a.png")
    t = fit(query, key).temperature
    assert lines(drawn[0].axes[0])[f"best, t* = {t:.3g}"].get_xdata() == pytest.approx([t, t], rel=1e-3)
    with pytest.raises(ValueError, match=r"^the picture's name must end in one of .*png.*, got 'a.docx'"):
        sweep(query, key).plot("a.docx")


def test_scores_that_are_not_finite_are_refused(drawn, tmp_path):
    query, key = pairs()
    for bad, value in ((3, float("nan")), (5, float("inf"))):
        query[bad] = value
        with pytest.raises(ValueError, match=r"scores are finite, got NaN or infinity in [12] of 200 rows"):
            sweep(query, key).plot(tmp_path / "a.png")
    good = sweep(*pairs())
    with pytest.raises(ValueError, match="random must be finite scores, got nan"):
        good.plot(tmp_path / "a.png", random=torch.tensor([0.1, float("nan")]))
    assert not drawn


def test_a_training_is_drawn_with_its_temperature_its_fits_and_recall(drawn, tmp_path):
    query, key = pairs()
    follow = HeldOutTemperature(FusedInfoNCELoss(temperature=1.0), every=5, smoothing=0.5)
    with pytest.raises(ValueError, match="no fit has been made yet"):
        follow.plot(tmp_path / "history.png")
    calls = []
    for step in range(12):
        follow.step(lambda step=step: calls.append(step) or (query, key + 0.2 * step * torch.randn_like(key)))
    assert calls == [0, 5, 10]  # held-out pairs are encoded where a fit is due alone
    assert [x.step for x in follow.history] == calls
    assert follow.history[-1].temperature == follow.loss.temperature
    assert follow.history[-1].fit is follow.last
    follow.plot(tmp_path / "history.png")
    axes, right = drawn[0].axes
    training = lines(axes)["temperature of the training"]
    assert list(training.get_xdata()) == calls
    assert list(training.get_ydata()) == [x.temperature for x in follow.history]
    (recall,) = lines(right).values()
    assert list(recall.get_ydata()) == [x.fit.recall.pessimistic for x in follow.history]
    assert follow.history[0].fit.recall == sweep(query, key).recall(1)
