"""SigLIP's loss: every pair of an image and a text by itself, as a pair that belongs together or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..backends import BackendName, Reduction
from ..backends.contract import KeySet, Problem
from ..backends.precision import statistics_dtype
from ..compose.arguments import call_options
from ..compose.reduction import reduced_sigmoids
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss
from .clip import check_features, temperature_of_scale

BIAS = -10.0  # from which SigLIP's learnable bias starts: nearly all pairs are negative
START = 0.1  # and its temperature


@together
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    negative_text_features: Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """SigLIP's loss of images and texts, a sigmoid for each of their N x N pairs, without the matrix of pairs.

        loss_i = -log sigmoid(s_ii + bias) - sum_j log sigmoid(-(s_ij + bias))
        s_ij = scale (image_i . text_j)

    where j goes over the texts of the other images. The mean of the rows is the value of open_clip's `SigLipLoss()`.
    One pass over the pairs makes the loss and all gradients, but for `reduction="none"` and weights with a gradient,
    whose backward makes the scores again; the positives never enter it, so that nothing cancels.

    Args:
        image_features, text_features: (N, D) each, row i of one the pair of row i of the other; float16, bfloat16,
            float32 or float64. Unit rows, as SigLIP's models return them, unless `normalize`.
        logit_scale: the factor of the products, 1 / temperature, already exponentiated: a positive number, a
            one-element tensor (on the CPU too), or (N,) or (N, 1) per image; gradients flow to tensors. Values of
            tensors are checked on a CPU; on a GPU a bad one gives NaN.
        logit_bias: a number or a one-element tensor (on the CPU too), added to every logit; gradients flow to tensors.
            None: 0. SigLIP learns it from -10 on.
        negative_text_features: (M, D), further texts, none of which belongs to any image.
        image_ids, text_ids, negative_ids: (N,), (N,) and (M,) integers. A pair of an image and a text of equal ids is
            left out, unless they are row i of both. Without `image_ids` an image has the id of its text.
        weight: (N,), none negative: the factor of loss_i, which is of all pairs of image i. Gradients flow to it.
        normalize: divide every row by max(norm, 1e-12) first.
        reduction: "mean" over the N images (the sum over that of the weights), "sum", or "none": (N,), one value per
            image.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: Zhai et al. 2023, arXiv:2303.15343; https://github.com/mlfoundations/open_clip.
    """
    check_features(image_features, text_features, negative_text_features)
    return _siglip(
        image_features, text_features, temperature_of_scale(logit_scale, image_features), logit_bias,
        negative_text_features, (image_ids, text_ids, negative_ids), weight, normalize=normalize, reduction=reduction,
        backend=backend, workspace_limit=workspace_limit, distributed=distributed,
    )  # fmt: skip


@together
def _siglip(
    image: Tensor, text: Tensor, temperature: float | Tensor, bias: Any, negatives: Tensor | None,
    ids: tuple[Any, Any, Any], weight: Any, *, normalize: bool, reduction: Reduction, backend: BackendName,
    workspace_limit: int | None, distributed: DistributedLike,
) -> Tensor:  # fmt: skip
    """Return the loss of features at a temperature; ids: of images, texts and further texts."""
    check_features(image, text, negatives)
    checks.flags(normalize=normalize)
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature, bias = gather.shared(options.call, temperature), gather.alike(options.call, bias)
    dtype = statistics_dtype(image)
    image_ids, text_ids, negative_ids = _checked_ids(*ids, image, negatives)
    keys = [KeySet(text, text_ids)] + ([] if negatives is None else [KeySet(negatives, negative_ids)])
    t = checks.temperature(temperature, image, dtype)
    problem = Problem(KeySet(image, image_ids), tuple(keys), t, normalize=normalize)
    shift = checks.logit_bias("logit_bias", 0.0 if bias is None else bias, image, dtype)
    return reduced_sigmoids(problem, shift, options, checks.row_weight(weight, image, dtype))


def _checked_ids(
    image_ids: Any, text_ids: Any, negative_ids: Any, image: Tensor, negatives: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the ids of images, texts and further texts: without those of images, these are the texts'."""
    if negative_ids is not None and negatives is None:
        raise ValueError("negative_ids are the ids of negative_text_features, which were not given")
    if image_ids is not None and text_ids is None and negative_ids is None:
        raise ValueError("image_ids alone compare with nothing: pass text_ids or negative_ids too")
    if negative_ids is not None and image_ids is None and text_ids is None:
        raise ValueError("negative_ids alone compare with nothing: pass image_ids or text_ids too")
    n, device = len(image), image.device
    of_images, of_texts = (
        None if ids is None else checks.ids(name, ids, (n,), device, "image_features")
        for name, ids in (("image_ids", image_ids), ("text_ids", text_ids))
    )
    of_negatives = None
    if negative_ids is not None and negatives is not None:
        of_negatives = checks.ids("negative_ids", negative_ids, (len(negatives),), device, "image_features")
    return of_texts if of_images is None else of_images, of_texts, of_negatives


