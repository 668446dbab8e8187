"""Entry point of `python -m examples.recommender`, which `make demo-recommender` runs; see `--help`.

Two towers learn from MovieLens-100K which films a user sees next. In-batch negatives are drawn as often as films are
seen, so that the popular ones are pushed away the most; `key_bias = -log q` corrects for it. The demo trains with both,
and with the softmax over all films that the corrected loss estimates.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..retrieval.report import environment, print_table, write_json
from .data import Ratings, file_of, read
from .model import TOP, Scores, ranked
from .picture import draw
from .train import NAMES, Options, train

POPULAR = "most popular"
METRICS = {"hit_rate": f"HR@{TOP}", "ndcg": f"NDCG@{TOP}"}
WANTED = 1.5


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.recommender", description=__doc__.partition("\n\n")[2] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    default = Options()
    parser.add_argument("--data", type=Path, help="folder that has ml-100k.inter; None: recbole's wheel")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for picture and report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for field in fields(Options):
        value = getattr(default, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--strict", action="store_true", help=f"exit with 1 unless the gain is at least {WANTED}")
    return parser.parse_args(arguments)


def trained(ratings: Ratings, options: Options, seeds: Sequence[int]) -> dict[str, list[Scores]]:
    """Returns the metrics of every loss and seed, and shows how far the training is."""
    found: dict[str, list[Scores]] = {name: [] for name in NAMES}
    with tqdm(total=len(NAMES) * len(seeds) * options.epochs, unit="epoch", disable=not sys.stderr.isatty()) as bar:
        for seed in seeds:
            for name in NAMES:
                bar.set_description(name)
                found[name].append(train(name, ratings, options, seed, bar.update))
    return found


def mean(scores: Sequence[Scores], metric: str) -> float:
    return statistics.fmean(getattr(one, metric) for one in scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints, draws and writes; returns 1 where `--strict` found less than was wanted, else 0."""
    given = parsed(arguments)
    started = time.perf_counter()
    try:
        ratings = read(file_of(given.data))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    popular = ratings.counts.double().expand(ratings.names)
    found = {POPULAR: [ranked(popular, ratings)], **trained(ratings, options, given.seeds)}
    print(f"{ratings.names[0]} users, each of whom is to be shown the last of their films among {ratings.names[1]};")
    print(f"mean of {len(given.seeds)} seeds, and the lowest and highest:\n")
    rows = [
        [
            name,
            *(
                f"{mean(s, m):.3f}  {min(vars(x)[m] for x in s):.3f} to {max(vars(x)[m] for x in s):.3f}"
                for m in METRICS
            ),
        ]
        for name, s in found.items()
    ]
    print_table(["", *METRICS.values()], rows)
    plain, corrected, *_ = (mean(found[name], "hit_rate") for name in NAMES)
    gain = corrected / plain if plain else float("inf")
    print(f"\nThe correction finds {gain:.2f} times as many (at least {WANTED} is expected).")
    report: dict[str, Any] = {
        **environment(torch.device("cpu")), "seconds": time.perf_counter() - started, "seeds": given.seeds,
        "options": asdict(options), "pairs": len(ratings.users), "gain": gain,
        "scores": {name: [asdict(one) for one in scores] for name, scores in found.items()},
    }  # fmt: skip
    write_json(given.output / "recommender.json", report)
    draw(given.output / "recommender.png", report, METRICS)
    print(f"Picture and figures: {given.output}/recommender.png and .json ({report['seconds']:.0f} s)")
    return 1 if given.strict and gain < WANTED else 0


if __name__ == "__main__":
    sys.exit(main())
