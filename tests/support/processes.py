"""Two processes on this machine that talk through gloo."""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

WORLD = 2
SECONDS = 240


def in_two_processes(worker: Callable[[int], None], folder: Path, seconds: float = SECONDS) -> None:
    """Run worker(rank), a function of a test module, in each of two processes, and fail if one does or takes longer."""
    given = worker.__code__.co_filename, worker.__name__, str(folder / "store")
    processes = spawn(_process, given, WORLD, join=False)
    end = time.monotonic() + seconds
    try:
        while not processes.join(timeout=1):  # True when both have ended; raises what one of them raised
            if time.monotonic() > end:
                raise TimeoutError(f"{worker.__name__} took more than {seconds} seconds in two processes")
    finally:
        for process in processes.processes:
            process.kill()


def _process(rank: int, path: str, name: str, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    runpy.run_path(path)[name](rank)  # pytest's names of test modules are not importable
    dist.barrier()  # a process that leaves while the other still reads from it fails that one
    sys.stdout.flush()
    os._exit(0)  # gloo's threads are sometimes still there when the process group is taken down, which aborts
