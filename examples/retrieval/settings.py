"""Command-line options of the demo. This module imports nothing heavy, because worker processes read it too."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """The options of one run; the defaults are those of `make demo`."""

    output: Path = Path("demo-output")
    device: str = "auto"
    seed: int = 0
    max_pairs: int = 14_000
    held_out: int = 1000
    epochs: int = 5
    batch: int = 1024
    dim: int = 256
    temperature: float = 0.05
    cost_batches: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    source: Path | None = None
    strict: bool = False
    questions: tuple[str, ...] = ()
    next_command: str = 'make demo ASK="..."'


def parse_arguments(arguments: Sequence[str] | None = None) -> Settings:
    """Reads the options of a run from `arguments`, by default the command line's, and from the variable ASK."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m examples.retrieval",
        description="Train a small text retriever with FusedInfoNCELoss, measure it, ask it questions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--ask",
        default=os.environ.get("ASK"),
        help='only answer these questions, separated by ";" (also the environment variable ASK), from the saved model '
        "where one was made with the same settings",
    )
    parser.add_argument("--source", type=Path, help="mine the sources below this folder, not the installed packages")
    parser.add_argument("--output", type=Path, default=default.output, help="folder for picture, report and model")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--max-pairs", type=int, default=default.max_pairs)
    parser.add_argument("--held-out", type=int, default=default.held_out, help="pairs kept for the evaluation")
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--dim", type=int, default=default.dim, help="embedding width")
    parser.add_argument("--temperature", type=float, default=default.temperature)
    parser.add_argument(
        "--cost-batches", nargs="*", type=int, default=list(default.cost_batches), help="sizes to time the loss at"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless everything claimed was shown")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(parser.parse_args(given))
    asked = tuple(question.strip() for question in (options.pop("ask") or "").split(";") if question.strip())
    options["cost_batches"] = tuple(options["cost_batches"])
    # The same options again, or the saved model would not be the one that they ask for.
    next_command = default.next_command + (f" DEMO_ARGS={shlex.quote(shlex.join(given))}" if given else "")
    return Settings(**options, questions=asked, next_command=next_command)
