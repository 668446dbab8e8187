"""`SupConLoss` of SupContrast's losses.py without the matrix of pairs.

https://github.com/HobbitLong/SupContrast is no package, so that nothing is imported and nothing falls back on it.
Names, arguments, defaults, values, errors and the loss's dtype are the original's. Known differences:

- An anchor without positives counts with 0, as it does there since the division by zero was mended; before it was NaN.
- One row in all, which has nothing to compare with, has the loss 0; there it is NaN.
- A mask that is not (N, N) raises ValueError, and labels that are no tensor TypeError; there torch does, RuntimeError
  and AttributeError.
- A temperature or base temperature that is not positive, a mask with negative values or that requires a gradient, and
  features that are not floating raise ValueError or TypeError; there they are computed with. On a GPU such values of
  tensors give NaN.
- A row of the mask with weights of less than 1e-6 together is divided by their sum; there by 1.
- The loss is differentiable once: `create_graph=True` in the backward raises RuntimeError.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..losses.sup_con import ContrastMode, sup_con

__all__ = ["SupConLoss"]


class SupConLoss(nn.Module):
    """Supervised contrastive loss, or without labels and mask SimCLR's, of features that the caller has normalised.

        loss_i = -(t / t_base) mean_{p in P(i)} log( exp(s_ip) / sum_{a != i} exp(s_ia) ),    s_ij = (x_i . x_j) / t

    Args:
        temperature: t, a positive number or a one-element tensor.
        contrast_mode: "all" (every view is an anchor) or "one" (the first view is).
        base_temperature: t_base, a positive number.

    Example:
        >>> features = F.normalize(torch.randn(32, 2, 128, requires_grad=True), dim=-1)
        >>> SupConLoss()(features, torch.arange(32) % 10).backward()
    """

    def __init__(
        self, temperature: float | Tensor = 0.07, contrast_mode: ContrastMode = "all", base_temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the 0-d loss, float64 for float64 features, else float32.

        Args:
            features: (N, V, ...), V views of N samples.
            labels: a tensor of N labels of any dtype and device; samples with one label are positives. Not with a mask.
            mask: (N, N) weights of sample j as a positive of sample i, on any device. Without both, the views of a
                sample are its positives.

        Raises:
            ValueError, TypeError: see `fused_infonce.sup_con` and the top of this module.
        """
        if isinstance(features, Tensor):
            labels = _classes(labels, features.device) if isinstance(labels, Tensor) else labels
            mask = mask.to(features.device) if isinstance(mask, Tensor) else mask
        base = checks.positive_float("base_temperature", self.base_temperature)
        loss = sup_con(features, labels, mask, self.temperature, self.contrast_mode, None, normalize=False)
        return loss * (self.temperature / base)  # a gradient flows through the factor, as in the original


def _classes(labels: Tensor, device: torch.device) -> Tensor:
    """Return integers that are equal where the labels are equal."""
    labels = labels.flatten().to(device)
    if labels.dtype in checks.INTEGERS:
        return labels
    if not labels.is_floating_point():
        return labels.long()
    return torch.searchsorted(torch.sort(labels).values, labels)  # torch.unique would synchronise
