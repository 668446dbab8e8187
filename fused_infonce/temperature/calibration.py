"""Whether probabilities are frequencies: scores of them, and the bins of a reliability diagram."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks


class Calibration(NamedTuple):
    """How well confidences c_i agree with how often they are right, y_i = 1 or 0; see `calibration`.

    nll: the mean negative log-likelihood
    brier: the mean of (c_i - y_i)^2
    ece: the expected calibration error, over bins of equal width
    ece_equal_mass: the same over bins of equally many rows
    sizes, confidence, accuracy: of the bins of equal width, (B,): how many rows, the mean c and the mean y of them, NaN
        for an empty bin
    """

    nll: float
    brier: float
    ece: float
    ece_equal_mass: float
    sizes: Tensor
    confidence: Tensor
    accuracy: Tensor


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15, nll: float | None = None) -> Calibration:
    """Compute how well confidences agree with how often they are right.

        ECE = sum_b n_b / N |mean_b c - mean_b y|

    Bin b of equal width holds the c in (b / B, (b + 1) / B], and the first one 0 as well. Bins of equal mass hold the
    rows in the order of c, B groups whose sizes differ by 1 at most.

    Args:
        confidence: c (N,), floating, in [0, 1].
        correct: y (N,), bool: whether what was predicted with this confidence is right.
        bins: B.
        nll: the mean negative log-likelihood of the labels; by default that of y under c, of two outcomes.

    Raises:
        ValueError: shapes, values, no rows. TypeError: types, dtypes.

    Reference: Guo et al. 2017, arXiv:1706.04599; Nixon et al. 2019, arXiv:1904.01685, for bins of equal mass.
    """
    checks.embeddings("confidence", confidence, 1, "(N,)")
    right = checks.mask("correct", correct, tuple(confidence.shape), confidence.device).double()
    checks.whole("bins", bins, 1)
    if not len(confidence):
        raise ValueError("confidence must have a row, got shape (0,)")
    c, right = confidence.double().cpu(), right.cpu()  # where sums over bins are deterministic
    if not ((c >= 0) & (c <= 1 + 1e-6)).all():  # which NaN is not
        bad = c[~((c >= 0) & (c <= 1 + 1e-6))][0].item()
        raise ValueError(f"confidence must be in [0, 1], got {bad}")
    width = (torch.ceil(c * bins) - 1).clamp(0, bins - 1).long()
    order = torch.empty_like(width)
    order[torch.argsort(c, stable=True)] = torch.arange(len(c))
    ece, count, mean, accuracy = _binned(c, right, width, bins)
    if nll is None:
        nll = torch.nn.functional.binary_cross_entropy(c.clamp(0, 1), right).item()
    equal_mass = _binned(c, right, order * bins // len(c), bins)[0]
    of_bins = (x.to(confidence.device) for x in (count, mean, accuracy))
    return Calibration(nll, ((c - right) ** 2).mean().item(), ece, equal_mass, *of_bins)


def _binned(c: Tensor, right: Tensor, index: Tensor, bins: int) -> tuple[float, Tensor, Tensor, Tensor]:
    """Return the calibration error over bins, and the counts, mean confidences and accuracies of the bins."""
    count = torch.bincount(index, minlength=bins)
    sums = [torch.bincount(index, weights, minlength=bins) for weights in (c, right)]
    error = (sums[0] - sums[1]).abs().sum().item() / len(c)
    return error, count, sums[0] / count, sums[1] / count
