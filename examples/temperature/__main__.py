"""Train at fixed temperatures, at a learned one, at one that is fitted to held-out pairs, and by rules, on two tasks.

    python -m examples.temperature            (or: make demo-temperature)

Three sets of pairs: one to train on, one to fit the temperature to, and one to measure with. Every training is repeated
with several seeds. Prints, as means over the seeds, the final temperature, R@1, and at that temperature the negative
log-likelihood (NLL) and the expected calibration error (ECE); then both at the temperature that is fitted after the
training; and draws a picture.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from ..retrieval.mining import mine
from ..retrieval.report import Claim, environment, print_claims, print_table, write_json
from ..retrieval.split import drop_repeats
from .picture import draw
from .task import Task, digits, docstrings
from .train import DEFAULTS, EVERY, POLICIES, Policy, Run, train

Runs = dict[Policy, list[Run]]  # of a task, by seed

SPREAD = 0.15  # of the final temperatures from several starts, by which the highest may be above the lowest
RECALL_LOST, NLL_LOST, ECE_LEFT = 0.015, 1.05, 0.5
RETRIEVER, FROZEN_ECE = 0.05, 0.07  # the temperature that the demo of retrieval trains at


def mean(runs: Sequence[Run], field: str) -> float:
    return fmean(getattr(run, field) for run in runs)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.temperature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the picture and figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=("docstrings", "digits"), default=["docstrings", "digits"])
    parser.add_argument("--max-pairs", type=int, default=14_000, help="docstrings that are mined at most")
    parser.add_argument("--held-out", type=int, default=1000, help="docstrings to fit with, and as many to test with")
    parser.add_argument("--dim", type=int, default=256, help="components of a docstring's embedding")
    parser.add_argument("--batch", type=int, default=1024, help="docstrings of a step")
    parser.add_argument("--epochs", type=int, default=5, help="of docstrings")
    parser.add_argument("--digit-epochs", type=int, default=60, help="of digits")
    parser.add_argument("--source", type=Path, help="a folder of Python sources to mine instead of installed packages")
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless everything claimed was shown")
    return parser.parse_args(arguments)


def tasks(given: argparse.Namespace) -> dict[str, list[Task]]:
    """Returns each task with its splits, one a seed."""
    found = {}
    if "docstrings" in given.tasks:
        pairs = drop_repeats(mine(given.max_pairs, given.source))
        found["docstrings"] = [
            docstrings(pairs, given.held_out, seed, given.dim, given.batch, given.epochs) for seed in given.seeds
        ]
    if "digits" in given.tasks:
        found["digits"] = [digits(seed, given.digit_epochs) for seed in given.seeds]
    return found


def trained(splits: Sequence[Task], seeds: Sequence[int]) -> Runs:
    """Returns the runs of every policy and seed, and shows how far they are."""
    found: Runs = {policy: [] for policy in POLICIES}
    total = sum(task.steps for task in splits) * len(POLICIES)
    with tqdm(total=total, desc=splits[0].title, unit="step", disable=None, file=sys.stderr) as bar:
        for task, seed in zip(splits, seeds, strict=True):
            for policy in POLICIES:
                bar.set_postfix_str(f"{policy}, seed {seed}")
                found[policy].append(train(task, policy, seed, bar.update))
    return found


def claims_of(name: str, runs: Runs) -> list[Claim]:
    """Returns what is claimed of a task's means over the seeds."""
    followed = [found for policy, found in runs.items() if policy.kind == "held out"]
    _, *started = followed
    fixed = [found for policy, found in runs.items() if policy.kind == "fixed"]
    (learned,) = [found for policy, found in runs.items() if policy.kind == "learned"]
    ends = [mean(found, "temperature") for found in started]
    recalls = [mean(found, "recall_at_1") for found in followed]
    best_recall = max(mean(found, "recall_at_1") for found in fixed)
    nll, best_nll = max(mean(x, "nll") for x in followed), min(mean(x, "nll") for x in fixed)
    ece, learned_ece = max(mean(x, "ece") for x in followed), mean(learned, "ece")
    every = [run for found in runs.values() for run in found]
    frozen = {
        f"a training at {RETRIEVER:g}, as of `make demo`": runs[Policy("fixed", RETRIEVER)],
        "a training, whatever it was": every,
    }
    return [
        Claim(
            f"{name}: followed from three starts, the final temperatures are within {SPREAD:.0%}",
            max(ends) <= (1 + SPREAD) * min(ends), ", ".join(f"{end:.4f}" for end in ends),
        ),
        Claim(
            f"{name}: fitted first, its R@1 is at least that of the best fixed value less {RECALL_LOST:g}",
            recalls[0] >= best_recall - RECALL_LOST, f"{recalls[0]:.3f} and {best_recall:.3f}",
        ),
        Claim(
            f"{name}: and so it is from every start",
            min(recalls) >= best_recall - RECALL_LOST, f"at least {min(recalls):.3f}",
        ),
        Claim(
            f"{name}: its NLL is at most {NLL_LOST:g} of the best fixed value's, from any start",
            nll <= NLL_LOST * best_nll, f"{nll:.3f} and {best_nll:.3f}",
        ),
        Claim(
            f"{name}: its ECE is at most {ECE_LEFT:g} of the learned temperature's, from any start",
            ece <= ECE_LEFT * learned_ece, f"{ece:.3f} and {learned_ece:.3f}",
        ),
        *(claim for after, found in frozen.items() for claim in claims_of_fits(f"{name}: fitted after {after}", found)),
    ]  # fmt: skip


