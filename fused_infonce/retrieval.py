"""Losses of retrievers and two-tower models as modules: they hold options and buffers, and call `functional`."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional, validation
from .functional.grouped import DISTILLATIONS


class ClipLoss(nn.Module):
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
        super().__init__()
        validation.one_of("reduction", reduction, validation.REDUCTIONS)
        validation.one_of("backend", backend, validation.BACKENDS)
        self.normalize = normalize
        self.reduction = reduction
        self.backend = backend
        self.workspace_limit = validation.workspace_limit(workspace_limit)

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
            normalize=self.normalize,
            reduction=self.reduction,
            backend=self.backend,
            workspace_limit=self.workspace_limit,
        )

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, reduction={self.reduction!r}"


class GroupedInfoNCELoss(nn.Module):
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
        super().__init__()
        validation.one_of("reduction", reduction, validation.REDUCTIONS)
        validation.one_of("backend", backend, validation.BACKENDS)
        if distillation is not None:
            validation.one_of("distillation", distillation, DISTILLATIONS)
        if not isinstance(temperature, Tensor):
            validation.positive_float("temperature", temperature)
        self.group_size = validation.whole("group_size", group_size, 1)
        self.temperature = temperature
        self.normalize = normalize
        self.in_batch_negatives = in_batch_negatives
        self.reduction = reduction
        self.distillation = distillation
        self.backend = backend
        self.workspace_limit = validation.workspace_limit(workspace_limit)

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
            normalize=self.normalize,
            in_batch_negatives=self.in_batch_negatives,
            target=target,
            offset=offset,
            reduction=self.reduction,
            teacher_scores=teacher_scores,
            distillation=self.distillation,
            backend=self.backend,
            workspace_limit=self.workspace_limit,
        )

    def extra_repr(self) -> str:
        shown = ("group_size", "temperature", "in_batch_negatives", "reduction", "distillation")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
