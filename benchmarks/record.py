"""Records of the benchmarks: one long CSV table, where its figures come from, and how it is read again.

Where git does not know the commit, or not the one that is measured, the environment variable FUSED_INFONCE_COMMIT says
which is recorded.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import HERE

FIELDS = [
    *("date", "commit", "device", "driver", "torch", "triton"),
    *("loss", "direction", "n", "m", "d", "dtype", "pass", "contestant"),
    *("median_ms", "p20_ms", "p80_ms", "peak_extra_mib", "floor_ratio"),
]
CASE = ("device", "loss", "direction", "n", "m", "d", "dtype", "pass")
MEASURES = ("median_ms", "peak_extra_mib")

Row = dict[str, Any]


def append(path: Path | str, rows: Iterable[Row], fields: Sequence[str] = FIELDS) -> None:
    """Append rows to a CSV file, which is made with its header where there is none.

    Args:
        path: absolute, or relative to benchmarks/.
    """
    file_path = HERE / path
    file_path.parent.mkdir(parents=True, exist_ok=True)
    new = not file_path.exists()
    with file_path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files of contests, in order; a contestant that could not run has None for its figures."""
    rows: list[Row] = []
    for path in paths:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != FIELDS:
                continue
            for row in reader:
                sizes = {name: int(row[name]) for name in ("n", "m", "d")}
                figures = {name: number(row[name]) for name in MEASURES}
                rows.append({**row, **sizes, **figures, "said": row["median_ms"]})
    return rows


def number(text: str) -> float | None:
    """A measured number; None for a contestant that could not run."""
    try:
        return float(text)
    except ValueError:
        return None


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every case, contestant and device: by date, within a date by place."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):  # stable
        found[(*(row[name] for name in CASE), row["contestant"])] = row
    return list(found.values())


@cache
def provenance(device: torch.device) -> dict[str, str]:
    """Date, commit, device and versions of a measurement."""
    name, driver = _cpu_name(), ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(HERE),
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
    }


def commit(folder: Path) -> str:
    """The commit that is measured: the environment's word, else that of the git repository around a folder."""
    said = os.environ.get("FUSED_INFONCE_COMMIT")
    return said or _output("git", "describe", "--always", "--dirty", "--exclude", "*", cwd=folder)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def _output(*command: str, cwd: Path = HERE) -> str:
    """The first line that a program prints; nothing if it fails or is not there."""
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip().splitlines()[0] if result.returncode == 0 and result.stdout.strip() else ""
