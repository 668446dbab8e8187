"""Pictures of a run, apart from the report because an answer need not wait for matplotlib's import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

OURS, DENSE, PLAIN, QUIET = "#0b6e99", "#d1603d", "#8a8f98", "#c9cdd3"
COLOURS = {"untrained": QUIET, "TF-IDF": PLAIN, "trained": OURS, "fused": OURS, "dense": DENSE}


def draw_demo(path: Path, report: dict[str, Any]) -> None:
    """Draws scores, loss curves, times and memory of the demo."""
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw_retrieval(axes[0, 0], report)
    _draw_curves(axes[0, 1], report)
    _draw_cost(
        axes[1, 0], report, "milliseconds", "time (ms)", "Time of the loss, forward and backward (band: middle half)"
    )
    _draw_cost(axes[1, 1], report, "peak_mib", "peak memory beyond the inputs (MiB)", "Memory of the loss")
    training = report["training"]
    figure.suptitle(
        f"FusedInfoNCELoss trains a text retriever: {training['pairs']} pairs, batch {training['batch']}, "
        f"temperature {training['temperature']:g}, {training['seconds']:.0f} s\n{report['device']}",
        fontsize=12,
    )
    _save(figure, path)


def _draw_retrieval(axes: Axes, report: dict[str, Any]) -> None:
    groups = [
        ("strict", "recall_at_1", 0.0, "R@1\nname's words\nremoved"),
        ("strict", "mrr_at_10", 1.0, "MRR@10\nname's words\nremoved"),
        ("plain", "recall_at_1", 2.4, "R@1\nname\nremoved"),
        ("plain", "mrr_at_10", 3.4, "MRR@10\nname\nremoved"),
    ]
    width = 0.27
    for shift, (name, by_form) in enumerate(report["retrieval"].items()):
        values = [by_form[form][metric] for form, metric, *_ in groups]
        label = "TF-IDF, best setting" if name == "TF-IDF" else f"{name} encoder"
        places = [place + (shift - 1) * width for _, _, place, _ in groups]
        bars = axes.bar(places, values, width, label=label, color=COLOURS[name])
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axes.set_xticks([place for _, _, place, _ in groups], [title for *_, title in groups])
    axes.set_ylim(0, 1.0)
    axes.set_ylabel("score")
    _finish(axes, f"Retrieval among {report['training']['held_out']} held-out objects", legend="upper left")


def _draw_curves(axes: Axes, report: dict[str, Any]) -> None:
    fused, reference = report["loss"]["fused"], report["loss"]["reference"]
    axes.plot(range(1, len(fused) + 1), fused, color=OURS, linewidth=4, alpha=0.45, label="fused")
    steps = range(1, len(reference) + 1)
    axes.plot(
        steps, reference, color="black", linewidth=1.2, linestyle="--", label=f"dense reference, {len(reference)} steps"
    )
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _finish(axes, "Training with the same seed and either loss", legend=None)
    # A difference of zero has no place on a logarithmic axis.
    apart = [max(abs(a - b), 1e-9) for a, b in zip(fused, reference, strict=False)]
    right = axes.twinx()
    right.plot(steps, apart, color=DENSE, linewidth=0, marker=".", markersize=4, label="difference (right)")
    right.axhline(1e-4, color=DENSE, linewidth=0.8, linestyle=":", label="allowed in the first 20 steps")
    right.set_yscale("log")
    right.set_ylim(5e-10, 1)
    right.set_ylabel("absolute difference")
    right.spines["top"].set_visible(False)
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="upper right")


def _draw_cost(axes: Axes, report: dict[str, Any], field: str, label: str, title: str) -> None:
    for contestant in ("dense", "fused"):
        of_one = [c for c in report["cost"] if c["contestant"] == contestant and c[field] is not None]
        batches = [cost["batch"] for cost in of_one]
        values = [cost[field] for cost in of_one]
        axes.plot(batches, values, marker="o", color=COLOURS[contestant], label=contestant)
        if field == "milliseconds":
            low, high = zip(*(cost["spread"] for cost in of_one), strict=True) if of_one else ((), ())
            axes.fill_between(batches, low, high, color=COLOURS[contestant], alpha=0.25, linewidth=0)
        if values:
            axes.annotate(
                f"{values[-1]:.0f}", (batches[-1], values[-1]), xytext=(6, 0), textcoords="offset points",
                va="center", color=COLOURS[contestant], fontsize=9,
            )  # fmt: skip
    batches = sorted({cost["batch"] for cost in report["cost"] if cost[field] is not None})
    if batches:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.12)
        axes.set_xlabel(f"batch (queries = keys, width {report['cost'][0]['dim']})")
    axes.set_ylabel(label)
    _finish(axes, title, legend="upper left")


def _finish(axes: Axes, title: str, legend: str | None) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(True, axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc=legend)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
