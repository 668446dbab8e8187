"""Pictures of a sweep and of a temperature that followed a training; needs matplotlib, the extra "plot"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
except ImportError as error:
    from .files import NEEDED

    raise ModuleNotFoundError(f"{NEEDED} ({error})", name="matplotlib") from error

from ..checks import one_temperature
from .calibration import Calibration
from .famous import FAMOUS
from .files import writable
from .fitting import Fit, least
from .held_out import Followed
from .sweep import Sweep
from .thresholds import threshold

BLUE, ORANGE, GREY, FAINT = "#0b6e99", "#d1603d", "#8a8f98", "#c9cdd3"  # apart in lightness, for any eyes and for print
POINTS = 120  # temperatures of a curve
INTERVAL = 1.96  # standard errors of a 95 % interval


class Marks(NamedTuple):
    """The temperatures to mark: the best one and the ends of its interval where there is one, and the training's."""

    best: float | None
    low: float
    high: float
    training: float | None


def draw(
    path: str | Path, sweep: Sweep, fit: Fit | None = None, temperature: float | None = None,
    random: Tensor | None = None,
) -> None:  # fmt: skip
    """Draw a sweep; see `Sweep.plot`."""
    writable(path)
    sweep = replace(sweep, **{each.name: getattr(sweep, each.name).cpu() for each in fields(sweep)})
    random = None if random is None else random.cpu()
    drawable(sweep, random)
    coldest, warmest = sweep.temperatures[-1].item(), sweep.temperatures[0].item()
    temperature = None if temperature is None else one_temperature("temperature", temperature)
    marks = marks_of(sweep, fit, temperature)
    marked = [x for x in (marks.best, temperature, *FAMOUS) if x is not None]
    ends = max(coldest, min(marked) / 2), min(warmest, max(marked) * 2)
    points = torch.linspace(math.log(ends[0]), math.log(ends[1]), POINTS, dtype=torch.float64).exp()
    t = points.clamp(coldest, warmest).tolist()
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_likelihood(axes[0, 0], sweep, t, marks)
    draw_negatives(axes[0, 1], sweep, t, marks)
    draw_reliability(axes[1, 0], sweep, marks)
    draw_densities(axes[1, 1], sweep, random)
    save(figure, path)


def marks_of(sweep: Sweep, fit: Fit | None, temperature: float | None) -> Marks:
    """Return what to mark: where no fit is given the minimum of the sweep, if it is not at an end of it."""
    if fit is None:
        ends = sweep.temperatures[-1].item(), sweep.temperatures[0].item()
        best = least(sweep, *ends)
        return Marks(None if best in ends else best, best, best, temperature)
    if not fit.converged:
        return Marks(None, math.nan, math.nan, temperature)
    spread = math.exp(INTERVAL * fit.stderr / fit.temperature)
    return Marks(fit.temperature, fit.temperature / spread, fit.temperature * spread, temperature)


def draw_history(path: str | Path, history: Sequence[Followed]) -> None:
    """Draw the temperature of a training, those fitted to held-out pairs, and the recall at 1 on these.

    Raises:
        ValueError: no fit in the history, a name of another format.
    """
    if not history:
        raise ValueError("there is nothing to draw: no fit has been made yet")
    writable(path)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    fits = [x for x in history if x.fit.converged]
    bars = [INTERVAL * x.fit.stderr for x in fits]
    axes.plot([x.step for x in history], [x.temperature for x in history], color=BLUE, drawstyle="steps-post",
              label="temperature of the training")  # fmt: skip
    axes.errorbar(
        [x.step for x in fits], [x.fit.temperature for x in fits], bars, color=ORANGE, fmt="o", markersize=4,
        linewidth=1, label="fitted to held-out pairs, 95 %",
    )  # fmt: skip
    axes.set_yscale("log")
    plain(axes, "y")
    axes.set_xlabel("step")
    axes.set_ylabel("temperature")
    right = axes.twinx()
    right.plot([x.step for x in history], [x.fit.recall.pessimistic for x in history], color=GREY, linestyle="--",
               label="R@1 of held-out pairs (right)")  # fmt: skip
    right.set_ylabel("R@1")
    right.set_ylim(0, 1)
    finish(axes, "Temperature through the training", right)
    save(figure, path)


def draw_likelihood(axes: Axes, sweep: Sweep, t: Sequence[float], marks: Marks) -> None:
    """Draw the NLL and the expected calibration error against the temperature."""
    nll = [sweep.nll(x).item() for x in t]
    axes.plot(t, nll, color=BLUE, label="NLL")
    axes.set_ylim(0, 1.08 * max(y for x, y in zip(t, nll, strict=True) if x >= (marks.best or t[0])))
    axes.set_ylabel("NLL of the positives (nats)")
    right = axes.twinx()
    right.plot(t, [sweep.calibration(x).ece for x in t], color=ORANGE, linestyle="--", label="ECE (right)")
    right.set_ylim(0, 1)
    right.set_ylabel("expected calibration error")
    marked(axes, t, marks)
    finish(axes, "Likelihood and calibration; defaults of libraries in grey", right, 22)


