"""SigLIP's loss as a logistic regression over all pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import per_row, reduce, unit_rows


def siglip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Any, logit_bias: Any = None,
    negative_text_features: Tensor | None = None, *, image_ids: Tensor | None = None, text_ids: Tensor | None = None,
    negative_ids: Tensor | None = None, weight: Tensor | None = None, normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Return the loss of labels 1 of pairs (i, i) and -1 of all others, but for those of equal ids, which are 0."""
    image, n = image_features, len(image_features)
    text = text_features if negative_text_features is None else torch.cat([text_features, negative_text_features])
    if normalize:
        image, text = unit_rows(image), unit_rows(text)
    bias = 0.0 if logit_bias is None else logit_bias
    if isinstance(bias, Tensor):
        bias = bias.to(image.device).reshape(())
    logits = (image @ text.T) * per_row(logit_scale, image, n)[:, None] + bias
    positive = torch.eye(n, len(text), dtype=torch.bool, device=image.device)
    left_out = torch.zeros_like(positive)
    rows = text_ids if image_ids is None else image_ids
    for ids, columns in ((text_ids, slice(0, n)), (negative_ids, slice(n, None))):
        if ids is not None and rows is not None:
            left_out[:, columns] = rows[:, None] == ids
    labels = torch.where(positive, 1.0, -1.0).to(logits)
    each = -F.logsigmoid(labels * logits).masked_fill(left_out & ~positive, 0)
    losses = each.sum(1)
    if weight is not None:
        losses = losses * weight
    return reduce(losses, reduction, None if weight is None else weight.sum())
