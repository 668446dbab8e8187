"""Losses of one row, as functions of `x = neg - pos`; the derivative is dL/dneg = -dL/dpos."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def infonce(x: Tensor) -> Tensor:
    """`-log(exp(pos) / (exp(pos) + exp(neg))) = log(1 + exp(x))`: exact at both ends, where `lse - pos` is not.

    Above the threshold it is x itself, there to the last bit even in float64.
    """
    return F.softplus(x, threshold=80)


def decoupled(x: Tensor) -> Tensor:
    """`-log(exp(pos) / exp(neg)) = x`; 0 of a row without negatives, where x is -inf."""
    return torch.where(x == -torch.inf, 0, x)


def decoupled_slope(x: Tensor) -> Tensor:
    return (x != -torch.inf).to(x.dtype)


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "infonce": (infonce, torch.sigmoid),
    "dcl": (decoupled, decoupled_slope),
}
