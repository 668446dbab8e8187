"""Three rules that set the temperature from a training batch; docs/temperature.md advises against them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_infonce.temperature import sweep

BOUNDS = (0.005, 3.0)
SHARE = 0.1  # of the negatives, over which the gradient of a row is to be spread
BISECTIONS = 20


def effective_negatives(query: Tensor, key: Tensor, temperature: float) -> float:
    """Returns the temperature at which the median row has its gradient spread over a tenth of the negatives."""
    found, (low, high) = sweep(query, key, BOUNDS), BOUNDS
    wanted = SHARE * (len(query) - 1)
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        if found.effective_negatives(middle).median() < wanted:  # a warmer softmax spreads over more
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def adacos(query: Tensor, key: Tensor, temperature: float) -> float:
    """Returns the dynamic scale of AdaCos (Zhang et al. 2019, arXiv:1905.00292), log(B) / cos(min(pi / 4, theta)).

    B is the mean over rows of sum_j exp(cos_ij / t) over the negatives, and theta the median angle of the positives.
    """
    found = sweep(query, key, [temperature])
    log_b = torch.logsumexp(found.at(temperature).log_z, 0) - math.log(len(query))
    angle = found.pos.clamp(-1, 1).acos().median().clamp(max=math.pi / 4)
    return min(max(1 / (log_b / angle.cos()).item(), BOUNDS[0]), BOUNDS[1])


def variance(query: Tensor, key: Tensor, temperature: float) -> float:
    """Returns variance / (mean positive - mean negative) of the cosines.

    Of negatives that are normally distributed, log_z = log M + mean / t + variance / (2 t^2), and the derivative of the
    mean loss in 1 / t is 0 at this temperature.
    """
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    scores = query @ key.T
    others = scores[~torch.eye(len(scores), dtype=torch.bool)]
    gap = (scores.diagonal().mean() - others.mean()).clamp_min(1e-6)
    return min(max((others.var() / gap).item(), BOUNDS[0]), BOUNDS[1])


RULES = {"effective negatives": effective_negatives, "AdaCos": adacos, "variance": variance}
