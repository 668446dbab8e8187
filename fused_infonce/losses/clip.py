"""CLIP's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends.contract import accumulator
from .base import ContrastiveLoss
from .info_nce import info_nce


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """CLIP's loss, the mean of images against texts and of texts against images, without the N x N logits.

        loss_i = -1/2 log( exp(s_ii) / sum_j exp(s_ij) ) - 1/2 log( exp(s_ii) / sum_j exp(s_ji) )
        s_ij = scale (image_i . text_j) + bias

    It is `info_nce(..., symmetric=True)` at the temperature 1 / scale, with the values of open_clip's `ClipLoss()`.

    Args:
        image_features, text_features: (N, D) each, row i of one the pair of row i of the other; float16, bfloat16,
            float32 or float64. Unit rows, as CLIP's models return them, unless `normalize`.
        logit_scale: what multiplies the products, already exponentiated: a positive number, a one-element tensor (on
            the CPU too), or (N,) or (N, 1) per pair; gradients flow to tensors. Values of tensors are checked on a CPU;
            on a GPU a bad one gives NaN.
        logit_bias: a number or a one-element tensor. Added to every logit it changes no softmax: the loss does not
            depend on it, and its gradient is 0.
        normalize: divide every row by max(norm, 1e-12) first.
        reduction: "mean" over the N pairs, "sum", or "none": (N,).
        backend, workspace_limit: as in `info_nce`.

    Returns: as `info_nce`.

    Raises:
        ValueError: shapes, devices, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: Radford et al. 2021, arXiv:2103.00020; https://github.com/mlfoundations/open_clip.
    """
    if not checks.alike(image_features, text_features):
        checks.embeddings("image_features", image_features, 2, "(N, D)")
        checks.embeddings("text_features", text_features, 2, "(N, D)")
        checks.same_kind({"image_features": image_features, "text_features": text_features})
        if image_features.shape != text_features.shape:
            raise ValueError(
                f"text_features must have shape {tuple(image_features.shape)} as image_features has, "
                f"got {tuple(text_features.shape)}"
            )
    temperature = temperature_of(logit_scale, image_features)
    bias = bias_of(logit_bias)
    loss = info_nce(
        image_features, text_features, temperature=temperature, reduction=reduction, symmetric=True,
        normalize=normalize, backend=backend, workspace_limit=workspace_limit,
    )  # fmt: skip
    return loss if bias is None else loss + 0 * bias.to(loss.device, loss.dtype)


def temperature_of(logit_scale: Any, features: Tensor) -> float | Tensor:
    """1 / scale, in the dtype of the statistics where it is a tensor."""
    if not isinstance(logit_scale, Tensor):
        return 1 / checks.positive_float("logit_scale", logit_scale)
    n = len(features)
    if logit_scale.dtype not in checks.FLOATS:
        raise TypeError(f"logit_scale must be a number or a floating tensor, got {logit_scale.dtype}")
    if logit_scale.numel() != 1 and tuple(logit_scale.shape) not in ((n,), (n, 1)):
        raise ValueError(
            f"logit_scale must be a number, a one-element tensor or one value per pair, shape ({n},) or ({n}, 1), "
            f"got shape {tuple(logit_scale.shape)}"
        )
    if logit_scale.device != features.device and not (logit_scale.numel() == 1 and logit_scale.device.type == "cpu"):
        raise ValueError(
            f"logit_scale must be on {features.device} as image_features is, or one element on the CPU, "
            f"got {logit_scale.device}"
        )
    good = (logit_scale > 0) & logit_scale.isfinite()
    if checks.values_are_free(logit_scale) and not good.all():
        raise ValueError(f"logit_scale must be positive and finite, got {logit_scale[~good].flatten()[0].item()}")
    return 1 / logit_scale.to(accumulator(contrast.compute_dtype([features])))


def bias_of(logit_bias: Any) -> Tensor | None:
    """Checked; 0-d where it takes part in the gradient, else None."""
    if logit_bias is None:
        return None
    if not isinstance(logit_bias, Tensor):
        if isinstance(logit_bias, bool) or not isinstance(logit_bias, (int, float)):
            raise TypeError(f"logit_bias must be a number or a one-element tensor, got {type(logit_bias).__name__}")
        return None
    if logit_bias.dtype not in checks.FLOATS:
        raise TypeError(f"logit_bias must be a number or a floating tensor, got {logit_bias.dtype}")
    if logit_bias.numel() != 1:
        raise ValueError(f"logit_bias must be a number or a one-element tensor, got shape {tuple(logit_bias.shape)}")
    return logit_bias.reshape(()) if logit_bias.requires_grad and torch.is_grad_enabled() else None


class ClipLoss(ContrastiveLoss):
    """CLIP's symmetric loss, called as open_clip's `ClipLoss`; see `clip_loss`.

    Args:
        normalize, reduction, backend, workspace_limit: as in `clip_loss`.

    Example:
        >>> loss = ClipLoss()
        >>> images = F.normalize(torch.randn(32, 128, requires_grad=True), dim=-1)
        >>> texts = F.normalize(torch.randn(32, 128), dim=-1)
        >>> loss(images, texts, logit_scale=torch.tensor(100.0)).backward()
    """

    def __init__(
        self,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(reduction, normalize, backend, workspace_limit)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        return clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            **self.options,
        )
