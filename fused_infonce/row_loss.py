"""Losses of one row, as functions of `x = neg - pos`; the derivative is dL/dneg = -dL/dpos."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def infonce(x: Tensor) -> Tensor:
    """`-log(exp(pos) / (exp(pos) + exp(neg))) = log(1 + exp(x))`: exact at both ends, where `lse - pos` is not."""
    return -F.logsigmoid(-x)


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "infonce": (infonce, torch.sigmoid),
}
