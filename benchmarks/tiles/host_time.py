"""Host time of a call on the Triton backend, without a GPU: kernels are compiled for one, and not launched.

    python -m benchmarks.tiles.host_time [--rows 32] [--dims 128 16] [--record]

Python, operators of a few rows on the CPU, and all that Triton does to launch a kernel but the driver's own part. On a
GPU, operators cost the time of a launch instead of that of their arithmetic; so the columns compare with each other,
and not with a GPU. Ours and the dense loss are timed in turn, ten calls each.
--record appends to benchmarks/results/host_time.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import dense, record
from benchmarks.cases import DENSE, OURS, Case
from benchmarks.contestants import losses
from fused_infonce import checks, info_nce
from fused_infonce.backends import registry
from fused_infonce.backends.triton import launch, tiles

DIRECTIONS = {
    "one": "one direction",
    "symmetric": "both directions",
    "self": "self-similarity",
    "learned": "learned temperature",
}
FIELDS = ("date", "commit", "device", "driver", "torch", "triton", "case", "rows", "d", "ours_us", "dense_us",
          "kernels")  # fmt: skip
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


def microseconds(runs: dict[str, Callable[[], None]], rounds: int = 60, calls: int = 12) -> dict[str, float]:
    """The median of the times of functions, some calls of each in turn, the first two of which are left out."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for call in range(calls):
                start = time.perf_counter()
                run()
                if call > 1:
                    times[name].append(time.perf_counter() - start)
    return {name: float(np.median(found)) * 1e6 for name, found in times.items()}


def contest(direction: str, rows: int, d: int) -> tuple[dict[str, Callable[..., Any]], tuple[torch.Tensor, ...]]:
    """Ours and the dense loss of a direction, and their inputs."""
    case = Case("one" if direction == "learned" else direction, rows, rows, d, "float32", "fwd_bwd")
    inputs = case.inputs(torch.device("cpu"), seed=0)
    if direction != "learned":
        return losses(case, torch.device("cpu")), inputs
    ours = {OURS: lambda q, k, t: info_nce(q, k, temperature=t), DENSE: dense.info_nce}
    return ours, (*inputs, torch.tensor(0.05, requires_grad=True))


def measure(direction: str, rows: int, d: int) -> tuple[float, float, int]:
    """Microseconds of a forward and backward of ours and of the dense loss, and how many kernels ours launches."""
    contestants, inputs = contest(direction, rows, d)

    def step(name: str) -> None:
        for x in inputs:
            x.grad = None
        contestants[name](*inputs).backward()

    step(OURS)  # compiles
    before = NoDevice.launched
    step(OURS)
    kernels = NoDevice.launched - before
    found = microseconds({name: partial(step, name) for name in (OURS, DENSE)})
    return found[OURS], found[DENSE], kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 16])
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/host_time.csv")
    args = parser.parse_args()
    if launch.INTERPRETED:
        parser.exit(2, "unset TRITON_INTERPRET: interpreted kernels are not launched\n")
    triton.runtime.driver.set_active(NoDevice())
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what no kernel wrote is any number, and subnormal ones take 25 us a product
    registry.resolve = lambda *_: "triton"
    mock.patch.multiple(checks, values_are_free=lambda _: False).start()  # no call may read a GPU's
    mock.patch.multiple(tiles, architecture=lambda _: "sm_90", processors=lambda _: 132).start()
    rows: list[dict[str, Any]] = []
    print(f"{'':20}{'D':>5}{'ours, us':>10}{'dense, us':>11}{'ratio':>7}{'kernels':>9}")
    for d in args.dims:
        for direction, name in DIRECTIONS.items():
            ours, of_dense, kernels = measure(direction, args.rows, d)
            print(f"{name:20}{d:5}{ours:10.0f}{of_dense:11.0f}{ours / of_dense:7.2f}{kernels:9}")
            cpu = record.provenance(torch.device("cpu"))
            where = cpu | {"device": f"no GPU: launches of sm_90 are stood in for, on {cpu['device']}"}
            row = {"case": name, "rows": args.rows, "d": d, "ours_us": round(ours), "dense_us": round(of_dense)}
            rows.append(where | row | {"kernels": kernels})
    if args.record:
        record.append("results/host_time.csv", rows, FIELDS)


if __name__ == "__main__":
    main()
