"""FlagEmbedding's embedders without the matrix of scores: a mixin for its model classes, whose trainer stays.

    from FlagEmbedding.finetune.embedder.encoder_only.base import BiEncoderOnlyEmbedderModel
    from fused_infonce.compat.flag_embedding import FusedEmbedderMixin

    class Model(FusedEmbedderMixin, BiEncoderOnlyEmbedderModel):
        pass

and so for `BiDecoderOnlyEmbedderModel`, `BiDecoderOnlyEmbedderICLModel` and `EncoderOnlyEmbedderM3Model`. A runner
takes the class from its own module: there set `runner.BiEncoderOnlyEmbedderModel = Model` before making the runner.
The losses are those of `functional.grouped_info_nce`. This module imports nothing of FlagEmbedding.

Known differences:
- The losses with in-batch and with cross-device negatives return None in place of the (N, M) scores, which no `forward`
  but that of M3's unified fine-tuning reads. Without in-batch negatives the (N, G) scores are returned as ever.
- Logits with other groups are not rounded to 16 bits, nor is the positive subtracted from a sum that holds it: at a low
  temperature the loss is nearer to the exact one.
- A backward cannot be differentiated again, and a tensor as temperature must be positive.

The original's own code runs, and says so once, for M3's unified fine-tuning (the default: there the scores are added to
those of multi-vectors, which take far more memory) and where a subclass replaces the scores or the cross-entropy.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import checks
from ..backends.precision import accumulator, without_autocast
from ..distributed import DistributedLike, options_of
from ..functional import grouped_info_nce
from .common import fused_or, say_once

if TYPE_CHECKING:
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderModel as Embedder
else:
    Embedder = object

Score = Callable[..., Tensor]


class FusedEmbedderMixin(Embedder):
    """A base class to name ahead of FlagEmbedding's model, which keeps its arguments, `forward` and losses.

    Attributes:
        distributed: with `negatives_cross_device`, the processes whose rows make one batch, exactly, in place of
            FlagEmbedding's gathering; see docs/distributed.md. It is assigned, `model.distributed = True`. Nothing is
            then passed to the original: what the fused loss refuses is an error.
    """

    distributed: DistributedLike = False

    def compute_local_score(
        self, q_reps: Tensor, p_reps: Tensor, compute_score_func: Score | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the (N, G) scores of (N, D) queries with their own passages among (N G, D) passages."""
        if _unlike_dot_products(self, q_reps, p_reps, compute_score_func, kwargs):
            return super().compute_local_score(q_reps, p_reps, compute_score_func, **kwargs)
        own = p_reps.unflatten(0, (len(q_reps), -1))  # (N, G, D), a view
        return torch.bmm(own, q_reps[:, :, None])[..., 0] / self.temperature

    def _compute_in_batch_neg_loss(
        self, q_reps: Tensor, p_reps: Tensor, teacher_targets: Tensor | None = None,
        compute_score_func: Score | None = None, **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        original = super()._compute_in_batch_neg_loss
        return self._loss(original, lambda x: x, q_reps, p_reps, teacher_targets, compute_score_func, kwargs)

    def _compute_cross_device_neg_loss(
        self, q_reps: Tensor, p_reps: Tensor, teacher_targets: Tensor | None = None,
        compute_score_func: Score | None = None, **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        original, gather = super()._compute_cross_device_neg_loss, self._dist_gather_tensor
        arguments = (q_reps, p_reps, teacher_targets, compute_score_func, kwargs)
        if options_of(self.distributed) is None:
            return self._loss(original, gather, *arguments)
        fused = partial(self._loss_of_all, *arguments)
        return None, fused_or(fused, type(self).__name__, fused, distributed=self.distributed)

    def _loss_of_all(
        self, q_reps: Tensor, p_reps: Tensor, teacher_targets: Tensor | None, compute_score_func: Score | None,
        kwargs: dict[str, Any], distributed: DistributedLike,
    ) -> Tensor:  # fmt: skip
        """Return the loss of the rows of all processes, of which these are this one's."""
        if why := _obstacle(self, q_reps, p_reps, teacher_targets, compute_score_func, kwargs):
            raise ValueError(f"{type(self).__name__} cannot be distributed: {why}")
        dtype = _loss_dtype(q_reps, teacher_targets)
        options = self._options(q_reps, p_reps) | {"distributed": distributed}
        if teacher_targets is not None:  # probabilities, one a passage
            scores = teacher_targets.to(torch.promote_types(accumulator(q_reps.dtype), dtype)).log()
            options |= {"teacher_scores": scores, "distillation": self.kd_loss_type}
        return grouped_info_nce(q_reps, p_reps, **options).to(dtype)

    def _options(self, q_reps: Tensor, p_reps: Tensor) -> dict[str, Any]:
        return {"group_size": len(p_reps) // len(q_reps), "temperature": self.temperature, "normalize": False}

    def _loss(
        self, original: Callable[..., Any], gather: Callable[[Tensor], Tensor], q_reps: Tensor, p_reps: Tensor,
        teacher_targets: Tensor | None, compute_score_func: Score | None, kwargs: dict[str, Any],
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """Return the scores, None where they were not made, and the loss over what `gather` makes of the rows."""
        arguments = (q_reps, p_reps, teacher_targets, compute_score_func)
        if why := _obstacle(self, *arguments, kwargs):
            say_once(type(self).__name__, why)
            return original(*arguments, **kwargs)
        return None, self._fused_loss(*arguments, gather)

    def _fused_loss(
        self, q_reps: Tensor, p_reps: Tensor, teacher_targets: Tensor | None, compute_score_func: Score | None,
        gather: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """Return the loss of the queries and passages of all processes, equal in every process."""
        device, acc = q_reps.device.type, accumulator(q_reps.dtype)
        dtype, options = _loss_dtype(q_reps, teacher_targets), self._options(q_reps, p_reps)
        queries, passages = gather(q_reps), gather(p_reps)
        if teacher_targets is None:
            return grouped_info_nce(queries, passages, **options).to(dtype)
        if self.kd_loss_type == "m3_kd_loss":
            weight = gather(teacher_targets).to(torch.promote_types(acc, dtype))  # (N, G), probabilities
            options |= {"teacher_scores": weight.log(), "distillation": "m3_kd_loss", "reduction": "none"}
            return (grouped_info_nce(queries, passages, **options) * weight.sum(1)).mean().to(dtype)
        loss = grouped_info_nce(queries, passages, **options)
        with without_autocast(device):
            scores = self.compute_local_score(q_reps.to(acc), p_reps.to(acc), compute_score_func)
            return (loss + self.distill_loss("kl_div", teacher_targets, scores, options["group_size"])).to(dtype)


def _loss_dtype(q_reps: Tensor, teacher_targets: Tensor | None) -> torch.dtype:
    """Return the dtype of the original's cross-entropy."""
    autocast = torch.is_autocast_enabled(q_reps.device.type)
    dtype = accumulator(q_reps.dtype) if autocast else q_reps.dtype
    return dtype if teacher_targets is None else torch.promote_types(dtype, teacher_targets.dtype)


def _obstacle(
    model: Any, q_reps: Any, p_reps: Any, teacher_targets: Any, compute_score_func: Score | None, kwargs: dict[str, Any]
) -> str:
    """Return the reason why the original's own code must run; "" if it need not."""
    if getattr(model, "unified_finetuning", False):
        return "unified_finetuning adds the dense scores to the sparse and the multi-vector ones"
    if why := _unlike_dot_products(model, q_reps, p_reps, compute_score_func, kwargs):
        return why
    entropy: Any = getattr(model, "cross_entropy", None)
    plain = type(entropy) is nn.CrossEntropyLoss and entropy.weight is None and entropy.ignore_index < 0
    if not (plain and entropy.reduction == "mean" and not entropy.label_smoothing and _original(model.compute_loss)):
        return "its compute_loss is not the mean cross-entropy"
    if teacher_targets is None:
        return ""
    if not isinstance(teacher_targets, Tensor) or not teacher_targets.is_floating_point():
        return "teacher_targets are not a floating tensor"
    if model.kd_loss_type == "kl_div":
        return ""
    if model.kd_loss_type != "m3_kd_loss":
        return f"kd_loss_type={model.kd_loss_type!r} is unknown"
    if not _original(model.distill_loss):
        return "its distill_loss is not FlagEmbedding's"
    groups = (len(q_reps), len(p_reps) // len(q_reps))
    if teacher_targets.shape != groups or teacher_targets.requires_grad:
        return "teacher_targets are not constant probabilities, one a passage"
    return ""


def _unlike_dot_products(
    model: Any, q_reps: Any, p_reps: Any, compute_score_func: Score | None, kwargs: dict[str, Any]
) -> str:
    """Return the reason why scores are not dot products with groups of passages over a temperature; "" if they are."""
    dense = model.compute_dense_score if hasattr(model, "compute_dense_score") else model.compute_score
    score = model.compute_score if compute_score_func is None else compute_score_func
    if kwargs or score != dense or not all(map(_original, (dense, model._compute_similarity, model.get_local_score))):
        return "the scores are not FlagEmbedding's own"
    if not (isinstance(q_reps, Tensor) and isinstance(p_reps, Tensor) and q_reps.dim() == p_reps.dim() == 2):
        return "the representations are not (rows, components)"
    kinds = [(x.dtype, x.device, x.shape[1]) for x in (q_reps, p_reps)]
    if kinds[0] != kinds[1] or q_reps.dtype not in checks.FLOATS:
        return "queries and passages differ in dtype, device or components"
    if not len(q_reps) or not len(p_reps) or len(p_reps) % len(q_reps):
        return "the passages are not as many for every query"
    t = model.temperature
    if isinstance(t, Tensor):
        usable = t.dim() == 0 and t.dtype in checks.FLOATS and t.device in (q_reps.device, torch.device("cpu"))
    else:
        usable = isinstance(t, numbers.Real) and not isinstance(t, bool)
        usable = usable and checks.SMALLEST < t < 1 / checks.SMALLEST
    return "" if usable else f"the temperature {t!r} is not a positive number"


def _original(method: Any) -> bool:
    return getattr(method, "__module__", "").partition(".")[0] == "FlagEmbedding"
