"""At which score a pair is more likely a positive than not."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Threshold(NamedTuple):
    """The score that as large a share of positives is below as of negatives is not below.

    score: in the middle of the gap between scores that it may be in. error: the mean of both shares, which differ by
    one score at most: the equal error rate. Both are NaN where there is nothing to compare.
    """

    score: float
    error: float


def threshold(pos: Tensor, neg: Tensor) -> Threshold:
    """Return the threshold of equal errors between scores of positives (N,) and of negatives (M,); -inf is left out."""
    pos, neg = (torch.sort(x[x > -math.inf].double()).values for x in (pos, neg))
    if not len(pos) or not len(neg):
        return Threshold(math.nan, math.nan)
    scores = torch.sort(torch.cat([pos, neg])).values
    missed = torch.searchsorted(pos, scores) / len(pos)  # rises with the threshold
    taken = 1 - torch.searchsorted(neg, scores) / len(neg)  # falls
    crossed = (missed >= taken).nonzero()
    if not len(crossed):  # the largest score is that of both
        return Threshold(scores[-1].item(), 0.5)
    first = int(crossed[0])
    return Threshold(scores[first - 1 : first + 1].mean().item(), ((missed[first] + taken[first]) / 2).item())
