"""CLIP's loss: images against texts, and texts against images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import BackendName, Reduction
from ..backends.contract import KeySet, Problem
from ..backends.precision import statistics_dtype
from ..compose.arguments import call_options
from ..compose.biases import of_two_sides
from ..compose.reduction import reduced
from ..compose.repeated import repeated
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss


@together
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    image_bias: Tensor | None = None,
    text_bias: Tensor | None = None,
    positive_bias: bool = True,
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """CLIP's loss, the mean of images against texts and of texts against images, without the N x N logits.

        loss_i = -1/2 log( exp(s_ii) / sum_j exp(s_ij) ) - 1/2 log( exp(s_ii) / sum_j exp(s_ji) )
        s_ij = scale (image_i . text_j) + bias

    With biases of a side, row j of it has b_j added where it is scored: s_ij + text_bias_j in the sum over texts, and
    s_ji + image_bias_j in the sum over images.

    It is `info_nce(..., symmetric=True)` at the temperature 1 / scale, with the values of open_clip's `ClipLoss()`.

    Args:
        image_features, text_features: (N, D) each, row i of one the pair of row i of the other; float16, bfloat16,
            float32 or float64. Unit rows, as CLIP's models return them, unless `normalize`.
        logit_scale: the factor of the products, 1 / temperature, already exponentiated: a positive number, a
            one-element tensor (on the CPU too), or (N,) or (N, 1) per pair; gradients flow to tensors. Values of
            tensors are checked on a CPU; on a GPU a bad one gives NaN.
        logit_bias: a number or a one-element tensor. Added to every logit it changes no softmax: the loss does not
            depend on it, and its gradient is 0.
        image_bias, text_bias: (N,) each, floating, in nats, such as -log of how often a caption is sampled; gradients
            flow to both. -inf leaves a row out of the other rows' sums, without `positive_bias` alone.
        positive_bias: whether the logits of the pairs have their biases too.
        normalize: divide every row by max(norm, 1e-12) first.
        reduction: "mean" over the N pairs, "sum", or "none": (N,).
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: Radford et al. 2021, arXiv:2103.00020; https://github.com/mlfoundations/open_clip.
    """
    check_features(image_features, text_features)
    return _clip(
        image_features, text_features, temperature_of_scale(logit_scale, image_features), logit_bias,
        image_bias=image_bias, text_bias=text_bias, positive_bias=positive_bias, normalize=normalize,
        reduction=reduction, backend=backend, workspace_limit=workspace_limit, distributed=distributed,
    )  # fmt: skip


@repeated
@together
def _clip(
    image: Tensor, text: Tensor, temperature: float | Tensor, logit_bias: Any, *, image_bias: Any, text_bias: Any,
    positive_bias: Any, normalize: bool, reduction: Reduction, backend: BackendName, workspace_limit: int | None,
    distributed: DistributedLike,
) -> Tensor:  # fmt: skip
    """Return the loss of features at a temperature."""
    check_features(image, text)
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    t = checks.temperature(temperature, image, statistics_dtype(image))
    biases = of_two_sides({"image_bias": image_bias, "text_bias": text_bias}, positive_bias, image)
    problem = Problem(
        KeySet(image, bias=biases.query), (KeySet(text, bias=biases.key),), t, offset=biases.offset, columns=True,
        normalize=normalize, bias_bound=biases.bound,
    )  # fmt: skip
    return with_bias(reduced(problem, options, "infonce"), bias_of(logit_bias))


def check_features(image: Any, text: Any, negatives: Any = None) -> None:
    """Check (N, D) images and their texts, and (M, D) further texts."""
    if negatives is None and checks.alike(image, text):
        return
    named = {"image_features": image, "text_features": text}
    for name, x in named.items():
        checks.embeddings(name, x, 2, "(N, D)")
    if negatives is not None:
        checks.embeddings("negative_text_features", negatives, 2, "(M, D)")
        named["negative_text_features"] = negatives
    checks.same_kind(named)
    if image.shape != text.shape:
        raise ValueError(
            f"text_features must have shape {tuple(image.shape)} as image_features has, got {tuple(text.shape)}"
        )
    if negatives is not None and negatives.shape[1] != image.shape[1]:
        raise ValueError(
            f"negative_text_features must have {image.shape[1]} components as image_features has, "
            f"got {negatives.shape[1]}"
        )


def temperature_of_scale(logit_scale: Any, features: Tensor) -> float | Tensor:
    """Return 1 / scale, checked, in the dtype of the statistics where it is a tensor."""
    if not isinstance(logit_scale, Tensor):
        return 1 / checks.positive_float("logit_scale", logit_scale)
    least = checks.scale_tensor("logit_scale", logit_scale, features)
    if least is not None and logit_scale.numel() == 1 and not (logit_scale.requires_grad and torch.is_grad_enabled()):
        return 1 / least
    return logit_scale.to(statistics_dtype(features)).reciprocal()


def bias_of(logit_bias: Any) -> Tensor | None:
    """Return what a checked bias adds to a loss: 0, with a gradient of 0, whatever its value; None if it needs none."""
    if logit_bias is None:
        return None
    checks.one_number("logit_bias", logit_bias)
    if not isinstance(logit_bias, Tensor):
        return None
    needed = logit_bias.requires_grad and torch.is_grad_enabled()
    return 0 * logit_bias.reshape(()).nan_to_num(0, 0, 0) if needed else None


def with_bias(loss: Tensor, bias: Tensor | None) -> Tensor:
    """Return the loss with what `bias_of` returns, which gives the bias a gradient of 0: a softmax does not see it."""
    return loss if bias is None else loss + bias.to(loss.device, loss.dtype)


class ClipLoss(ContrastiveLoss):
    """CLIP's symmetric loss as a module, called as open_clip's `ClipLoss`: images, texts and the exponentiated scale.

    The function `clip_loss` has the formula. Unlike most losses this one takes rows as they are, since CLIP's models
    return unit rows, unless `normalize` says otherwise.

    Args:
        temperature: 1 / scale for calls without a scale: a positive number, a tensor, or a callable of no arguments,
            evaluated at every call; the start of a learnable one, by default 0.07. None: calls must give a scale.
        normalize: divide every row by its norm first, so that scores are cosines.
        reduction: "mean", "sum" or "none" (one value per pair).
        learnable_temperature: hold the (1,) parameter `logit_scale = log(1 / temperature)`, as CLIP does. Give
            `loss.parameters()` to the optimizer, without weight decay.
        max_logit_scale: the largest `1 / temperature` that `clamp_logit_scale_()` leaves (CLIP: 100); None: no bound.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch memory; None: 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.
        record: keep what the rows of the last call were made of in `recorded`: the positives' logits, and the
            logsumexps and mean logits of the negatives.

    Example:
        >>> loss = ClipLoss()
        >>> images = F.normalize(torch.randn(32, 128, requires_grad=True), dim=-1)
        >>> texts = F.normalize(torch.randn(32, 128), dim=-1)
        >>> loss(images, texts, logit_scale=torch.tensor(100.0)).backward()
        >>> learned = ClipLoss(learnable_temperature=True, max_logit_scale=100)
        >>> learned(images, texts).backward()
    """

    needs_temperature = False

    def __init__(
        self,
        *,
        temperature: TemperatureLike | None = None,
        normalize: bool = False,
        reduction: Reduction = "mean",
        learnable_temperature: bool = False,
        max_logit_scale: float | None = None,
        backend: BackendName = "auto",
        workspace_limit: int | None = None,
        distributed: DistributedLike = False,
        record: bool = False,
    ):
        if temperature is None and learnable_temperature:
            temperature = 0.07
        super().__init__(
            temperature, learnable_temperature, max_logit_scale, reduction, normalize, backend, workspace_limit,
            distributed, record,
        )  # fmt: skip

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        *,
        image_bias: Tensor | None = None,
        text_bias: Tensor | None = None,
        positive_bias: bool = True,
    ) -> Tensor:
        """Return the loss of (N, D) images and their texts.

        logit_scale: the factor of the products, already exponentiated: CLIP's `logit_scale.exp()`. None: 1 /
            `temperature` of this module.
        logit_bias: accepted as in open_clip; it does not change the loss.
        image_bias, text_bias, positive_bias: as in `clip_loss`.
        """
        biases: dict[str, Any] = {"image_bias": image_bias, "text_bias": text_bias, "positive_bias": positive_bias}
        if logit_scale is not None:
            return clip_loss(image_features, text_features, logit_scale, logit_bias, **biases, **self.options)
        if self.logit_scale is None and self.held_temperature is None:
            raise ValueError("logit_scale is missing: pass it, or make the loss with learnable_temperature=True")
        return _clip(image_features, text_features, self.temperature, logit_bias, **biases, **self.options)

    def shown_temperature(self) -> dict[str, Any]:
        return {name: shown for name, shown in super().shown_temperature().items() if shown is not None}
