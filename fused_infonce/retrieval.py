"""Losses of retrievers and two-tower models as modules: they hold options and buffers, and call `functional`."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional, validation


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
