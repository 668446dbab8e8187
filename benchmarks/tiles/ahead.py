"""Compilation of many launches at the same time, in processes that need no GPU, into Triton's cache.

A process that has the GPU then finds them there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import triton
from tqdm import tqdm

from benchmarks.tiles.host_time import NoDevice
from fused_infonce.backends.triton import tiles

STALLED = 60  # seconds without a result, after which compilers are not waited for
Key = TypeVar("Key")


class Machine(NamedTuple):
    """What must be known of a GPU to compile for it."""

    arch: str
    target: Any
    processors: int


def target() -> Any:
    """What Triton compiles for on this machine's GPU."""
    return triton.runtime.driver.active.get_current_target()


def compile_for(machine: Machine) -> None:
    """Let this process compile what it launches for a GPU, and launch nothing."""

    class Compiler(NoDevice):
        get_current_target = staticmethod(lambda: machine.target)

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Compiler())
    mock.patch.multiple(tiles, architecture=lambda _: machine.arch, processors=lambda _: machine.processors).start()


def compile_one(task: tuple[int, Callable[[], object]]) -> tuple[int, str]:
    """Call a function that launches, and return its number and "ok" or what it raised."""
    number, launch = task
    try:
        launch()
    except Exception as error:  # whatever the compiler raises
        return number, said(error)
    return number, "ok"


def said(error: BaseException) -> str:
    """The first line of what a driver says, or a compiler, whose reason is the cause of an error that shows code."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"


def compile_all(
    launches: Sequence[tuple[Key, Callable[[], object]]], machine: Machine, until: float, processes: int | None = None
) -> dict[Key, str]:
    """Outcomes of functions that launch on CPU tensors, in order; those that there is no time for are absent.

    Args:
        until: when to stop, by `time.monotonic`.
        processes: how many; None: one for each processor.
    """
    found: dict[Key, str] = {}
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count(), compile_for, (machine,)) as pool:
        outcomes = pool.imap_unordered(compile_one, [(i, launch) for i, (_, launch) in enumerate(launches)])
        with contextlib.suppress(multiprocessing.TimeoutError):  # a compiler that crashes takes its result with it
            for _ in tqdm(launches, desc="compiling", leave=False):
                number, outcome = outcomes.next(max(min(STALLED, until - time.monotonic()), 0))
                found[launches[number][0]] = outcome
    well, seconds = sum(outcome == "ok" for outcome in found.values()), time.monotonic() - start
    print(f"{well} of {len(launches)} compiled, {len(found) - well} failed, in {seconds:.0f} s")
    return found
