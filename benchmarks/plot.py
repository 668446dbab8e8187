"""Plots of time and peak extra memory against N, from the recorded CSV files.

    python -m benchmarks.plot [results/*.csv] [--dim 384] [--out docs]

One picture per device, dtype and pass, `<device>_time_memory_<dtype>_<pass>.png`: a column of panels per direction, a
line per contestant, the floor of bare matmuls dashed. Of every case, contestant and device the newest row counts.
Without `--dim` it is the width with the most sizes. InfoNCE and NT-Xent are drawn, other losses are not.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from . import HERE, ROOT
from .cases import AGAIN, COMPILED, DENSE, FLOOR, OURS, REPLAYED
from .record import Row, newest, read

LOSSES = ("info_nce", "nt_xent")
DIRECTIONS = {"one": "one direction", "symmetric": "both directions", "self": "self-similarity (NT-Xent)"}
MEASURES = {"median_ms": "time (ms)", "peak_extra_mib": "peak memory beyond the inputs (MiB)"}
COLOURS = {  # one for good: a contestant has the same in every picture
    OURS: "#d62728",
    FLOOR: "#000000",
    DENSE: "#1f77b4",
    COMPILED: "#17becf",
    "info-nce-pytorch": "#ff7f0e",
    "F.linear_cross_entropy": "#2ca02c",
    "open_clip": "#9467bd",
    "lightly": "#8c564b",
    "memeff": "#e377c2",
    "liger-kernel": "#bcbd22",
    "cut-cross-entropy": "#5d3a9b",
    "inf-cl": "#7f7f7f",
}
OTHER = "#b0b0b0"
# the dense loss is wide and pale, since others may lie on it
STYLES: dict[str, dict[str, Any]] = {FLOOR: {"marker": "", "linestyle": "--"}, DENSE: {"linewidth": 4, "alpha": 0.5}}


def widest_sweep(rows: Iterable[Row]) -> int:
    """The width with the most sizes; of equals the largest."""
    sizes = defaultdict(set)
    for row in rows:
        sizes[row["d"]].add(row["n"])
    return max(sizes, key=lambda d: (len(sizes[d]), d))


def panels(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by N, by direction and contestant, of directions with at least two sizes."""
    found: dict[str, dict[str, list[Row]]] = {}
    for direction in DIRECTIONS:
        of_one = [row for row in rows if row["direction"] == direction and row["n"] == row["m"]]
        of_one = [row for row in of_one if not row["contestant"].endswith((AGAIN, REPLAYED))]
        if len({row["n"] for row in of_one}) < 2:
            continue
        names = sorted({row["contestant"] for row in of_one}, key=lambda name: [*COLOURS, name].index(name))
        found[direction] = {
            name: sorted((row for row in of_one if row["contestant"] == name), key=total_rows) for name in names
        }
    return found


def total_rows(row: Row) -> int:
    """The rows of the score matrix: of both views together for "self"."""
    return row["n"] * (2 if row["direction"] == "self" else 1)


def device_names(rows: Iterable[Row]) -> dict[str, str]:
    """The names of pictures by device: "cpu" while there is only one that is no GPU."""
    devices = {row["device"]: bool(row["driver"]) for row in rows}
    cpus = [device for device, gpu in devices.items() if not gpu]
    return {d: "cpu" if cpus == [d] else re.sub(r"[^a-z0-9]+", "-", d.lower()).strip("-") for d in devices}


def draw(path: Path, rows: list[Row], width: int) -> bool:
    """Draw one picture, time above memory, a column for each direction; return False where none has two sizes."""
    columns = panels(rows)
    if not columns:
        return False
    figure = Figure(figsize=(1.5 + 4.6 * len(columns), 9.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), squeeze=False, sharey="row", sharex="col")
    handles: dict[str, Any] = {}
    for place, (direction, contestants) in enumerate(columns.items()):
        for level, (measure, label) in enumerate(MEASURES.items()):
            panel = axes[level, place]
            handles |= draw_panel(panel, contestants, measure)
            panel.set_ylabel(label if place == 0 else "")
        axes[0, place].set_title(DIRECTIONS[direction], fontsize=11)
        both = ", of both views together" if direction == "self" else ""
        axes[1, place].set_xlabel(f"rows N{both}")
    first = rows[0]
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    what = "forward and backward" if first["pass"] == "fwd_bwd" else "forward"
    figure.suptitle(f"{first['device']}: D = {width}, {first['dtype']}, {what}\ntorch {first['torch']}, {when}")
    order = [name for name in [*COLOURS, *handles] if name in handles]
    figure.legend(
        [handles[name] for name in dict.fromkeys(order)],
        [f"{name} (bare matmuls)" if name == FLOOR else name for name in dict.fromkeys(order)],
        loc="outside lower center", ncols=min(len(handles), 5), frameon=False,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def draw_panel(panel: Axes, contestants: dict[str, list[Row]], measure: str) -> dict[str, Any]:
    """Draw one panel and return its lines by name; who could not run is said in a corner."""
    lines, absent, ticks = {}, [], set()
    for name, rows in contestants.items():
        points = [(total_rows(row), row[measure]) for row in rows if row[measure]]
        ticks |= {total_rows(row) for row in rows}
        if measure == "median_ms":
            absent += [f"{name}, N = {total_rows(row)}: {row['said']}" for row in rows if row[measure] is None]
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.5, **STYLES.get(name, {})}
        (lines[name],) = panel.plot(
            [n for n, _ in points], [y for _, y in points], color=COLOURS.get(name, OTHER),
            zorder=3 if name == OURS else 2, **style,
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(True, which="major", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if absent:
        panel.text(0.02, 0.98, "\n".join(absent), transform=panel.transAxes, va="top", fontsize=7, color="#555555")
    return lines


def pictures(rows: list[Row], out: Path, width: int | None = None) -> list[Path]:
    """Draw every picture that these rows have enough sizes for, and return their paths."""
    rows = newest(row for row in rows if row["loss"] in LOSSES)
    names = device_names(rows)
    drawn = []
    for device, name in names.items():
        of_device = [row for row in rows if row["device"] == device]
        d = width or widest_sweep(of_device)
        kinds = dict.fromkeys((row["dtype"], row["pass"]) for row in of_device)
        for dtype, mode in kinds:
            chosen = [row for row in of_device if (row["d"], row["dtype"], row["pass"]) == (d, dtype, mode)]
            path = out / f"{name}_time_memory_{dtype}_{mode}.png"
            if draw(path, chosen, d):
                drawn.append(path)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="default: benchmarks/results/*.csv")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    rows = read(args.files or sorted((HERE / "results").glob("*.csv")))
    for path in pictures(rows, args.out, args.dim) if rows else []:
        print(path)


if __name__ == "__main__":
    main()
