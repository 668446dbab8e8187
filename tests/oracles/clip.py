"""CLIP's loss as two cross-entropies over all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import reduce, unit_rows


def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Any, logit_bias: Any = None, *,
    image_bias: Tensor | None = None, text_bias: Tensor | None = None, positive_bias: bool = True,
    normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Return the mean of the images' and the texts' cross-entropy; a bias of all logits changes neither."""
    image, text = image_features, text_features
    if normalize:
        image, text = unit_rows(image), unit_rows(text)
    labels = torch.arange(len(image), device=image.device)
    each = [(image @ text.T) * logit_scale, (text @ image.T) * logit_scale]
    for i, bias in enumerate((text_bias, image_bias)):
        if bias is not None:
            added = bias.expand(len(image), -1)
            each[i] = each[i] + (added if positive_bias else added.clone().fill_diagonal_(0))
    rows = sum(F.cross_entropy(logits, labels, reduction="none") for logits in each) / 2
    return reduce(rows, reduction)
