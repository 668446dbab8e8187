"""Figures of a run: its environment, its claims, tables on the terminal and the JSON file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fused_infonce import __version__

# What was taken out of a held-out docstring before it was asked; the keys are those of evaluate.FORMS.
FORM_TITLES = {"strict": "every word of the name removed", "plain": "the name removed"}


@dataclass(frozen=True)
class Claim:
    """A claim that the default run shows, and what this run found."""

    text: str
    shown: bool
    found: str


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version(), "fused_infonce": __version__}
    for package in ("torch", "triton", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Date, device and versions of this run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": f"{device.type}: {name}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "versions": versions(),
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes the report, and makes its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Prints rows under a header, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join([first, *rest]))


def print_claims(claims: list[Claim], strict: bool) -> int:
    """Prints every claim and what was found, and returns the exit status: 1 where one was not shown and must be."""
    print()
    for claim in claims:
        print(f"  {'shown    ' if claim.shown else 'not shown'}  {claim.text}: {claim.found}")
    if all(claim.shown for claim in claims):
        return 0
    if not strict:
        print("\nA training shorter than the default, or on other data, need not show every claim; this is no error")
        print("(--strict makes it one).")
    return 1 if strict else 0
