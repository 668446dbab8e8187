"""Tables of the documentation, from the newest recorded rows: `python -m benchmarks.tables [--write]`.

A table follows its mark, such as `<!-- table: large times -->`, in the README and in docs/. Without --write the tables
are printed. The rows are of the machine that results/cpu.csv begins with, so that other machines may be recorded too.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from . import HERE, ROOT
from .cases import DENSE, FLOOR, OURS, Case, square
from .losses import LOSSES, SIZES, LossCase
from .record import Row, newest, read

PAGES = ("README.md", "docs/performance.md")
MARK = re.compile(r"(<!-- table: ([\w ]+) -->\n\n)(?:[|*].*\n)*\n?")
NOTHING = "*Not recorded yet.*\n"
CHUNKED = "F.linear_cross_entropy"
REPLACED = {"one": "info-nce-pytorch", "symmetric": "open_clip", "self": "lightly"}
LARGE = [(d, rows, width) for d in REPLACED for rows, width in ((16384, 384), (8192, 768))]
SMALL = ((64, 128), (256, 256), (1024, 256))
TITLES = {"one": "one direction", "symmetric": "both directions", "self": "NT-Xent, rows of both views"}
PASSES = {"fwd_bwd": "forward and backward", "fwd": "forward alone"}
MODELLED_ROWS, MODELLED_TRITON = 16384, "3.7.1"
NONE = 'one direction, `reduction="none"`, forward and backward'
WORST = "the slowest of all losses, forward and backward"

Cells = list[list[str]]


class Results:
    """The newest rows of one machine, by case and contestant."""

    def __init__(self, path: Path = HERE / "results" / "cpu.csv"):
        rows = read([path])
        self.rows = {self.key(row): row for row in newest(rows) if row["device"] == rows[0]["device"]}

    @staticmethod
    def key(row: Row) -> tuple[object, ...]:
        return tuple(row[name] for name in ("loss", "direction", "n", "m", "d", "dtype", "pass", "contestant"))

    def value(self, case: Case | LossCase, contestant: str, measure: str = "median_ms") -> float | None:
        """A figure of one contestant; None where there is none."""
        key = (case.loss, case.direction, case.n, case.m, case.d, case.dtype, case.mode, contestant)
        return self.rows[key][measure] if key in self.rows else None

    def ratio(self, case: Case | LossCase, contestant: str, to: str) -> float | None:
        """The time of one contestant as a multiple of another's in the same run."""
        times = self.value(case, contestant), self.value(case, to)
        return None if None in times else times[0] / times[1]  # type: ignore[operator]


def shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def large(results: Results, figure: Callable[[Case, str], str]) -> Cells:
    """A row a large case, a column a contestant."""
    table = [["loss", "rows", "D", OURS, DENSE, "the library replaced", f"`{CHUNKED}`"]]
    for direction, rows, width in LARGE:
        case = square(rows, width, "float32", direction)
        contestants = (OURS, DENSE, REPLACED[direction], CHUNKED)
        table.append([TITLES[direction], str(rows), str(width), *(figure(case, name) for name in contestants)])
    return table


def large_times(results: Results) -> Cells:
    return large(results, lambda case, name: shown(results.ratio(case, name, FLOOR)))


def large_memory(results: Results) -> Cells:
    return large(results, lambda case, name: shown(results.value(case, name, "peak_extra_mib"), 0))


def small_times(results: Results) -> Cells:
    table = [["call", *(f"{rows} rows, D = {width}" for rows, width in SMALL)]]
    for mode, of_mode in PASSES.items():
        for direction, title in TITLES.items():
            cases = [square(rows, width, "float32", direction, mode) for rows, width in SMALL]
            table.append([f"{title}, {of_mode}", *(shown(results.ratio(case, OURS, DENSE)) for case in cases)])
    none = [square(rows, width, "float32", "rows") for rows, width in SMALL]
    return [*table, [NONE, *(shown(results.ratio(case, OURS, DENSE)) for case in none)]]


