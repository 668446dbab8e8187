"""The steps that the dense losses share: unit rows, temperatures, log-sums that leave pairs out, reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = 1e-12
IGNORED = -100


def unit_rows(x: Tensor) -> Tensor:
    """Return `F.normalize(x, dim=-1)`, but without a gradient for rows of a norm up to EPS (there it would be 1e12)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    small = norm <= EPS
    return torch.where(small, x.detach() / EPS, x / torch.where(small, 1, norm))


def per_row(temperature: Any, like: Tensor, rows: int) -> Tensor:
    """Return the temperature of every row, (rows,), in the dtype of `like`."""
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=like.dtype)
    return temperature.to(like.device, like.dtype).reshape(-1).expand(rows)


def log_sum(logits: Tensor) -> Tensor:
    """Return the logsumexp of each row; -inf, with a gradient of 0, where a row has nothing but -inf."""
    none = (logits == -torch.inf).all(1)
    return torch.where(none, -torch.inf, torch.logsumexp(torch.where(none[:, None], 0, logits), dim=1))


def log_softmax(logits: Tensor) -> Tensor:
    """Return `F.log_softmax(logits, dim=1)` with full relative accuracy where one logit holds nearly all of the mass.

    The largest logit stays out of the sum that it is compared with, so that nothing cancels.
    """
    largest = logits.argmax(1, keepdim=True)
    rest = log_sum(logits.scatter(1, largest, -torch.inf))[:, None]
    top = logits.gather(1, largest)
    log_top = torch.nn.functional.logsigmoid(top - rest)
    return (logits - top + log_top).scatter(1, largest, log_top)


def reduce(rows: Tensor, reduction: str, total: Any = None) -> Tensor:
    """Return the rows, their sum, or their sum over `total`, which by default is their number."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (len(rows) if total is None else total)
