"""Processes on this machine that talk through gloo, none of which outlives its time."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

WORLD = 2
LIMIT = 120.0  # seconds
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "pytest"]  # what takes long: processes start as copies with it


def in_two_processes(worker: Callable[[int], None], folder: Path, seconds: float = LIMIT) -> None:
    """Run worker(rank), a function of a test module, in each of two processes, and fail if one does."""
    in_processes(worker, folder, limit=seconds)


def in_processes(
    worker: Callable[[int], None], folder: Path, world: int = WORLD, limit: float = LIMIT, timeout: float = 60,
    strict: bool = False, leave: bool = False,
) -> None:  # fmt: skip
    """Run worker(rank), a function of a test module, in each of `world` processes, and fail if one does.

    limit: seconds after which all are killed and the test fails. timeout: seconds that a collective waits for the other
    ranks. strict: warnings of what is deprecated are errors, but for those of Triton's own lines. leave: a process ends
    when its worker does; else it waits for the others, which may still read from it.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    given = worker.__code__.co_filename, worker.__name__, str(folder / f"store-{worker.__name__}"), world, timeout
    context: Any = start_processes(_process, (*given, strict, leave), world, join=False, start_method="forkserver")
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=max(deadline - time.monotonic(), 0), grace_period=5):
            if time.monotonic() >= deadline:
                pytest.fail(f"{worker.__name__}: {world} processes did not end within {limit} seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
        for process in context.processes:
            process.join()


def _process(
    rank: int, path: str, name: str, store: str, world: int, timeout: float, strict: bool, leave: bool
) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    worker = runpy.run_path(path)[name]  # pytest's names of test modules are not importable
    with warnings.catch_warnings():
        if strict:
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("error", category)
            warnings.filterwarnings("default", category=DeprecationWarning, module="triton")
        worker(rank)
    if not leave:
        dist.barrier()  # a process that leaves while the other still reads from it fails that one
    sys.stdout.flush()
    os._exit(0)  # gloo's threads are sometimes still there when the process group is taken down, which aborts
