"""MoCo's loss as a cross-entropy over the positive and the whole queue."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import per_row, unit_rows


def moco_loss(
    query: Tensor, key: Tensor, queue: Tensor, temperature: Any = 0.07, reduction: str = "mean", *,
    key_bias: Tensor | None = None, negative_bias: Tensor | None = None, normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Return the loss of queries, their keys and a (D, K) queue, of which only the queries get a gradient."""
    key, queue = key.detach(), queue.detach()
    if normalize:
        query, key, queue = unit_rows(query), unit_rows(key), unit_rows(queue.T).T
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], dim=1)
    logits = logits / per_row(temperature, query, len(query))[:, None]
    if key_bias is not None:
        logits = torch.cat([logits[:, :1] + key_bias[:, None], logits[:, 1:]], dim=1)
    if negative_bias is not None:
        logits = torch.cat([logits[:, :1], logits[:, 1:] + negative_bias], dim=1)
    labels = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits, labels, reduction=reduction)
