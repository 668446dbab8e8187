"""`ClipLoss` and `SigLipLoss` of open_clip 3.3.0, and of its main branch (4.2.0.dev0), without the logits.

They are subclasses: `get_logits` and `get_ground_truth` are the original's, for whoever asks for logits. `ClipLoss`
gathers features by open_clip's `gather_features`. A call that the fused loss refuses, such as one with a scale that is
not positive or a bias per text, is passed to open_clip, whose value or error is returned. Known differences:

- The loss is differentiable once: `create_graph=True` in the backward raises RuntimeError.
- The logits are never rounded to 16 bits, so losses of 16-bit features are nearer to the exact value than there.
- A bias cancels in `ClipLoss`'s softmax: its gradient is exactly 0, the original's is what its rounding leaves.
- `SigLipLoss` goes over the texts of all processes at once, and holds them, (W N, D), in place of W matrices of logits.
- A scale of shape (1,) in another dtype than the features' is accepted outside autocast too.
- On a GPU the value of a scale tensor is not read: one that is not positive gives NaN.

How open_clip's own training script is given this class depends on the version: see docs/coming-from.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip import loss as original
from torch import Tensor, distributed

from .. import checks
from ..distributed import DistributedLike
from ..functional import clip_loss, info_nce, siglip_loss
from ..losses.clip import bias_of, check_features, temperature_of_scale, with_bias
from .common import fused_or, loss_dtype, one_number

# open_clip 3.3.0 has this option; the main branch has neither it nor the last argument of `gather_features`.
HOROVOD = "use_horovod" in inspect.signature(original.gather_features).parameters

__all__ = ["ClipLoss", "SigLipLoss"]


class ClipLoss(original.ClipLoss):
    """CLIP's loss, the mean of images against texts and of texts against images, over one process or several.

        loss_i = -1/2 log( exp(s_ii) / sum_j exp(s_ij) ) - 1/2 log( exp(s_ii) / sum_j exp(s_ji) )
        s_ij = logit_scale (image_i . text_j) + logit_bias

    Args:
        local_loss: with several processes, the rows of this process against those of all, 2 (N, W N) problems of the
            target `rank N + i`; else the loss of all rows, in every process.
        gather_with_grad: gradients also reach the features of other processes.
        cache_labels: keep the targets of a batch size, for calls of `get_ground_truth`.
        rank, world_size: this process's number, and how many there are.
        use_horovod: gather by Horovod; only where open_clip has this option, as 3.3.0 does.

    Example:
        >>> image, text = (F.normalize(torch.randn(32, 128, requires_grad=True), dim=-1) for _ in range(2))
        >>> ClipLoss()(image, text, logit_scale=torch.tensor(14.3)).backward()
    """

    distributed: DistributedLike = False
    """The processes whose rows make one batch, exactly, in place of the original's gathering; see docs/distributed.md.

    It is assigned, `loss.distributed = True`, since the constructor is the original's. Nothing is then passed to the
    original: what the fused loss refuses is an error.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the 0-d loss of (N, D) features, or with `output_dict` `{"contrastive_loss": loss}`.

        It has the features' dtype, float32 under autocast. The features are taken as they are: unit rows, as CLIP's
        models return them. `logit_scale` is already exponentiated.
        """
        arguments = (image_features, text_features, logit_scale, logit_bias)

        def fused(distributed: DistributedLike = False) -> Tensor | dict[str, Tensor]:
            loss = self._fused(*arguments, distributed).to(loss_dtype(image_features))
            return {"contrastive_loss": loss} if output_dict else loss

        return fused_or(
            partial(super().forward, *arguments, output_dict), "ClipLoss", fused, distributed=self.distributed
        )

    def _fused(
        self, image: Tensor, text: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor | None,
        distributed: DistributedLike,
    ) -> Tensor:  # fmt: skip
        one_number("logit_scale", logit_scale)
        if self.world_size == 1 or distributed:
            return clip_loss(image, text, logit_scale, logit_bias, distributed=distributed)
        t, bias = temperature_of_scale(logit_scale, image), bias_of(logit_bias)
        all_image, all_text = original.gather_features(
            image, text, self.local_loss, self.gather_with_grad, self.rank, self.world_size,
            *([self.use_horovod] if HOROVOD else []),
        )  # fmt: skip
        if not self.local_loss:
            return clip_loss(all_image, all_text, logit_scale, logit_bias)
        target = self.get_ground_truth(image.device, len(image))
        per_image = info_nce(image, all_text, temperature=t, target=target, normalize=False)
        per_text = info_nce(text, all_image, temperature=t, target=target, normalize=False)
        loss = (per_image + per_text) / 2
        return with_bias(loss, bias)


def _both_ways(texts: Tensor, rank: int, world: int) -> list[Tensor]:
    """Send texts to both neighbours, and on from there until the two halves of the ring meet."""
    left, right = (rank - 1) % world, (rank + 1) % world
    found: list[Tensor] = []
    leftwards = rightwards = texts
    for _ in range((world - 1) // 2):
        leftwards, rightwards = original.neighbour_exchange_bidir_with_grad(left, right, leftwards, rightwards)
        found += [leftwards, rightwards]
    if world % 2 == 0:  # the process opposite
        found.append(original.neighbour_exchange_with_grad(left, right, rightwards))
    return found


def _around(texts: Tensor, rank: int, world: int) -> list[Tensor]:
    """Send texts to the right neighbour, and on until they have been everywhere."""
    found = [texts]
    for _ in range(world - 1):
        passed = original.neighbour_exchange_with_grad((rank - 1) % world, (rank + 1) % world, found[-1])
        found.append(passed)
    return found[1:]


class _FromAll(torch.autograd.Function):
    """The texts of all processes, each of which gets back the sum of the gradients that the processes have for its own.

    gather: whether they are gathered; else the sum of what every process has in a place of its own, beside zeros.
    """

    @staticmethod
    def forward(ctx: Any, texts: Tensor, rank: int, world: int, gather: bool) -> tuple[Tensor, ...]:
        ctx.rank = rank
        every = texts.new_zeros((world, *texts.shape))
        if gather:
            distributed.all_gather(list(every), texts.contiguous())
        else:
            every[rank] = texts
            distributed.all_reduce(every)
        return every.unbind()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        sums = [x.clone(memory_format=torch.contiguous_format) for x in upstream]
        for owner, total in enumerate(sums):
            distributed.reduce(total, owner)
        return sums[ctx.rank], None, None, None


def _from_all(gather: bool, texts: Tensor, rank: int, world: int) -> list[Tensor]:
    return [x for i, x in enumerate(_FromAll.apply(texts, rank, world, gather)) if i != rank]


# By `dist_impl`: from the own texts, the rank and the number of processes to the texts of the others.
EXCHANGES: dict[str, Callable[[Tensor, int, int], list[Tensor]]] = {
    "bidir": _both_ways, "shift": _around, "reduce": partial(_from_all, False), "gather": partial(_from_all, True),
}  # fmt: skip


class SigLipLoss(original.SigLipLoss):
    """SigLIP's loss, a sigmoid for each pair of an image of this process and a text of any.

        loss = -1/N sum_ij log sigmoid(y_ij (logit_scale image_i . text_j + logit_bias))

    y is 1 for image i and its own text and -1 for all other texts, which with several processes come from these too.

    Args:
        cache_labels: as in the original, without effect.
        rank, world_size: this process's number, and how many there are.
        dist_impl: how texts go from process to process: "bidir" (to both neighbours, the default), "shift" (to one),
            "reduce" or "gather". Gradients go back the same way.

    Example:
        >>> image, text = (F.normalize(torch.randn(32, 128, requires_grad=True), dim=-1) for _ in range(2))
        >>> SigLipLoss()(image, text, logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(-10.0)).backward()
    """

    distributed: DistributedLike = False
    """The processes whose rows make one batch, exactly, in place of the original's gathering; see docs/distributed.md.

    It is assigned, `loss.distributed = True`, since the constructor is the original's. Nothing is then passed to the
    original: what the fused loss refuses is an error.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the 0-d loss of (N, D) features, or with `output_dict` `{"contrastive_loss": loss}`.

        It has the dtype of the original's logits and labels. The features are taken as they are: unit rows, as SigLIP's
        models return them. `logit_scale` is already exponentiated.
        """
        arguments = (image_features, text_features, logit_scale, logit_bias)

        def fused(distributed: DistributedLike = False) -> Tensor | dict[str, Tensor]:
            loss = self._fused(*arguments, distributed).to(_dtype(image_features, logit_scale))
            return {"contrastive_loss": loss} if output_dict else loss

        return fused_or(
            partial(super().forward, *arguments, output_dict), "SigLipLoss", fused, distributed=self.distributed
        )

    def _fused(
        self, image: Tensor, text: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor | None,
        distributed: DistributedLike,
    ) -> Tensor:  # fmt: skip
        one_number("logit_scale", logit_scale)
        others = None
        if self.world_size > 1 and not distributed:  # what is refused is refused before anything is sent
            check_features(image, text)
            temperature_of_scale(logit_scale, image)
            checks.one_number("logit_bias", 0.0 if logit_bias is None else logit_bias)
            others = torch.cat(EXCHANGES[self.dist_impl](text, self.rank, self.world_size))
        return siglip_loss(image, text, logit_scale, logit_bias, others, distributed=distributed)


def _dtype(features: Tensor, scale: object) -> torch.dtype:
    """Return the dtype of the original's loss: of labels in the features' dtype times logits."""
    kind, logits = features.device.type, features.dtype
    if torch.is_autocast_enabled(kind) and logits != torch.float64:
        logits = torch.float32 if kind == "cuda" else torch.get_autocast_dtype(kind)  # where autocast sums in float32
    elif isinstance(scale, Tensor) and scale.dim() > 0:
        logits = torch.promote_types(logits, scale.dtype)
    return torch.promote_types(features.dtype, logits)
