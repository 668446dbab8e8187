"""Losses of retrievers and two-tower models as modules: they hold options and buffers, and call `functional`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, validation
from .functional.grouped import DISTILLATIONS
from .functional.guided import MARGINS
from .losses import ContrastiveLoss, WithTemperature


class ClipLoss(ContrastiveLoss):
    """CLIP's symmetric loss, called as open_clip's `ClipLoss`; see `functional.clip_loss`.

    Args:
        normalize, reduction, backend, workspace_limit: as in `functional.clip_loss`.

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
        return functional.clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            **self.options,
        )


class GroupedInfoNCELoss(WithTemperature):
    """InfoNCE over groups of a positive and its hard negatives; see `functional.grouped_info_nce`.

    Args:
        group_size: passages a query, the positive included.
        temperature, normalize, in_batch_negatives, reduction, distillation, backend, workspace_limit: as in
            `functional.grouped_info_nce`.

    Example:
        >>> loss = GroupedInfoNCELoss(group_size=8)
        >>> query, passages = torch.randn(32, 128, requires_grad=True), torch.randn(32 * 8, 128)
        >>> loss(query, passages).backward()
    """

    shown = ("group_size", "temperature", "in_batch_negatives", "reduction", "distillation")

    def __init__(
        self,
        group_size: int,
        *,
        temperature: float | Tensor = 0.02,
        normalize: bool = True,
        in_batch_negatives: bool = True,
        reduction: str = "mean",
        distillation: str | None = None,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        if distillation is not None:
            validation.one_of("distillation", distillation, DISTILLATIONS)
        self.group_size = validation.whole("group_size", group_size, 1)
        self.in_batch_negatives = in_batch_negatives
        self.distillation = distillation

    def forward(
        self,
        query: Tensor,
        passages: Tensor,
        teacher_scores: Tensor | None = None,
        *,
        target: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        return functional.grouped_info_nce(
            query,
            passages,
            self.group_size,
            temperature=self.temperature,
            in_batch_negatives=self.in_batch_negatives,
            target=target,
            offset=offset,
            teacher_scores=teacher_scores,
            distillation=self.distillation,
            **self.options,
        )


class GuidedInfoNCELoss(WithTemperature):
    """InfoNCE without the negatives that a guide takes for positives; see `functional.guided_info_nce`.

    Args:
        temperature, margin, margin_strategy, spare_negatives, contrast_queries, contrast_keys, reduction,
            negative_mode, normalize, backend, workspace_limit: as in `functional.guided_info_nce`.

    Example:
        >>> loss = GuidedInfoNCELoss(temperature=0.02, margin=0.1)  # the embeddings are their own guide
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss(query, key).backward()
    """

    shown = (
        "temperature", "negative_mode", "margin", "margin_strategy", "spare_negatives", "contrast_queries",
        "contrast_keys", "reduction",
    )  # fmt: skip

    def __init__(
        self,
        temperature: float | Tensor = 0.01,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        margin: float = 0.0,
        margin_strategy: str = "absolute",
        spare_negatives: bool = False,
        contrast_queries: bool = False,
        contrast_keys: bool = False,
        normalize: bool = True,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        validation.one_of("negative_mode", negative_mode, validation.NEGATIVE_MODES)
        validation.one_of("margin_strategy", margin_strategy, MARGINS)
        self.negative_mode = negative_mode
        self.margin = validation.finite("margin", margin)
        self.margin_strategy = margin_strategy
        self.spare_negatives = spare_negatives
        self.contrast_queries = contrast_queries
        self.contrast_keys = contrast_keys

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        guide_query: Tensor | None = None,
        guide_key: Tensor | None = None,
        guide_negatives: Tensor | None = None,
        key_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        return functional.guided_info_nce(
            query,
            positive_key,
            negative_keys,
            self.temperature,
            negative_mode=self.negative_mode,
            guide_query=guide_query,
            guide_key=guide_key,
            guide_negatives=guide_negatives,
            key_ids=key_ids,
            negative_ids=negative_ids,
            margin=self.margin,
            margin_strategy=self.margin_strategy,
            spare_negatives=self.spare_negatives,
            contrast_queries=self.contrast_queries,
            contrast_keys=self.contrast_keys,
            offset=offset,
            **self.options,
        )


class MoCoLoss(WithTemperature):
    """MoCo's loss with its queue of negatives; see `functional.moco_loss`.

    The buffers are those of MoCo and part of the state dict: `queue` (dim, queue_size) float32, a negative a column,
    random unit vectors at first, and `queue_ptr` (1,) int64, the column that is overwritten next. A column is
    contiguous in memory, so that the queue is used without a copy. The queue must have the embeddings' dtype (use
    `.to`) except under autocast. It gets no gradient, and the key is detached, as MoCo has it.

    A batch need not divide the queue, as MoCo asserts: it wraps around, and of one larger than the queue the last
    `queue_size` keys stay. With several processes each enqueues what it is given: gather the keys, and call
    `loss(query, key, enqueue=False)` and `loss.enqueue(gathered)`.

    Args:
        dim: D, the components of an embedding.
        queue_size: K.
        temperature, reduction, normalize, backend, workspace_limit: as in `functional.moco_loss`.

    Example:
        >>> loss = MoCoLoss(128, queue_size=4096)
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss(query, key).backward()
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        dim: int,
        queue_size: int = 65536,
        temperature: float | Tensor = 0.07,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        validation.whole("dim", dim, 1)
        validation.whole("queue_size", queue_size, 1)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim, dtype=torch.float32)).T)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_columns_contiguous)

    def forward(self, query: Tensor, key: Tensor, *, enqueue: bool = True) -> Tensor:
        """The loss of (N, D) queries, each against its own key and the queue.

        Then, in training mode and with `enqueue`, the keys take the place of the oldest in the queue; a backward that
        is still to come is not disturbed.
        """
        loss = functional.moco_loss(
            query,
            key,
            self.queue,
            self.temperature,
            **self.options,
        )
        if enqueue and self.training:
            self.enqueue(key)
        return loss

    @torch.no_grad()
    def enqueue(self, key: Tensor) -> None:
        """Overwrite the oldest columns of the queue with these (B, D) keys, in place and without a synchronisation.

        They become unit vectors with `normalize`; without it they are stored as they are, as the loss takes them.
        """
        validation.embeddings("key", key, 2, "(B, D)")
        dim, size = self.queue.shape
        if key.shape[1] != dim:
            raise ValueError(f"key must have {dim} components as queue has, got {key.shape[1]}")
        if key.device != self.queue.device:
            raise ValueError(f"key must be on {self.queue.device} as queue is, got {key.device}")
        count = len(key)
        kept = key[max(count - size, 0) :]
        if self.normalize:
            wide = torch.promote_types(key.dtype, torch.float32)  # the norm of 16-bit rows needs more than their range
            kept = F.normalize(kept.to(wide), dim=1)
        last = self.queue_ptr + count
        columns = (last + torch.arange(-len(kept), 0, device=key.device)) % size
        self.queue.T.index_copy_(0, columns, kept.to(self.queue.dtype))
        self.queue_ptr.copy_(last % size)

    def extra_repr(self) -> str:
        dim, size = self.queue.shape
        return f"{dim}, queue_size={size}, {super().extra_repr()}"


def _columns_contiguous(loss: nn.Module, _: Any) -> None:
    """After `load_state_dict(assign=True)`, which takes over the memory layout of what was saved."""
    if isinstance(loss, MoCoLoss) and not loss.queue.T.is_contiguous():
        loss.queue = loss.queue.T.contiguous().T
