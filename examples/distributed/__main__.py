"""Train the demo's retriever over two processes and in one: the same curve, because the loss is that of all rows.

    torchrun --nproc-per-node 2 -m examples.distributed            (or: make demo-distributed)

Two processes of 256 rows train under DistributedDataParallel with `FusedInfoNCELoss(distributed=True)`, then with the
rows of each process alone as negatives, which is what a loss gives that does not know of the others. The first process
then trains by itself on batches of 512. Prints the loss and R@1 of all three, and draws their curves.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fused_infonce import FusedInfoNCELoss

from ..retrieval.evaluate import encoder_scores
from ..retrieval.mining import mine
from ..retrieval.model import Bags, Encoder
from ..retrieval.picture import DENSE, OURS, PLAIN
from ..retrieval.report import environment, print_table, write_json
from ..retrieval.split import Split, drop_repeats, split_pairs
from ..retrieval.train import TrainingData

TOGETHER, APART, ALONE = "two processes, distributed=True", "two processes, own negatives", "one process"
TOLERANCE = 2e-3  # of the loss at any step: the sums of two ranks are rounded in another order than those of one
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """The options of a training."""

    batch: int = 512
    dim: int = 64
    steps: int = 100
    temperature: float = 0.05
    learning_rate: float = 2e-3
    max_norm: float = 1.0


@dataclass(frozen=True)
class Run:
    """A trained encoder's loss at every step, R@1 among held-out objects, and the seconds of its training."""

    losses: list[float]
    recall_at_1: float
    seconds: float


def train(data: TrainingData, split: Split, options: Options, name: str, rank: int, world: int) -> Run:
    """Train a fresh encoder on this process's share of every batch."""
    torch.manual_seed(0)
    encoder = Encoder(options.dim)
    model: nn.Module = DistributedDataParallel(encoder) if world > 1 else encoder
    criterion = FusedInfoNCELoss(options.temperature, distributed=name == TOGETHER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    chance = torch.Generator().manual_seed(0)  # one for all processes, so that they agree on every batch
    losses = []
    started = time.perf_counter()
    for _ in tqdm(range(options.steps), desc=name, unit="step", disable=None if rank == 0 else True, file=sys.stderr):
        batch = torch.randint(len(data), (options.batch,), generator=chance)
        own = batch.chunk(world)[rank].numpy()
        loss = criterion(model(Bags.of(data.queries[own], CPU)), model(Bags.of(data.keys[own], CPU)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.max_norm)
        optimizer.step()
        losses.append(loss.detach())
    seconds = time.perf_counter() - started
    recall = encoder_scores(encoder.eval(), split.held_out, CPU)["plain"].recall_at_1
    return Run(torch.stack(losses).tolist(), recall, seconds)


def draw(path: Path, runs: dict[str, Run], options: Options) -> None:
    """Draw the loss curves and R@1 of all runs."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    styles = {
        TOGETHER: {"color": OURS, "linewidth": 5, "alpha": 0.45},
        APART: {"color": PLAIN, "linewidth": 1.5},
        ALONE: {"color": "black", "linewidth": 1.2, "linestyle": "--"},
    }
    for place, (name, run) in enumerate(runs.items()):
        curves.plot(range(1, len(run.losses) + 1), run.losses, label=name, **styles[name])
        bar = bars.bar(place, run.recall_at_1, 0.7, color=DENSE if name == ALONE else styles[name]["color"])
        bars.bar_label(bar, fmt="%.3f")
    curves.set(xlabel="step", ylabel="loss", title="Training loss")
    curves.legend(frameon=False)
    bars.set_xticks(range(len(runs)), [name.replace(" ", "\n", 2) for name in runs], fontsize=8)
    bars.set_title("R@1, held out")
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"A text retriever on batches of {options.batch}, over two processes and in one")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m examples.distributed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the picture and figures")
    parser.add_argument("--max-pairs", type=int, default=14_000, help="pairs that are mined at most")
    parser.add_argument("--held-out", type=int, default=1000, help="pairs that are held out")
    parser.add_argument("--batch", type=int, default=default.batch, help="rows of all processes together")
    parser.add_argument("--dim", type=int, default=default.dim, help="components of an embedding")
    parser.add_argument("--steps", type=int, default=default.steps, help="steps of each training")
    parser.add_argument("--source", type=Path, help="a folder of Python sources to mine instead of installed packages")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and in the first process print and draw; returns 1 where two processes differ from one, else 0."""
    given = parsed(arguments)
    if "RANK" not in os.environ:
        print("error: run it as torchrun --nproc-per-node 2 -m examples.distributed", file=sys.stderr)
        return 2
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    options = Options(batch=given.batch, dim=given.dim, steps=given.steps)
    pairs = drop_repeats(mine(given.max_pairs, given.source))
    split = split_pairs(pairs, given.held_out, seed=0)
    data = TrainingData.of(split.train)
    runs = {name: train(data, split, options, name, rank, world) for name in (TOGETHER, APART)}
    dist.barrier()
    dist.destroy_process_group()  # nobody waits for a process that goes on alone
    if rank:
        return 0
    runs[ALONE] = train(data, split, options, ALONE, 0, 1)
    rows = [
        [name, f"{run.losses[-1]:.4f}", f"{run.recall_at_1:.3f}", f"{run.seconds:.0f}"] for name, run in runs.items()
    ]
    print(f"\n{len(split.train)} pairs, {options.steps} steps of {options.batch} rows over {world} processes:\n")
    print_table(["", "last loss", "R@1", "seconds"], rows)
    apart = max(abs(a - b) for a, b in zip(runs[TOGETHER].losses, runs[ALONE].losses, strict=True))
    print(f"\nThe losses of {TOGETHER} and of {ALONE} differ by at most {apart:.1e} at any step.")
    report: dict[str, Any] = {
        **environment(CPU), "options": asdict(options), "pairs": len(split.train), "processes": world,
        "largest_difference": apart, "runs": {name: asdict(run) for name, run in runs.items()},
    }  # fmt: skip
    write_json(given.output / "distributed.json", report)
    draw(given.output / "distributed.png", runs, options)
    print(f"Picture and figures: {given.output}/distributed.png and .json")
    return 0 if apart < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
