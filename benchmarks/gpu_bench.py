"""The GPU suite: every size, dtype and direction, every peer, beside the floor of bare matmuls. Fits in 8 minutes.

    python benchmarks/gpu_bench.py [--record results/gpu.csv] [--minutes 7.5]

Times are medians of `triton.testing.do_bench`. A contestant that runs out of memory or fails is named and left out;
cases that the time does not allow are named too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import contest
import torch
from contest import FLOOR, Contest
from contestants import OURS, Case
from tqdm import tqdm

WIDTHS = (64, 128, 256, 512, 768, 1024, 2048, 4096)
COMPILED = "dense compiled"  # compiling takes longer than measuring: at a few sizes only
COMPILED_ROWS = (8192, 32768)
DENSE_ROWS = 1 << 18  # beyond, only ours and the floor


def cases() -> list[Case]:
    """In the order of what they say, so that a short run is still worth something."""

    def case(n: int, d: int, dtype: str = "bfloat16", direction: str = "one", mode: str = "fwd_bwd") -> Case:
        rows = n // 2 if direction == "self" else n
        return Case(direction, rows, rows, d, dtype, mode)

    chosen = [case(n, 768) for n in (16384, 32768, 65536, 131072, 8192, 2048, 512)]
    chosen += [case(16384, d) for d in WIDTHS if d != 768]
    chosen += [case(n, 768, direction=direction) for direction in ("symmetric", "self") for n in (8192, 32768, 131072)]
    chosen += [case(32768, d, direction="symmetric") for d in (128, 256)]
    chosen += [case(n, 768, mode="fwd") for n in (2048, 16384, 65536)]
    chosen += [case(8192, 768, dtype) for dtype in ("float16", "float32")]
    chosen += [case(n, d) for n in (512, 4096, 65536) for d in (128, 256, 1024)]
    return [*chosen, case(1 << 20, 256)]


def measure(case: Case, device: torch.device) -> list[dict[str, object]]:
    from triton.testing import do_bench

    run = Contest(case, device)
    if case.n > DENSE_ROWS:
        run.losses = {OURS: run.losses[OURS]}
    if case.n not in COMPILED_ROWS:
        run.losses.pop(COMPILED, None)
    for name in [name for name in run.losses if name != OURS]:
        try:  # each on its own first: what cannot run must not take the others with it
            run.step(name, *case.inputs(device, seed=1))
        except Exception as error:  # whatever a peer raises
            tqdm.write(f"{case}: {name} is left out: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            del run.losses[name]
            torch.cuda.empty_cache()
    run.agree()
    query, key = case.inputs(device, seed=1)

    def timed(name: str) -> list[float]:
        milliseconds = do_bench(
            lambda: run.launch(name, query, key), warmup=10, rep=100, grad_to_none=[query, key], return_mode="all"
        )
        return [t / 1e3 for t in milliseconds]

    run.times = {name: timed(name) for name in (FLOOR, *run.losses) if name != OURS}
    return run.rows(timed(OURS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="append the results to this CSV file, relative to benchmarks/")
    parser.add_argument("--minutes", type=float, default=7.5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    end = time.monotonic() + 60 * args.minutes
    for case in tqdm(cases()):
        if time.monotonic() > end:
            tqdm.write(f"{case}: no time left")
            continue
        try:
            rows = measure(case, torch.device("cuda"))
        except (AssertionError, RuntimeError) as error:  # disagreement, or out of memory: the other cases go on
            tqdm.write(f"{case}: failed: {error}")
            torch.cuda.empty_cache()
            continue
        for row in rows:
            tqdm.write(f"{case!s:45} {row['contestant']:24} {row['median_ms']:>10} ms  {row['floor_ratio']:>7} x floor")
        if args.record:
            contest.append(Path(__file__).parent / args.record, rows)


if __name__ == "__main__":
    main()
