"""Which temperature fits pairs of embeddings in files, and what others make of them.

    python -m fused_infonce.temperature query.npy key.npy --temperature 0.05

Row i of key.npy is the positive of row i of query.npy, and the other rows are its negatives; --target says otherwise.
Give it pairs that the model was not trained on. The files are mapped into memory, and no matrix of scores is held.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import checks
from .files import embeddings, forget, integers, writable
from .report import Pairs, Report

COLUMNS = """
NLL: the mean negative log-likelihood of the positives. ECE: the expected calibration error, how far the probability of
the first key is from how often it is the positive. negatives: over how many negatives a row's gradient spreads.
hardest: the share that its hardest negative has. Both are medians over the rows.
"""


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fused_infonce.temperature", description=__doc__, epilog=COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("query", type=Path, help="a .npy file, (N, D) of float16, float32 or float64")
    parser.add_argument("key", type=Path, help="likewise, (M, D); M = N without --target")
    parser.add_argument("--target", type=Path, help="a .npy file of N integers: the row of every query's positive key")
    parser.add_argument(
        "--ids", type=Path, help="a .npy file of M integers: keys with a positive's id are none of its negatives"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="that of the training, to compare with")
    parser.add_argument("--diagnose", action="store_true", help="warn of what is wrong at --temperature: more passes")
    parser.add_argument("--symmetric", action="store_true", help="score keys against queries too")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda; default: cpu")
    parser.add_argument("--backend", choices=checks.BACKENDS, default="auto", help="default: auto")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="draw report.png, or .svg, .pdf; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    return parser.parse_args(arguments)


@contextmanager
def progress(rows: int) -> Iterator[Callable[[int], None]]:
    """Give a function that takes note of rows done, of passes of so many rows: a bar on a terminal where tqdm is."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("Going over the scores (with tqdm installed there is a progress bar) ...", file=sys.stderr)
        yield lambda amount: None
        return
    passes = 1
    with tqdm(total=rows, unit=" rows", desc="pass 1", leave=False, disable=None) as bar:

        def advance(amount: int) -> None:
            nonlocal passes
            if bar.n >= rows:
                passes += 1
                bar.reset()
                bar.set_description(f"pass {passes}", refresh=False)
            bar.update(amount)

        yield advance


def usable(device: str) -> str:
    """Return the device, of which this PyTorch and this machine are known to compute with."""
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError) as why:  # an AssertionError of a PyTorch without CUDA
        raise ValueError(f"--device {device} cannot be used: {str(why).partition(chr(10))[0]}") from None
    return device


def report_of(options: argparse.Namespace) -> Report:
    """Read the files and return what they say."""
    device = usable(options.device)
    files = embeddings(options.query), embeddings(options.key)
    query, key = map(torch.from_numpy, files)
    if options.query.samefile(options.key):
        raise ValueError(f"{options.key}: queries and keys are one file, in which every row is its own copy")
    counts = ("query", len(query)), ("key", len(key))
    target = None if options.target is None else integers(options.target, *counts[0], *counts[1])
    ids = None if options.ids is None else integers(options.ids, *counts[1], *counts[0])
    pairs = Pairs(query, key, target, ids, options.symmetric, options.backend).to(device)
    with progress(pairs.rows) as advance:

        def done(rows: int) -> None:  # pages of the files would be held until the end
            for file in files:
                forget(file)
            advance(rows)

        return Report.of(pairs, options.temperature, options.diagnose, done)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    try:
        if options.plot is not None:
            writable(options.plot)
        report = report_of(options)
        said = json.dumps(report.as_dict(), indent=2, allow_nan=False) if options.json else str(report)
        if options.plot is not None:
            report.plot(options.plot)
    except (ImportError, OSError, ValueError, TypeError, RuntimeError) as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