def draw_negatives(axes: Axes, sweep: Sweep, t: Sequence[float], marks: Marks) -> None:
    """Draw over how many negatives a gradient spreads, and the share of the hardest one."""
    spread = torch.tensor((0.1, 0.5, 0.9), dtype=torch.float64)
    low, middle, high = torch.stack([sweep.effective_negatives(x).double().quantile(spread) for x in t], 1)
    axes.plot(t, middle, color=BLUE, label="effective negatives, median and middle 80 %")
    axes.fill_between(t, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    plain(axes, "y")
    axes.set_ylabel("effective negatives of a row")
    right = axes.twinx()
    shares = [sweep.hardest_share(x).median() for x in t]
    right.plot(t, shares, color=ORANGE, linestyle="--", label="hardest negative, median (right)")
    right.set_ylim(0, 1)
    right.set_ylabel("share of the hardest negative")
    marked(axes, t, marks)
    finish(axes, "Negatives that a row learns from", right, 22)


def draw_reliability(axes: Axes, sweep: Sweep, marks: Marks) -> None:
    """Draw how often the first key is the positive against how sure the softmax is of it."""
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for t, colour, style, name in ((marks.training, ORANGE, "--s", "training"), (marks.best, BLUE, "-o", "best")):
        if t is not None:
            found: Calibration = sweep.calibration(t)
            full = found.sizes > 0
            axes.plot(
                found.confidence[full], found.accuracy[full], style, color=colour, markersize=4, clip_on=False,
                label=f"{name}, t = {t:.3g}: ECE {found.ece:.3f}",
            )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("probability of the first key")
    axes.set_ylabel("share of rows where it is the positive")
    finish(axes, "Reliability")


def draw_densities(axes: Axes, sweep: Sweep, random: Tensor | None) -> None:
    """Draw the densities of scores, and the thresholds of equal errors between the positives and the others."""
    others = [(sweep.hardest, ORANGE, "--", "hardest negatives")]
    if random is not None:
        others.append((random, GREY, ":", "random negatives"))
    density(axes, sweep.pos, BLUE, "-", "positives")
    for scores, colour, style, name in others:
        cut = threshold(sweep.pos, scores)
        density(axes, scores, colour, style, f"{name}: {cut.error:.1%} errors at {cut.score:.3f}")
        axes.axvline(cut.score, color=colour, linestyle=style, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("score")
    axes.set_ylabel("density")
    finish(axes, "Scores, and thresholds of equal errors", columns=1)


def density(axes: Axes, scores: Tensor, colour: str, style: str, label: str) -> None:
    """Draw the histogram of scores as a density."""
    scores = scores[scores > -math.inf].double()
    bars = round(2 * len(scores) ** (1 / 3))  # Rice's rule
    axes.hist(
        scores.numpy(), max(bars, 1), density=True, histtype="stepfilled", facecolor=(colour, 0.15), edgecolor=colour,
        linestyle=style, linewidth=1.2, label=label,
    )  # fmt: skip


def marked(axes: Axes, t: Sequence[float], marks: Marks) -> None:
    """Give the axis of temperatures its scale, and mark the best one, the defaults and that of the training."""
    axes.set_xscale("log")
    plain(axes, "x")
    axes.set_xlim(t[0], t[-1])
    axes.set_xlabel("temperature t")
    if marks.best is not None:
        axes.axvline(marks.best, color="black", linewidth=1.2, label=f"best, t* = {marks.best:.3g}")
        axes.axvspan(marks.low, marks.high, color="black", alpha=0.12, linewidth=0)
    if marks.training is not None:
        axes.axvline(marks.training, color="black", linewidth=1.2, linestyle=":", label=f"t = {marks.training:g}")
    for default in FAMOUS:
        if t[0] <= default <= t[-1]:
            axes.axvline(default, color=FAINT, linewidth=0.8, zorder=0)
            axes.text(
                default, 1.01, f"{default:g}", transform=axes.get_xaxis_transform(), rotation=60, fontsize=7,
                color=GREY, ha="left", va="bottom",
            )  # fmt: skip


def plain(axes: Axes, which: str) -> None:
    """Label a logarithmic axis with plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def finish(axes: Axes, title: str, right: Axes | None = None, above: float = 6.0, columns: int = 2) -> None:
    """Give a panel its title, so many points above it, and one legend below it, of its right axis too."""
    axes.set_title(title, fontsize=11, loc="left", pad=above)
    axes.spines["top"].set_visible(False)
    both = [axes] if right is None else [axes, right]
    both[-1].spines["top"].set_visible(False)
    axes.spines["right"].set_visible(right is not None)
    handles = [handle for each in both for handle in each.get_legend_handles_labels()[0]]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, -0.15), ncols=columns, columnspacing=1.2,
        frameon=False, fontsize=8, borderaxespad=0,
    )  # fmt: skip


def drawable(sweep: Sweep, random: Tensor | None) -> None:
    """Check that there are scores to draw, of rows that are finite."""
    bad = ~sweep.pos.isfinite() | sweep.hardest.isnan() | sweep.log_z.isnan().any(0)
    if bad.any() or not len(bad):
        got = f"NaN or infinity in {int(bad.sum())} of {len(bad)} rows" if len(bad) else "no rows"
        raise ValueError(f"a sweep is drawn of rows whose scores are finite, got {got}")
    if random is not None and not random.isfinite().all():
        raise ValueError(f"random must be finite scores, got {random[~random.isfinite()][0].item()}")


def save(figure: Figure, path: str | Path) -> None:
    """Write a picture, in a folder that is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
