"""The ladder of temperatures of a profile, and the sums over scores that a profile is made of.

The inverse temperatures are beta_k = beta_0 2^(k / 2). With x_j = d_j - m, of the products d_j and their maximum m,

    e_k = exp(beta_k x),    e_{k+2} = e_k^2,    sums (3, K, N) = sum_j e_k, sum_j e_k x, sum_j e_k x^2

so that two exponentials a score serve every rung, a square never overflows, and what underflows is nothing beside 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Profile(NamedTuple):
    """What a ladder of K temperatures makes of rows, over the negatives of all sets. Biases are 0 or -inf.

    d_ij = x_i . y_j is the product of rows as the logits see them, a cosine with `normalize`: the logit at t is d / t.
    With p_ij = exp(d_ij / t_k - log_z_ki):

    pos, hardest: d of the target and the largest d, (N,) in the accumulator dtype; 0 of a row without a target, -inf of
        one without negatives
    above, ties: (N,) int64; how many d are above pos, and how many tied with it, within `ladder.rounding` times the
        lengths of the query and its target. What is NaN is above. Of any value in a row without a target
    log_z: log sum_j exp(d_ij / t_k), (K, N); -inf where there are none
    mean, variance: of d under p, (K, N): the first and the second derivative of log_z in 1 / t; 0 where there are none

    A product that is not finite makes hardest, log_z, mean and variance of its row NaN.
    """

    pos: Tensor
    hardest: Tensor
    above: Tensor
    ties: Tensor
    log_z: Tensor
    mean: Tensor
    variance: Tensor


class Ladder(NamedTuple):
    """Inverse temperatures in ratio sqrt(2), the warmest first."""

    first: float
    rungs: int

    @staticmethod
    def over(lowest: float, highest: float) -> Ladder:
        """Return the ladder from the temperature `highest` down to `lowest`, or up to a rung beyond it."""
        return Ladder(1 / highest, 1 + math.ceil(2 * math.log2(highest / lowest) - 1e-9))

    def inverse(self, like: Tensor) -> Tensor:
        """Return beta (K,), in the dtype and on the device of a tensor."""
        return torch.tensor([self.first * 2 ** (k / 2) for k in range(self.rungs)], dtype=like.dtype).to(like.device)


class Sums(NamedTuple):
    """The sums of rows over some of their negatives; a maximum of -inf, and zeros, where there are none."""

    maximum: Tensor  # (N,)
    moments: Tensor  # (3, K, N)


class Counts(NamedTuple):
    """How many of the rows' negatives are above the positive, and how many tied with it: (N,) int64."""

    above: Tensor
    ties: Tensor


def merge(a: Sums | None, b: Sums, inverse: Tensor) -> Sums:
    """Return the sums over the columns of two."""
    if a is None:
        return b
    m = torch.maximum(a.maximum, b.maximum)
    return Sums(m, _moved(a, m, inverse) + _moved(b, m, inverse))


def _moved(sums: Sums, m: Tensor, inverse: Tensor) -> Tensor:
    """Return the sums relative to a maximum m: x becomes x + d, and e_k becomes exp(beta_k d) e_k."""
    d = torch.where(sums.maximum == -math.inf, 0, sums.maximum - m)
    one, x, square = sums.moments
    moved = torch.stack([one, x + d * one, square + d * (2 * x + d * one)])
    return moved.mul_(torch.exp(inverse[:, None] * d))


def added(a: Counts | None, b: Counts) -> Counts:
    """Return the counts over the columns of two."""
    return b if a is None else Counts(a.above + b.above, a.ties + b.ties)


def sums_of(d: Tensor, out: Tensor, inverse: Tensor, low: Tensor, high: Tensor) -> tuple[Sums, Counts]:
    """Return the sums and counts of few products (N, H), with an exponential each and rung; out: those that are none.

    low, high: (N,), between which a product is tied with the positive.
    """
    under = d <= high[:, None]
    counts = Counts((~under & ~out).sum(1), (under & (d >= low[:, None]) & ~out).sum(1))
    m = d.masked_fill(out, -math.inf).amax(1) if d.shape[1] else torch.full_like(low, -math.inf)
    x = (d - m[:, None]).masked_fill(out, 0)
    rungs = [torch.exp(x * beta).masked_fill(out, 0) for beta in inverse]
    return Sums(m, torch.stack([torch.stack([(e * x**power).sum(1) for e in rungs]) for power in range(3)])), counts


def profile_of(sums: Sums | None, counts: Counts | None, pos: Tensor, inverse: Tensor) -> Profile:
    """Return the profile of rows with these positives."""
    if sums is None or counts is None:  # no columns at all
        zero, none = pos.new_zeros(len(inverse), len(pos)), pos.new_zeros(len(pos), dtype=torch.int64)
        lowest = torch.full_like(zero, -math.inf)
        return Profile(pos, torch.full_like(pos, -math.inf), none, none.clone(), lowest, zero, zero.clone())
    m = sums.maximum
    none = m == -math.inf
    base = m.masked_fill(none, 0)
    _, x, square = sums.moments / sums.moments[0].masked_fill(none, 1)
    log_z = (inverse[:, None] * base + sums.moments[0].log()).masked_fill_(none, -math.inf)
    mean = (base + x).masked_fill_(none, 0)
    variance = (square - x * x).clamp_min_(0).masked_fill_(none, 0)
    return Profile(pos, m, *counts, log_z, mean, variance)


def rounding(dtype: torch.dtype, d: int) -> float:
    """Return how far two products of the same unit rows of length d are apart by their rounding, at most.

    Two orders of the same sum differ by less than its square root of roundings; a quarter of it was never reached in
    the tests, which plant copies of positives.
    """
    return torch.finfo(dtype).eps * max(4.0, math.sqrt(d) / 4)
