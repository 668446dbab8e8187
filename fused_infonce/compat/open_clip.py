"""`ClipLoss` of open_clip 3.3.0, and of its main branch (4.2.0.dev0), without the logits.

It is a subclass: `get_logits` and `get_ground_truth` are the original's, for whoever asks for logits, and features are
gathered by open_clip's `gather_features`. A call that the fused loss refuses, such as one with a scale that is not
positive or a bias per text, is passed to open_clip, whose value or error is returned. Known differences:

- The loss is differentiable once: `create_graph=True` in the backward raises RuntimeError.
- The logits are never rounded to 16 bits, so losses of 16-bit features are nearer to the exact value than there.
- A bias cancels in the softmax: its gradient is exactly 0, the original's is what its rounding leaves.
- A scale of shape (1,) in another dtype than the features' is accepted outside autocast too.
- On a GPU the value of a scale tensor is not read: one that is not positive gives NaN.

How open_clip's own training script is given this class depends on the version: see docs/coming-from.md.
"""

from __future__ import annotations

import inspect
from functools import partial

from open_clip import loss as original
from torch import Tensor

from ..functional import clip_loss, info_nce
from ..losses.clip import bias_of, temperature_of_scale, with_bias
from .common import fused_or, loss_dtype, one_number

# open_clip 3.3.0 has this option; the main branch has neither it nor the last argument of `gather_features`.
HOROVOD = "use_horovod" in inspect.signature(original.gather_features).parameters

__all__ = ["ClipLoss"]


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

        def fused() -> Tensor | dict[str, Tensor]:
            loss = self._fused(*arguments).to(loss_dtype(image_features))
            return {"contrastive_loss": loss} if output_dict else loss

        return fused_or(partial(super().forward, *arguments, output_dict), "ClipLoss", fused)

    def _fused(
        self, image: Tensor, text: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor | None
    ) -> Tensor:
        one_number("logit_scale", logit_scale)
        if self.world_size == 1:
            return clip_loss(image, text, logit_scale, logit_bias)
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
