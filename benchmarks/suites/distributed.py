"""A symmetric loss over two processes of one thread each: ours, open_clip's, and ours in one process of two threads.

    python -m benchmarks.suites.distributed [--record results/distributed.csv]

Every process has half of the rows. open_clip's loss is its exact form, `local_loss=True, gather_with_grad=True`. All
take turns in one run, forward and backward together, and must first agree on the loss. Memory is what allocations of
the first process have live at a time beyond its inputs; open_clip's own figure leaves out its collectives'.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks import record
from benchmarks.contest import peak_bytes
from benchmarks.contestants import without_package
from fused_infonce import clip_loss

FIELDS = [
    *("date", "commit", "device", "driver", "torch", "triton"),
    *("n", "d", "processes", "contestant", "median_s", "p20_s", "p80_s", "peak_extra_mib", "of_open_clip", "of_single"),
]
WORLD, SCALE = 2, 1 / 0.07
OURS, PEER, SINGLE = "fused_infonce", "open_clip", "fused_infonce, one process"


def features(n: int, d: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Unit rows of this process, of those of all."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(n, d), dim=1)
    text = F.normalize(image + torch.randn(n, d) / d**0.5, dim=1)
    return image[rows].clone().requires_grad_(), text[rows].clone().requires_grad_()


def work(rank: int, store: str, n: int, d: int, rounds: int, found: dict[str, object]) -> None:
    """Take turns with the other process; the first one also runs alone, with the threads of both."""
    warnings.simplefilter("ignore")  # open_clip's collectives are deprecated
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    own = slice(rank * n // WORLD, (rank + 1) * n // WORLD)
    mine, every = features(n, d, own), features(n, d, slice(0, n))
    peer = without_package("open_clip.loss").ClipLoss(
        local_loss=True, gather_with_grad=True, rank=rank, world_size=WORLD
    )
    contestants: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: clip_loss(*mine, SCALE, distributed=True),
        PEER: lambda: peer(*mine, torch.tensor(SCALE)),
        SINGLE: lambda: clip_loss(*every, SCALE),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, int] = {}
    values: dict[str, Tensor] = {}
    for turn in range(rounds + 1):
        for name, loss in contestants.items():
            dist.barrier()
            if name == SINGLE and rank:
                continue
            torch.set_num_threads(WORLD if name == SINGLE else 1)
            for x in (*mine, *every):
                x.grad = None

            def step(loss: Callable[[], Tensor] = loss) -> Tensor:
                value = loss()
                value.backward()
                return value.detach()

            if turn == 0:
                peaks[name], values[name] = peak_bytes(step, torch.device("cpu"))
                continue
            start = time.perf_counter()
            step()
            if name != SINGLE:
                dist.barrier()
            times[name].append(time.perf_counter() - start)
    of_all = values[PEER].clone()
    dist.all_reduce(of_all)
    if rank == 0:
        for name, value in ((PEER, of_all / WORLD), (SINGLE, values[SINGLE])):
            torch.testing.assert_close(value, values[OURS], rtol=1e-5, atol=1e-6, msg=f"{name} has another loss")
        found.update(times=times, peaks=peaks)
    dist.barrier()
    dist.destroy_process_group()


def rows_of(n: int, d: int, times: dict[str, list[float]], peaks: dict[str, int]) -> list[record.Row]:
    """Return a row of the record for each contestant."""
    about = record.provenance(torch.device("cpu"))
    medians = {name: statistics.median(each) for name, each in times.items()}
    rows = []
    for name, each in times.items():
        ordered = sorted(each)
        rows.append(
            about
            | {
                "n": n, "d": d, "processes": 1 if name == SINGLE else WORLD, "contestant": name,
                "median_s": f"{medians[name]:.3f}", "p20_s": f"{ordered[len(ordered) // 5]:.3f}",
                "p80_s": f"{ordered[-1 - len(ordered) // 5]:.3f}", "peak_extra_mib": f"{peaks[name] / 2**20:.1f}",
                "of_open_clip": f"{medians[name] / medians[PEER]:.3f}",
                "of_single": f"{medians[name] / medians[SINGLE]:.3f}",
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="of all processes together")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", help="a CSV file to append to, absolute or relative to benchmarks/")
    args = parser.parse_args()
    with TemporaryDirectory() as folder, torch.multiprocessing.get_context("spawn").Manager() as manager:
        found = manager.dict()
        spawn(work, (str(Path(folder) / "store"), args.rows, args.dim, args.rounds, found), WORLD)
        rows = rows_of(args.rows, args.dim, found["times"], found["peaks"])
    for row in rows:
        print(", ".join(f"{name} {row[name]}" for name in FIELDS[6:]))
    if args.record:
        record.append(args.record, rows, FIELDS)


if __name__ == "__main__":
    main()
