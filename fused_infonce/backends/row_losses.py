"""Losses of one row as functions of `x = neg - pos`, their slopes, and the gradient of the temperature.

The derivative of a row's loss is dL/dneg = -dL/dpos = slope(x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Temperature


class RowLoss(NamedTuple):
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def infonce(x: Tensor) -> Tensor:
    """Compute `-log(exp(pos) / (exp(pos) + exp(neg))) = log(1 + exp(x))`: exact at both ends, as `lse - pos` is not.

    Above the threshold it is x itself, there to the last bit even in float64. PyTorch multiplies an upstream gradient
    by exp(x) before it divides: at a threshold of 80 a loss scale of 2^16 would overflow float32.
    """
    return F.softplus(x, threshold=40)


def decoupled(x: Tensor) -> Tensor:
    """Compute `-log(exp(pos) / exp(neg)) = x`; 0 for a row without negatives, where x is -inf."""
    return torch.where(x == -torch.inf, 0, x)


def decoupled_slope(x: Tensor) -> Tensor:
    return (x != -torch.inf).to(x.dtype)


def balanced(x: Tensor) -> Tensor:
    """Compute `log(1 + exp(x)) / sigmoid(x)`, InfoNCE over its own slope, where the divisor gets no gradient.

    The slope is 1 for every x, and the value at least 1. From e = exp(-|x|) it is (1 + e) (x + log(1 + e)) above 0 and
    (1 + e) log(1 + e) / e below. 0 for a row without negatives, where x is -inf.
    """
    with torch.no_grad():
        e = torch.exp(-x.abs())
        log = torch.log1p(e)
        value = (1 + e) * torch.where(x > 0, x + log, torch.where(e < torch.finfo(x.dtype).eps, 1, log / e))
    none = x == -torch.inf
    x = x.masked_fill(none, 0)
    return (value + (x - x.detach())).masked_fill(none, 0)


ROW_LOSSES = {"infonce": RowLoss(infonce, torch.sigmoid), "decoupled": RowLoss(decoupled, decoupled_slope)}


def weighted(values: Tensor, weight: Tensor | float) -> Tensor:
    """Return `weight_i values_i` of (..., N) values and (N,) weights, or one weight for all rows, which is not 0.

    The value of a row of weight 0 counts for nothing, even where it is NaN; a query that is NaN still makes gradients
    of the keys NaN, by its products with 0.
    """
    values = values * weight
    return values.masked_fill(weight == 0, 0) if isinstance(weight, Tensor) else values


def loss_and_slope(loss: str, x: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the weighted losses of rows and their derivatives with respect to x."""
    value, slope = ROW_LOSSES[loss]
    return weighted(value(x), weight), weighted(slope(x), weight)


def temperature_gradient(logits: Tensor, temperature: Temperature) -> Tensor:
    """Return `dL/dt_i = -(sum_j s_ij dL/ds_ij) / t_i` in the shape of what is given; logits: the sum of each row, (N,).

    kernels/dense.py has it too.
    """
    given = temperature.as_given()
    if not temperature.is_shared():
        return -logits / given
    t = given if temperature.lowest is None else temperature.lowest
    return logits.sum(0, keepdim=given.dim() > 0).div_(-t)
