"""Training at several temperatures, and the error of the bfloat16 gradient at each: `--temperatures`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fused_infonce import FusedInfoNCELoss

from .cost import dense_info_nce
from .evaluate import FORMS, encoder_scores, queries_of
from .mining import Pair
from .model import Encoder, embed, hashed_features
from .picture import draw_temperatures
from .report import FORM_TITLES, Claim, environment, print_claims, print_table, write_json
from .settings import Settings
from .train import TrainingData, prepare, train, training_options

GRADIENT_ROWS = 1024
GRADIENT_BOUND = 5e-3


def run(settings: Settings) -> int:
    """Trains and measures at every temperature, and returns the exit status."""
    started = time.perf_counter()
    options = training_options(settings)
    _, split = prepare(settings)
    data = TrainingData.of(split.train)
    # At random, as in training: neighbours in the list come from one module and are unusually hard to tell apart.
    batch = random.Random(settings.seed).sample(split.train, min(GRADIENT_ROWS, len(split.train)))
    runs: list[dict[str, Any]] = []
    for temperature in settings.temperatures or ():
        trained = train(data, replace(options, temperature=temperature), label=f"temperature {temperature:g}")
        scores = encoder_scores(trained.encoder, split.held_out, options.device)
        errors = {
            name: gradient_errors(*embedded(trained.encoder, pairs, options.device), temperature)
            for name, pairs in (("training batch", batch), ("held-out", split.held_out[:GRADIENT_ROWS]))
        }
        runs.append(
            {
                "temperature": temperature,
                "retrieval": {form: asdict(scores[form]) for form in FORMS},
                "gradient_error": errors,
                "loss": trained.losses,
            }
        )
    claims = [
        Claim(
            f"temperature {run['temperature']:g}: error of our bfloat16 gradient at most {GRADIENT_BOUND:g}",
            run["gradient_error"]["training batch"]["fused"] <= GRADIENT_BOUND,
            f"{run['gradient_error']['training batch']['fused']:.1e}",
        )
        for run in runs
    ]
    seconds = time.perf_counter() - started
    report = {
        **environment(options.device),
        "seed": settings.seed,
        "seconds": seconds,
        "training": {
            "pairs": len(split.train), "held_out": len(split.held_out), "epochs": options.epochs,
            "batch": min(options.batch, len(data)), "dim": options.dim,
        },
        "temperatures": runs,
        "claims": [asdict(claim) for claim in claims],
    }  # fmt: skip
    write_json(settings.output / "temperature.json", report)
    draw_temperatures(settings.output / "temperature.png", report)
    print_runs(runs)
    status = print_claims(claims, settings.strict)
    output = settings.output
    print(f"\nPicture and figures: {output}/temperature.png, {output}/temperature.json ({seconds:.0f} s in all)")
    return status


def embedded(encoder: Encoder, pairs: list[Pair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings of the queries, their names removed, and of the keys."""
    query = embed(encoder, hashed_features(queries_of(pairs, "plain")), device)
    return query, embed(encoder, hashed_features([pair.key for pair in pairs]), device)


def gradient_errors(query: Tensor, key: Tensor, temperature: float) -> dict[str, float]:
    """Relative errors (Frobenius) against float64 of both gradients as one vector, for the same bfloat16 inputs.

    `rounding` is the exact gradient rounded to bfloat16: no bfloat16 gradient can be better.
    """
    query, key = query.bfloat16(), key.bfloat16()
    exact_loss = FusedInfoNCELoss(temperature=temperature, backend="reference")
    exact, loss = _gradient(exact_loss, query.double(), key.double())
    fused, _ = _gradient(FusedInfoNCELoss(temperature=temperature), query, key)
    dense, _ = _gradient(lambda q, k: dense_info_nce(q, k, temperature), query, key)
    norm = exact.norm()
    found = {"fused": fused, "dense": dense, "rounding": exact.bfloat16()}
    return {"loss": loss, **{name: ((of_one.double() - exact).norm() / norm).item() for name, of_one in found.items()}}


def _gradient(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> tuple[Tensor, float]:
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    value = loss(query, key)
    gradients = torch.autograd.grad(value, (query, key))
    return torch.cat([gradient.reshape(-1) for gradient in gradients]), value.item()


def print_runs(runs: list[dict[str, Any]]) -> None:
    """Prints one line of scores and errors a temperature."""
    header = [
        "temperature",
        "R@1 (a)",
        "MRR@10 (a)",
        "R@1 (b)",
        "MRR@10 (b)",
        "loss",
        "ours",
        "dense",
        "rounding alone",
    ]
    rows = []
    for one in runs:
        scores = [one["retrieval"][form][metric] for form in FORMS for metric in ("recall_at_1", "mrr_at_10")]
        errors = one["gradient_error"]["training batch"]
        figures = [f"{errors[name]:.1e}" for name in ("loss", "fused", "dense", "rounding")]
        rows.append([f"{one['temperature']:g}", *(f"{score:.3f}" for score in scores), *figures])
    print(
        f"\nHeld-out retrieval, (a) {FORM_TITLES['strict']}, (b) {FORM_TITLES['plain']}; loss and relative error of the"
    )
    print(f"bfloat16 gradient of ours and of the dense loss on {GRADIENT_ROWS} trained pairs, against float64:")
    print_table(header, rows)
