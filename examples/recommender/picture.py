"""The picture of a run: the metrics of every loss, a dot for each seed."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from ..retrieval.picture import DENSE, OURS, PLAIN, QUIET

COLOURS = (QUIET, DENSE, OURS, PLAIN)


def draw(path: Path, report: dict[str, Any], metrics: dict[str, str]) -> None:
    """Draws a panel for each metric, by its name in the report and its title."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, len(metrics)), metrics.items(), strict=True):
        for place, (scores, colour) in enumerate(zip(report["scores"].values(), COLOURS, strict=True)):
            values = [one[metric] for one in scores]
            bar = axes.bar(place, fmean(values), 0.7, color=colour)
            axes.bar_label(bar, fmt="%.3f", label_type="center", color="white", fontweight="bold")
            axes.scatter([place] * len(values), values, s=12, color="black", zorder=2)
        axes.set_xticks(range(len(report["scores"])), [name.replace(", ", ",\n") for name in report["scores"]])
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    options = report["options"]
    figure.suptitle(
        f"MovieLens-100K, the last film of each user, full ranking: batch {options['batch']}, "
        f"{options['epochs']} epochs, {len(report['seeds'])} seeds"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
