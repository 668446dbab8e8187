"""The picture of a run: a row a task, with the temperature through a training, R@1, and the calibration at its end."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from ..retrieval.picture import DENSE, OURS, PLAIN

COLOURS = {"held out": OURS, "fixed": PLAIN, "learned": DENSE, "rule": "#7a5195"}
MARKERS = {"held out": "o", "fixed": "s", "learned": "D", "rule": "^"}
LABELS = {"held out": "fitted to held-out pairs", "rule": "rules on the training batch"}
FIGURES = (("recall_at_1", "R@1"), ("nll", "final NLL"), ("ece", "final ECE"))


def draw(path: Path, report: dict[str, Any]) -> None:
    """Draws the tasks of a report."""
    tasks = list(report["tasks"].values())
    figure = Figure(figsize=(15, 0.6 + 3.7 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), 1 + len(FIGURES), squeeze=False, width_ratios=[1.5, 1, 1, 1])
    for task, (histories, *others) in zip(tasks, rows, strict=True):
        _draw_histories(histories, task)
        for axes, (field, label) in zip(others, FIGURES, strict=True):
            _draw_figures(axes, task, field, label)
        for axes in others[1:]:
            axes.tick_params(labelleft=False)
    seeds = len(report["seeds"])
    figure.suptitle(
        f"Temperatures fitted to held-out pairs, fixed, learned and by a rule: dots are {seeds} seeds, bars means"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _kind(policy: str) -> str:
    return next(kind for kind in COLOURS if policy.startswith(kind))


def _draw_histories(axes: Axes, task: dict[str, Any]) -> None:
    shown = set()
    for policy, runs in task["runs"].items():
        kind = _kind(policy)
        for run in runs if kind != "fixed" else runs[:1]:
            style: dict[str, Any] = {"color": COLOURS[kind], "linewidth": 0.8 if kind == "fixed" else 1.3, "alpha": 0.8}
            label = None if kind in shown else LABELS.get(kind, kind)
            steps = [1 + task["every"] * i for i in range(len(run["history"]))]
            axes.plot(steps, run["history"], label=label, **style)
            shown.add(kind)
    _logarithmic(axes)
    axes.set(xlabel="step", ylabel="temperature", title=task["title"])
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_figures(axes: Axes, task: dict[str, Any], field: str, label: str) -> None:
    for place, (policy, runs) in enumerate(task["runs"].items()):
        values, kind = [run[field] for run in runs], _kind(policy)
        axes.scatter(values, [place] * len(values), s=14, color=COLOURS[kind], marker=MARKERS[kind], zorder=2)
        axes.plot([fmean(values)] * 2, [place - 0.32, place + 0.32], color=COLOURS[kind], linewidth=3, alpha=0.6)
    axes.set_yticks(range(len(task["runs"])), list(task["runs"]), fontsize=8)
    axes.invert_yaxis()
    axes.set(title=label)
    axes.grid(True, axis="x", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
