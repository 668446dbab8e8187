"""Comparison of two recorded runs, side by side: `python -m benchmarks.compare OLD.csv NEW.csv`.

A line per case: the times of a contestant in both runs and their ratio, new / old; then its ratio to a contestant of
the same run (the dense loss, or --against floor) in either, which a slower or busier machine changes less. The last
line has geometric means. Of every case, contestant and device the newest row of a file counts.

    --below 1.05        leave out the cases whose ratio to the other contestant grew by less
    --markdown          print a table for the notes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from .cases import DENSE, FLOOR, OURS
from .record import newest, read

CASE = ["loss", "direction", "n", "m", "d", "dtype", "pass"]


def times(path: Path) -> pd.DataFrame:
    """The median times of a file in milliseconds, a row a case and a column a contestant.

    Raises:
        SystemExit: no rows of contests, or more than one device, whose times must not be mixed.
    """
    rows = pd.DataFrame(newest(read([path])))
    if rows.empty:
        sys.exit(f"{path} has no rows of contests")
    devices = sorted(set(rows["device"]))
    if len(devices) > 1:
        sys.exit(f"{path} has rows of several devices, {', '.join(devices)}: compare files of one")
    table = rows.pivot(index=CASE, columns="contestant", values="median_ms")
    return table.reindex(pd.MultiIndex.from_frame(rows[CASE].drop_duplicates()))  # in the order of the file


def compared(old: pd.DataFrame, new: pd.DataFrame, contestant: str, against: str) -> pd.DataFrame:
    """The cases of both runs: times of a contestant and its ratios to another, old, new and new / old."""
    cases = [case for case in old.index if case in new.index]
    old, new = old.loc[cases], new.loc[cases]
    for table in (old, new):
        for name in (contestant, against):
            if name not in table:
                table[name] = np.nan
    found = pd.DataFrame(index=old.index)
    found["old ms"], found["new ms"] = old[contestant], new[contestant]
    found["new / old"] = found["new ms"] / found["old ms"]
    found[f"of {against}, old"] = old[contestant] / old[against]
    found[f"of {against}, new"] = new[contestant] / new[against]
    found["change"] = found[f"of {against}, new"] / found[f"of {against}, old"]
    return found.dropna(subset="new / old")


def geometric_mean(values: pd.Series) -> float:
    """The geometric mean of numbers, those left out that are not known."""
    return float(np.exp(np.log(values.dropna()).mean())) if values.notna().any() else float("nan")


def printed(found: pd.DataFrame, markdown: bool = False) -> str:
    """The table in columns, or in Markdown, with geometric means of the ratios in its last line."""
    table = pd.DataFrame(index=range(len(found) + 1))
    names = [f"{loss} {n}x{m}x{d} {dtype} {mode}" for loss, _, n, m, d, dtype, mode in found.index]
    directions = [direction for _, direction, *_ in found.index]
    table["case"] = [f"{name} {direction}" for name, direction in zip(names, directions, strict=True)] + [
        "geometric mean"
    ]
    for name, values in found.items():
        mean = "" if str(name).endswith("ms") else f"{geometric_mean(values):.2f}"
        form = "{:.4g}" if str(name).endswith("ms") else "{:.2f}"
        table[name] = ["" if np.isnan(x) else form.format(x) for x in values] + [mean]
    if not markdown:
        return table.to_string(index=False, justify="right")
    rows = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main() -> None:
    """Print the comparison of two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--contestant", default=OURS)
    parser.add_argument("--against", default=DENSE, help=f"the contestant of the same run, such as {FLOOR}")
    parser.add_argument("--below", type=float, default=0.0, metavar="CHANGE")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    old, new = times(args.old), times(args.new)
    found = compared(old, new, args.contestant, args.against)
    if found.empty:
        sys.exit(f"the two files have no case of {args.contestant} in common")
    print(printed(found[~(found["change"] < args.below)], args.markdown))
    for path, one, other in ((args.old, old, new), (args.new, new, old)):
        if alone := len(one.index.difference(other.index)):
            print(f"{alone} cases are in {path} alone", file=sys.stderr)


if __name__ == "__main__":
    main()