def claims_of_fits(what: str, runs: Sequence[Run]) -> list[Claim]:
    """Returns what is claimed of temperatures that are fitted after trainings."""
    better = sum(run.fitted_nll <= min(run.default_nll.values()) for run in runs)
    right = sum(run.fitted_ece <= FROZEN_ECE for run in runs)
    worst = max(run.fitted_ece for run in runs)
    return [
        Claim(
            f"{what}, the NLL is below that at each of {', '.join(f'{t:g}' for t in DEFAULTS)}",
            better == len(runs), f"in {better} of {len(runs)} trainings",
        ),
        Claim(
            f"{what}, the ECE is at most {FROZEN_ECE:g}", right == len(runs),
            f"in {right} of {len(runs)} trainings, {worst:.3f} in the worst",
        ),
    ]  # fmt: skip


COLUMNS = {
    "final t": ("temperature", ".4f"), "R@1": ("recall_at_1", ".3f"), "NLL": ("nll", ".3f"), "ECE": ("ece", ".3f"),
    "fitted t": ("fitted", ".4f"), "its NLL": ("fitted_nll", ".3f"), "its ECE": ("fitted_ece", ".3f"),
}  # fmt: skip


def reported(run: Run) -> dict[str, Any]:
    """Returns a run as it is written, to six digits and with one temperature of several steps."""
    found = asdict(run) | {"history": run.history[::EVERY]}
    rounded: dict[str, Any] = json.loads(json.dumps(found), parse_float=lambda x: float(f"{float(x):.6g}"))
    return rounded


def print_runs(splits: Sequence[Task], runs: Runs) -> None:
    task, steps = splits[0], sorted({each.steps for each in splits})  # splits differ in their pairs by a few
    print(f"\n{task.title}: {len(task.train)} pairs to train on, {len(task.fitting)} to fit with, {len(task.test)} to")
    print(f"test with; {' or '.join(map(str, steps))} steps of {task.batch}; means of {len(splits)} seeds:\n")
    rows = [
        [str(policy), *(f"{mean(x, field):{form}}" for field, form in COLUMNS.values())] for policy, x in runs.items()
    ]
    print_table(["temperature", *COLUMNS], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints, draws and writes; returns 1 where `--strict` found something claimed not shown, else 0."""
    given = parsed(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows each line as it comes
    started = time.perf_counter()
    claims, report = [], {}
    for name, splits in tasks(given).items():
        runs, task = trained(splits, given.seeds), splits[0]
        print_runs(splits, runs)
        claims += claims_of(name, runs)
        report[name] = {
            "title": task.title, "pairs": [len(x) for x in (task.train, task.fitting, task.test)],
            "batch": task.batch, "steps": [each.steps for each in splits],
            "every": EVERY, "runs": {str(policy): list(map(reported, found)) for policy, found in runs.items()},
        }  # fmt: skip
    status = print_claims(claims, given.strict)
    seconds = time.perf_counter() - started
    whole: dict[str, Any] = {
        **environment(torch.device("cpu")), "seconds": seconds, "seeds": given.seeds, "tasks": report,
        "claims": [asdict(claim) for claim in claims],
    }  # fmt: skip
    write_json(given.output / "temperature.json", whole)
    draw(given.output / "temperature.png", whole)
    print(f"\nPicture and figures: {given.output}/temperature.png, {given.output}/temperature.json ({seconds:.0f} s)")
    return status


if __name__ == "__main__":
    sys.exit(main())