def costs(results: Results) -> Cells:
    """The README's: three sizes of the commonest calls, the worst in bold."""
    sizes = ((64, 128), (1024, 256), (16384, 384))
    kinds = [*((direction, "fwd_bwd") for direction in TITLES), ("one", "fwd"), ("rows", "fwd_bwd")]
    names = [f"{TITLES[d]}, {PASSES[mode]}" if d in TITLES else NONE for d, mode in kinds]
    values = [[results.ratio(square(*s, "float32", d, mode), OURS, DENSE) for s in sizes] for d, mode in kinds]
    slowest = [max(filter(None, of_losses(results, rows)), default=None) for rows, _ in sizes]
    if any(slowest):
        names, values = [*names, WORST], [*values, slowest]
    worst = max(x for row in values for x in row if x is not None)
    cells = [[f"**{shown(x)}**" if x == worst else shown(x) for x in row] for row in values]
    head = ["call", *(f"{rows} rows" for rows, _ in sizes)]
    return [head, *([name, *row] for name, row in zip(names, cells, strict=True))]


def of_losses(results: Results, rows: int) -> list[float | None]:
    """The ratio of every loss to its dense form, with that many queries."""
    return [results.ratio(LossCase(name, rows), OURS, DENSE) if rows in SIZES else None for name in LOSSES]


def every_loss(results: Results) -> Cells:
    """A row a loss that is recorded."""
    table = [["loss", *(f"{rows} rows" for rows in SIZES)]]
    for name, *ratios in zip(LOSSES, *(of_losses(results, rows) for rows in SIZES), strict=True):
        if any(ratios):
            code, comma, more = name.partition(",")
            table.append([f"`{code}`{comma}{more}", *map(shown, ratios)])
    return table


def sixteen_bits(results: Results) -> Cells:
    cases = [square(rows, width, "bfloat16") for rows, width in ((8192, 768), (1024, 256))]
    table = [["rows", "D", "dense bfloat16"]]
    return [*table, *([str(case.n), str(case.d), shown(results.ratio(case, DENSE, OURS))] for case in cases)]


def modelled(results: Results) -> Cells:
    """A row a plan of a GPU, by `benchmarks/tiles/model.py`, the chosen plan of every width in bold.

    Of a learned temperature, plans that are chosen.
    """
    found: dict[tuple[str, str], dict[int, str]] = {}
    with (HERE / "results" / "model.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if int(row["n"]) == MODELLED_ROWS and row["triton"] == MODELLED_TRITON:
                value = shown(float(row["of_floor"]))
                of_plan = found.setdefault((row["direction"], row["plan"]), {})
                of_plan[int(row["d"])] = f"**{value}**" if row["chosen"] == "True" else value
    dims = sorted({d for of_plan in found.values() for d in of_plan})
    head = ["loss", "plan", *(f"D = {d}" for d in dims)]
    titles = {"one": "one direction", "both": "both directions", "self": "NT-Xent, rows of both views"}
    titles |= {f"{loss}-learned": f"{title}, learned" for loss, title in titles.items()}
    return [
        head,
        *(
            [titles[loss], f"`{plan}`", *(row.get(d, "") for d in dims)]
            for (loss, plan), row in found.items()
            if "learned" not in loss or any("*" in value for value in row.values())
        ),
    ]


TABLES: dict[str, Callable[[Results], Cells]] = {
    "costs": costs,
    "large times": large_times,
    "large memory": large_memory,
    "small times": small_times,
    "every loss": every_loss,
    "sixteen bits": sixteen_bits,
    "gpu model": modelled,
}


def markdown(cells: Cells) -> str:
    head, *rows = cells
    if not rows:
        return NOTHING
    lines = [" ".join(["|", *(f"{cell} |" if cell else "|" for cell in row)]) for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


def written(text: str, results: Results) -> str:
    """A page with the table of every mark in it."""
    return MARK.sub(lambda mark: f"{mark[1]}{markdown(TABLES[mark[2]](results))}\n", text)


def pages() -> Iterable[Path]:
    return (ROOT / page for page in PAGES)


def main() -> None:
    """Print the tables, or write them into the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into the README and docs/")
    write, results = parser.parse_args().write, Results()
    if not write:
        for name, table in TABLES.items():
            print(f"{name}\n\n{markdown(table(results))}")
        return
    for page in pages():
        page.write_text(written(page.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
