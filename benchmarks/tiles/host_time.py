"""Host time of a call on the Triton backend, without a GPU: kernels are compiled for one, and not launched.

    python -m benchmarks.tiles.host_time [--rows 32] [--dims 128 16]

Python, operators of a few rows on the CPU, and all that Triton does to launch a kernel but the driver's own part. On a
GPU, operators cost the time of a launch instead of that of their arithmetic; so the columns compare with each other,
and not with a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.cases import DENSE, OURS, Case
from benchmarks.contestants import losses
from fused_infonce.backends import registry
from fused_infonce.backends.triton import launch, tiles

DIRECTIONS = {"one": "one direction", "symmetric": "both directions", "self": "self-similarity"}
TARGET = GPUTarget("cuda", 90, 32)


class NoDevice:
    """A driver for Triton that loads nothing and counts what it is asked to launch."""

    launched = 0

    class utils:
        load_binary = staticmethod(lambda *_: (1, 1, 32, 0, 1024))  # module, function, registers, spills, threads
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 227 << 10})

    @staticmethod
    def launcher_cls(*_: Any) -> Callable[..., None]:
        def launch(*_: Any) -> None:
            NoDevice.launched += 1

        return launch

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    get_current_target = staticmethod(lambda: TARGET)


def microseconds(run: Callable[[], None], rounds: int = 300) -> float:
    """The median of a function's times, the first tenth of the rounds left out."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times[rounds // 10 :])) * 1e6


def measure(case: Case) -> tuple[float, float, int]:
    """Microseconds of a forward and backward of ours and of the dense loss, and how many kernels ours launches."""
    inputs = case.inputs(torch.device("cpu"), seed=0)

    def step(name: str) -> None:
        for x in inputs:
            x.grad = None
        contestants[name](*inputs).backward()

    contestants = losses(case, torch.device("cpu"))
    step(OURS)  # compiles
    before = NoDevice.launched
    step(OURS)
    kernels = NoDevice.launched - before
    return microseconds(lambda: step(OURS)), microseconds(lambda: step(DENSE)), kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 16])
    args = parser.parse_args()
    if launch.INTERPRETED:
        parser.exit(2, "unset TRITON_INTERPRET: interpreted kernels are not launched\n")
    triton.runtime.driver.set_active(NoDevice())
    torch.set_num_threads(1)
    registry.resolve = lambda *_: "triton"
    mock.patch.multiple(tiles, architecture=lambda _: "sm_90", processors=lambda _: 132).start()
    print(f"{'':18}{'D':>5}{'ours, us':>10}{'dense, us':>11}{'kernels':>9}")
    for d in args.dims:
        for direction, name in DIRECTIONS.items():
            ours, dense, kernels = measure(Case(direction, args.rows, args.rows, d, "float32", "fwd_bwd"))
            print(f"{name:18}{d:5}{ours:10.0f}{dense:11.0f}{kernels:9}")


if __name__ == "__main__":
    main()
