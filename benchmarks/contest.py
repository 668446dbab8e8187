"""Contests: contestants timed against each other, in turn, on fresh inputs each round, beside the floor."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .cases import FLOOR, OURS
from .record import Row, provenance

Result = TypeVar("Result")


class Compared(Protocol):
    """A case as a contest needs it: the fields of a record, and inputs."""

    @property
    def loss(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def m(self) -> int: ...
    @property
    def d(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def mode(self) -> str: ...

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]: ...


SHORT = 2048  # rows below which what pytest-benchmark does around a call is seen in its time


class Contest:
    """The contest of one case. `round` runs everybody but ours, `ours` is for the benchmark to time: they take turns.

    A short call of ours is timed in `round` as well, each time in another place among the others, and that is its time:
    the operators and the Python of a call that comes after other code are not in the processor's caches.

    Args:
        losses: the contestants by name, ours among them; each takes the case's inputs.
        floor: takes them too, and computes what no contestant can do without.
    """

    def __init__(
        self,
        case: Compared,
        device: torch.device,
        losses: Mapping[str, Callable[..., Tensor]],
        floor: Callable[..., None] | None = None,
    ):
        self.case, self.device, self.seed = case, device, 0
        self.losses, self.floor = dict(losses), floor
        timed = [name for name in self.losses if name != OURS or max(case.n, case.m) < SHORT]
        self.times: dict[str, list[float]] = {name: [] for name in ([FLOOR] if floor else []) + timed}
        self.peaks: dict[str, int] = {}

    def launch(self, name: str, *inputs: Tensor) -> Tensor | None:
        """Run one pass of one contestant, which on a GPU may still be under way when this returns."""
        if name == FLOOR:
            assert self.floor is not None
            self.floor(*inputs)
            return None
        with torch.set_grad_enabled(self.case.mode == "fwd_bwd"):
            loss = self.losses[name](*inputs)
        if self.case.mode == "fwd_bwd":
            loss.backward()
        return loss

    def step(self, name: str, *inputs: Tensor) -> Tensor | None:
        """Run one pass of one contestant to its end."""
        loss = self.launch(name, *inputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    def ours(self, *inputs: Tensor) -> None:
        """Run one pass of ours, for pytest-benchmark to time."""
        self.step(OURS, *inputs)

    def agree(self) -> None:
        """Check that everybody's loss and gradients are ours, but for the rounding of logits: none else is timed.

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
        """Loss and gradients on inputs that are the same for everybody; the peak of memory is noted on the way."""
        inputs = self.case.inputs(self.device, seed=12345)
        if self.device.type == "cuda":  # once before: what a library allocates for good is no part of a pass
            self.step(name, *inputs)
            forget_gradients(inputs)
        self.peaks[name], loss = peak_bytes(lambda: self.step(name, *inputs), self.device)
        return [x.detach().double() for x in (loss, *(x.grad for x in inputs)) if x is not None]

    def disagreement(self, name: str, mine: list[Tensor]) -> str | None:
        """A complaint where the result of a contestant differs from ours."""
        sixteen = self.case.dtype in ("bfloat16", "float16")
        of_loss, of_gradients = (0.05, 0.1) if sixteen else (1e-4, 1e-3)
        for i, (value, own) in enumerate(zip(self.result(name), mine, strict=True)):
            error = (torch.linalg.vector_norm(value - own) / torch.linalg.vector_norm(own)).item()
            if not error <= (of_gradients if i else of_loss):
                return f"{name} differs from ours by {error:.1e}"
        return None

    def round(self) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        """Fresh inputs for `ours`, after everybody else has been timed on inputs of their own."""
        self.seed += 1
        names = [*self.times]
        first = self.seed % max(len(names), 1)
        for name in names[first:] + names[:first]:
            inputs = self.case.inputs(self.device, self.seed)
            start = time.perf_counter()
            self.step(name, *inputs)
            self.times[name].append(time.perf_counter() - start)
        return self.case.inputs(self.device, self.seed), {}

    def rows(self, ours: list[float]) -> list[Row]:
        """The CSV rows, one a contestant; times in seconds."""
        times = {OURS: ours} | {name: t[-len(ours) :] for name, t in self.times.items() if t}
        return [self.row(name, t, times.get(FLOOR, [])) for name, t in times.items()]

    def row(self, name: str, times: list[float], floor: list[float]) -> Row:
        """The CSV row of one contestant; without times of the floor there is no ratio to it."""
        return {
            **self.about(name),
            "median_ms": f"{np.median(times) * 1e3:.4g}",
            "p20_ms": f"{np.percentile(times, 20) * 1e3:.4g}",
            "p80_ms": f"{np.percentile(times, 80) * 1e3:.4g}",
            "peak_extra_mib": f"{self.peak(name) / 2**20:.1f}",
            "floor_ratio": f"{np.median(times) / np.median(floor):.3f}" if floor else "",
        }

    def about(self, name: str) -> Row:
        """The fields of a row that say what was run; alone they record that it could not be."""
        return {
            **provenance(self.device),
            "loss": self.case.loss,
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


def alive(device: torch.device) -> bool:
    """Return whether a device answers: a GPU's context does not any more after an illegal access."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def forget_gradients(inputs: tuple[Tensor, ...]) -> None:
    """Set the gradients of inputs to None, for another pass."""
    for x in inputs:
        x.grad = None


def peak_bytes(run: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """The largest sum of live tensor allocations made by a function, and what it returns."""
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
    events: Any = profile.profiler
    for event in events.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, result
