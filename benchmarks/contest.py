"""Times contestants against each other: in turn, on fresh inputs each round, beside the floor; then records them.

Where git does not know the commit, the environment variable FUSED_INFONCE_COMMIT says what is recorded for it.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import contestants
import numpy as np
import torch
from contestants import OURS, Case
from torch import Tensor

FIELDS = [
    *("date", "commit", "device", "driver", "torch", "triton"),
    *("loss", "direction", "n", "m", "d", "dtype", "pass", "contestant"),
    *("median_ms", "p20_ms", "p80_ms", "peak_extra_mib", "floor_ratio"),
]
FLOOR = "floor"
Result = TypeVar("Result")


class Contest:
    """One case. `round` runs everybody but ours, `ours` is for the benchmark to time: so they take turns."""

    def __init__(self, case: Case, device: torch.device, without: Collection[str] = ()):
        self.case, self.device, self.seed = case, device, 0
        self.losses = {k: v for k, v in contestants.losses(case, device).items() if k not in without}
        self.floor = contestants.floor(case)
        self.times: dict[str, list[float]] = {name: [] for name in (FLOOR, *self.losses) if name != OURS}
        self.peaks: dict[str, int] = {}

    def launch(self, name: str, query: Tensor, key: Tensor) -> Tensor | None:
        """One pass of one contestant."""
        if name == FLOOR:
            self.floor(query, key)
            return None
        with torch.set_grad_enabled(self.case.mode == "fwd_bwd"):
            loss = self.losses[name](query, key)
        if self.case.mode == "fwd_bwd":
            loss.backward()
        return loss

    def step(self, name: str, query: Tensor, key: Tensor) -> Tensor | None:
        """The same, finished when it returns."""
        loss = self.launch(name, query, key)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    def ours(self, query: Tensor, key: Tensor) -> None:
        self.step(OURS, query, key)

    def agree(self) -> None:
        """A wrong result is not timed: everybody's loss and query gradient are ours, but for the rounding of logits.

        Who raises is left out; who disagrees too, but on a CPU, where every peer is known to be right.
        """
        mine = self.result(OURS)
        for name in [name for name in self.losses if name != OURS]:
            try:
                wrong = self.disagreement(name, mine)
            except Exception as error:  # whatever a peer raises
                wrong = f"{name} raises {type(error).__name__}: {error}"
            else:
                if wrong and self.device.type == "cpu":
                    raise AssertionError(f"{self.case}: {wrong}")
            if wrong:
                print(f"{self.case}: {wrong}; it is left out", file=sys.stderr)
                del self.losses[name], self.times[name]

    def result(self, name: str) -> list[Tensor]:
        """Loss and, after a backward, the query gradient on inputs that are the same for everybody. Notes the peak."""
        query, key = self.case.inputs(self.device, seed=12345)
        if self.device.type == "cuda":  # once before: what a library allocates for good is no part of a pass
            self.step(name, query, key)
            query.grad = key.grad = None
        self.peaks[name], loss = peak_bytes(lambda: self.step(name, query, key), self.device)
        return [x.detach().double() for x in (loss, query.grad) if x is not None]

    def disagreement(self, name: str, mine: list[Tensor]) -> str | None:
        """How the result of a contestant differs from ours, if it does."""
        sixteen = self.case.dtype in ("bfloat16", "float16")
        bounds = (0.05, 0.1) if sixteen else (1e-4, 1e-3)
        for value, own, bound in zip(self.result(name), mine, bounds, strict=False):
            error = (torch.linalg.vector_norm(value - own) / torch.linalg.vector_norm(own)).item()
            if not error <= bound:
                return f"{name} differs from ours by {error:.1e}"
        return None

    def round(self) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
        """Fresh inputs for `ours`, after everybody else has been timed on inputs of their own."""
        self.seed += 1
        for name, times in self.times.items():
            inputs = self.case.inputs(self.device, self.seed)
            start = time.perf_counter()
            self.step(name, *inputs)
            times.append(time.perf_counter() - start)
        return self.case.inputs(self.device, self.seed), {}

    def rows(self, ours: list[float]) -> list[dict[str, object]]:
        """One CSV row a contestant; times in seconds."""
        times = {OURS: ours, **{name: t[-len(ours) :] for name, t in self.times.items() if t}}
        return [self.row(name, t, times[FLOOR]) for name, t in times.items()]

    def row(self, name: str, times: list[float], floor: list[float]) -> dict[str, object]:
        """The CSV row of one contestant; without times of the floor there is no ratio to it."""
        return {
            **self.about(name),
            "median_ms": f"{np.median(times) * 1e3:.4g}",
            "p20_ms": f"{np.percentile(times, 20) * 1e3:.4g}",
            "p80_ms": f"{np.percentile(times, 80) * 1e3:.4g}",
            "peak_extra_mib": f"{self.peak(name) / 2**20:.1f}",
            "floor_ratio": f"{np.median(times) / np.median(floor):.3f}" if floor else "",
        }

    def about(self, name: str) -> dict[str, object]:
        """The fields of a row that say what was run. One without the others records that it could not be."""
        return {
            **provenance(self.device),
            "loss": "nt_xent" if self.case.direction == "self" else "info_nce",
            "direction": self.case.direction,
            "n": self.case.n,
            "m": self.case.m,
            "d": self.case.d,
            "dtype": self.case.dtype,
            "pass": self.case.mode,
            "contestant": name,
        }

    def peak(self, name: str) -> int:
        """Bytes of tensors allocated at the most during one pass, beyond the inputs."""
        if name not in self.peaks:
            inputs = self.case.inputs(self.device, seed=1)
            self.peaks[name], _ = peak_bytes(lambda: self.step(name, *inputs), self.device)
        return self.peaks[name]


def peak_bytes(run: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """The largest sum of live tensor allocations made by `run`, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, result


@cache
def provenance(device: torch.device) -> dict[str, str]:
    """Where and when a figure was measured."""
    name, driver = _cpu_name(), ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    commit = _output("git", "describe", "--always", "--dirty", "--exclude", "*")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit or os.environ.get("FUSED_INFONCE_COMMIT", ""),
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
    }


def append(path: Path, rows: list[dict[str, object]], fields: Sequence[str] = FIELDS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def _output(*command: str) -> str:
    """The first line of what a program says; nothing if it fails or is not there."""
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip().splitlines()[0] if result.returncode == 0 and result.stdout.strip() else ""
