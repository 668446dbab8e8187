"""Errors of loss and gradient at low temperatures with bfloat16 inputs, against float64 on the same inputs.

    python -m benchmarks.suites.accuracy [--record results/accuracy.csv]
    python -m benchmarks.suites.accuracy --rows 512 --dim 64 --seeds 200 --temperatures 0.01
                                                                (results/accuracy_few_rows.csv)

Contestants: the dense loss in bfloat16; with float32 logits (the usual remedy), whose gradient is `softmax - 1`; ours;
and the floor of every implementation with float32 accumulators: all in float64, but for the product of the scores,
which is one float32 `torch.mm` of exact unit rows. Errors are root mean squares over the seeds, the worst beside them.
A key is its query plus noise: "tight" pairs have a cosine near 0.99, "medium" near 0.8, "loose" near 0.45;
"cone" adds one large common vector to every row, so that all cosines are near 0.98.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import HERE, dense
from fused_infonce import info_nce

NOISE = {"tight": 0.14, "medium": 0.75, "loose": 2.0}
SETTINGS = [(0.05, "tight"), (0.02, "tight"), (0.02, "medium"), (0.01, "loose"), (0.07, "loose"), (0.1, "cone")]
FIELDS = ["temperature", "pairs", "true_loss", "contestant", "loss_error", "worst_loss_error", "grad_error"]


def pairs(kind: str, n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of one kind."""
    torch.manual_seed(seed)
    query = torch.randn(n, d)
    key = query + NOISE.get(kind, 1.0) * torch.randn(n, d)
    if kind == "cone":
        common = 7 * torch.randn(d)
        query, key = query + common, key + common
    return query.bfloat16(), key.bfloat16()


def dense_fp32(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """The dense loss of float32 logits."""
    return dense.info_nce(query.float(), key.float(), temperature)


def float32_scores(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """The loss in float64, but for one float32 product of unit rows."""
    query, key = (F.normalize(x.double(), dim=-1) for x in (query, key))
    exact, rounded = query @ key.T, (query.detach().float() @ key.detach().float().T).double()
    scores = (exact + (rounded - exact.detach())) / temperature  # the rounded value with the exact gradient
    negatives = scores.masked_fill(torch.eye(len(query), dtype=torch.bool), -torch.inf).logsumexp(1)
    return F.softplus(negatives - exact.diagonal() / temperature, threshold=80).mean()


CONTESTANTS: dict[str, Callable[..., Tensor]] = {
    "bf16 dense": dense.info_nce,
    "fp32 logits": dense_fp32,
    "fp32 product only": float32_scores,
    "fused_infonce": info_nce,
}
EXACT = partial(info_nce, backend="reference")


def run(loss: Callable[..., Tensor], query: Tensor, key: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss and its query gradient."""
    query = query.clone().requires_grad_()
    value = loss(query, key, temperature=temperature)
    (grad,) = torch.autograd.grad(value, query)
    return value.detach().double(), grad.double()


def error(value: Tensor, truth: Tensor) -> float:
    """The Frobenius-relative error."""
    return (torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth)).item()


def measure(n: int, d: int, settings: list[tuple[float, str]], seeds: int) -> list[dict[str, object]]:
    """The rows of the table, one for every setting and contestant."""
    rows = []
    for temperature, kind in settings:
        errors: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
        for seed in range(seeds):
            query, key = pairs(kind, n, d, seed)
            true_loss, true_grad = run(EXACT, query.double(), key.double(), temperature)
            for name, loss in CONTESTANTS.items():
                value, grad = run(loss, query, key, temperature)
                errors[name].append((error(value, true_loss), error(grad, true_grad)))
        for name, measured in errors.items():
            of_loss, of_grad = torch.tensor(measured, dtype=torch.float64).unbind(1)
            figures = [of_loss.square().mean().sqrt(), of_loss.max(), of_grad.square().mean().sqrt()]
            row = [temperature, kind, f"{true_loss.item():.1e}", name, *(f"{x.item():.1e}" for x in figures)]
            rows.append(dict(zip(FIELDS, row, strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--temperatures", type=float, nargs="+", help="each with tight, medium and loose pairs")
    parser.add_argument("--record", help="write the table to this CSV file, absolute or relative to benchmarks/")
    args = parser.parse_args()
    chosen = [(t, kind) for t in args.temperatures or [] for kind in NOISE]
    rows = measure(args.rows, args.dim, chosen or SETTINGS, args.seeds)
    for row in rows:
        print("  ".join(f"{row[field]!s:>17}" for field in FIELDS))
    if args.record:
        with (HERE / args.record).open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
