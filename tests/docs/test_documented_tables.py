"""The tables of the documentation are those of the newest recorded rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import HERE, tables
from benchmarks.cases import DENSE, OURS
from benchmarks.losses import LossCase
from benchmarks.record import FIELDS


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_those_of_the_newest_run(page: str) -> None:
    text = (tables.ROOT / page).read_text(encoding="utf-8")
    assert tables.MARK.search(text)
    assert tables.written(text, tables.Results()) == text, "run python -m benchmarks.tables --write"


def test_every_table_has_a_place() -> None:
    texts = "".join((tables.ROOT / page).read_text(encoding="utf-8") for page in tables.PAGES)
    assert sorted(name for _, name in tables.MARK.findall(texts)) == sorted(tables.TABLES)


def test_losses_have_their_row_once_they_are_recorded(tmp_path: Path) -> None:
    with (HERE / "results" / "cpu.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"] in ("info_nce", "nt_xent")]  # before any was
    device = {name: rows[0][name] for name in ("device", "torch")} | {"date": "2099-01-01", "dtype": "float32"}
    case = LossCase("ClipLoss, learned scale", 64)
    sizes = {"loss": case.loss, "direction": case.direction, "n": 64, "m": case.m, "d": case.d, "pass": case.mode}
    recorded = tmp_path / "cpu.csv"
    with recorded.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
        for contestant, time in ((OURS, 3.0), (DENSE, 1.0)):
            writer.writerow(device | sizes | {"contestant": contestant, "median_ms": time})
    results = tables.Results(recorded)
    assert tables.every_loss(results)[1:] == [["`ClipLoss`, learned scale", "3.00", "", ""]]
    assert tables.costs(results)[-1] == [tables.WORST, "**3.00**", "", ""]
    once = tables.written("<!-- table: every loss -->\n\n*Not recorded yet.*\n\nText.\n", results)
    head = "| loss | 64 rows | 256 rows | 1024 rows |"
    table = [head, "|---|---|---|---|", "| `ClipLoss`, learned scale | 3.00 | | |"]
    assert once.splitlines()[2:] == [*table, "", "Text."]
    assert tables.written(once, results) == once
