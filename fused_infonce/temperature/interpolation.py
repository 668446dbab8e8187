"""Functions of the inverse temperature between the rungs of a ladder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The quintic of Hermite on [0, 1]: the coefficients of u^0, ..., u^5 of what multiplies the value, the first and the
# second derivative at 0, and those at 1.
BASIS = (
    (1.0, 0.0, 0.0, -10.0, 15.0, -6.0), (0.0, 1.0, 0.0, -6.0, 8.0, -3.0), (0.0, 0.0, 0.5, -1.5, 1.5, -0.5),
    (0.0, 0.0, 0.0, 10.0, -15.0, 6.0), (0.0, 0.0, 0.0, -4.0, 7.0, -3.0), (0.0, 0.0, 0.0, 0.5, -1.0, 0.5),
)  # fmt: skip


class AtOne(NamedTuple):
    """The log-sum of rows at one temperature, with its derivatives in the inverse temperature, (N,) each."""

    log_z: Tensor
    mean: Tensor
    variance: Tensor


def between(rungs: Sequence[float], log_z: Tensor, mean: Tensor, variance: Tensor, beta: float) -> AtOne:
    """Return what the rungs, K inverse temperatures, say of `beta`: on a rung what it holds, elsewhere the quintic.

    log_z, mean, variance: (K, N), the function and its first two derivatives. The quintic through the two rungs around
    beta has an error of f^(6) h^6 / 46080, with h their distance. Its second derivative would magnify the rounding of
    log_z, so that the variance is the slope of the cubic through the means and the variances. A log_z of -inf stays.
    """
    for k, rung in enumerate(rungs):
        if len(rungs) == 1 or abs(beta / rung - 1) < 4 * torch.finfo(log_z.dtype).eps:
            return AtOne(log_z[k], mean[k], variance[k])
    k = min(max(sum(rung <= beta for rung in rungs) - 1, 0), len(rungs) - 2)
    h = rungs[k + 1] - rungs[k]
    u = (beta - rungs[k]) / h
    parts = [f[end] * h**order for end in (k, k + 1) for order, f in enumerate((log_z, mean, variance))]

    def combined(weights: list[float]) -> Tensor:
        """Return the sum of the values and derivatives at both ends with these weights; that of zeros is 0."""
        return torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)

    value, slope = (combined([_polynomial(c, u, order) for c in BASIS]) / h**order for order in range(2))
    rise = (mean[k + 1] - mean[k]) / h
    curvature = 6 * u * (1 - u) * rise + (1 - u) * (1 - 3 * u) * variance[k] + u * (3 * u - 2) * variance[k + 1]
    none = log_z[k] == -torch.inf
    return AtOne(value.masked_fill(none, -torch.inf), slope.masked_fill(none, 0), curvature.clamp_min(0))


def _polynomial(coefficients: tuple[float, ...], u: float, order: int) -> float:
    """Return the derivative of this order of a polynomial."""
    for _ in range(order):
        coefficients = tuple(i * c for i, c in enumerate(coefficients))[1:]
    return sum(c * u**i for i, c in enumerate(coefficients))