class SigLipLoss(ContrastiveLoss):
    """SigLIP's loss as a module, called as open_clip's `SigLipLoss`: images, texts, the exponentiated scale, the bias.

    The function `siglip_loss` has the formula. Unlike most losses this one takes rows as they are, since SigLIP's
    models return unit rows, unless `normalize` says otherwise.

    Args:
        temperature: 1 / scale for calls without a scale: a positive number, a tensor, or a callable of no arguments,
            evaluated at every call; the start of a learnable one, by default 0.1. None: calls must give a scale.
        bias: added to every logit in calls without a bias: a number; the start of a learnable one. None: 0, or -10
            where it is learnable.
        normalize: divide every row by its norm first, so that scores are cosines.
        reduction: "mean" over the images, "sum" or "none" (one value per image).
        learnable_temperature: hold the (1,) parameter `logit_scale = log(1 / temperature)`, as SigLIP does. Give
            `loss.parameters()` to the optimizer, without weight decay.
        learnable_bias: hold the (1,) parameter `logit_bias`, as SigLIP does.
        max_logit_scale: the largest `1 / temperature` that `clamp_logit_scale_()` leaves; None: no bound.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch memory; None: 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Example:
        >>> loss = SigLipLoss()
        >>> images = F.normalize(torch.randn(32, 128, requires_grad=True), dim=-1)
        >>> texts = F.normalize(torch.randn(32, 128), dim=-1)
        >>> loss(images, texts, logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(-10.0)).backward()
        >>> learned = SigLipLoss(learnable_temperature=True, learnable_bias=True)
        >>> learned(images, texts).backward()
    """

    needs_temperature = False
    logit_bias: nn.Parameter | None

    no_softmax = "SigLIP's loss, a sigmoid of every pair"

    def __init__(
        self,
        *,
        temperature: TemperatureLike | None = None,
        bias: float | None = None,
        normalize: bool = False,
        reduction: Reduction = "mean",
        learnable_temperature: bool = False,
        learnable_bias: bool = False,
        max_logit_scale: float | None = None,
        backend: BackendName = "auto",
        workspace_limit: int | None = None,
        distributed: DistributedLike = False,
    ):
        if temperature is None and learnable_temperature:
            temperature = START
        super().__init__(
            temperature, learnable_temperature, max_logit_scale, reduction, normalize, backend, workspace_limit,
            distributed,
        )  # fmt: skip
        checks.flags(learnable_bias=learnable_bias)
        self.bias = None if bias is None else checks.finite("bias", bias)
        self.learnable_bias = learnable_bias
        self.logit_bias = nn.Parameter(torch.zeros(1, dtype=torch.float32)) if learnable_bias else None
        self._start_bias()

    def _start_bias(self) -> None:
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, BIAS if self.bias is None else self.bias)

    def reset_parameters(self) -> None:
        """Start `logit_scale` and `logit_bias` again, as after `to_empty` from the meta device."""
        super().reset_parameters()
        self._start_bias()

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        negative_text_features: Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of (N, D) images and their texts.

        logit_scale: the factor of the products, already exponentiated: SigLIP's `logit_scale.exp()`. None: 1 /
            `temperature` of this module.
        logit_bias: a number or a one-element tensor. None: that of this module.
        negative_text_features, image_ids, text_ids, negative_ids, weight: as `siglip_loss` takes them.
        """
        if logit_scale is None and self.logit_scale is None and self.held_temperature is None:
            raise ValueError("logit_scale is missing: pass it, or make the loss with learnable_temperature=True")
        check_features(image_features, text_features, negative_text_features)
        temperature = self.temperature if logit_scale is None else temperature_of_scale(logit_scale, image_features)
        if logit_bias is None:
            logit_bias = self.bias if self.logit_bias is None else self.logit_bias
        return _siglip(
            image_features, text_features, temperature, logit_bias, negative_text_features,
            (image_ids, text_ids, negative_ids), weight, **self.options,
        )  # fmt: skip

    def shown_temperature(self) -> dict[str, Any]:
        return {name: shown for name, shown in super().shown_temperature().items() if shown is not None}
