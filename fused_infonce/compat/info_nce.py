"""`InfoNCE` and `info_nce` of info-nce-pytorch 0.1.4 without the logits.

Names, arguments, defaults, values, errors and the loss's dtype are the original's. A call that the fused loss refuses,
such as one with a temperature a column, a negative or integer temperature or mixed dtypes, is passed to the original
library, whose value or error is returned. Known differences:

- The loss is differentiable once: `create_graph=True` in the backward raises RuntimeError.
- The logits are never rounded to 16 bits, so losses of 16-bit inputs are nearer to the exact value than there.
- A row of zeros gets no gradient; the original's is 1e12 times that of a unit row.
- On a GPU the value of a temperature tensor is not read: one that is not positive gives NaN.
"""

from __future__ import annotations

from functools import partial

import info_nce as original
from torch import Tensor

from .. import functional
from ..backends import Reduction
from ..compose.arguments import NegativeMode
from .common import fused_or, loss_dtype, one_number

__all__ = ["InfoNCE", "info_nce"]


class InfoNCE(original.InfoNCE):
    """InfoNCE as a module, with the arguments of `info_nce`.

    Example:
        >>> loss = InfoNCE(temperature=0.05)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """Return the loss of (N, D) queries, their keys and explicit negatives."""
        return info_nce(query, positive_key, negative_keys, self.temperature, self.reduction, self.negative_mode)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
) -> Tensor:
    """InfoNCE of (N, D) queries and keys, normalised, with explicit negatives or the other keys as negatives.

        loss_i = -log( exp(s_ii) / (exp(s_ii) + sum_j exp(s_ij)) ),    s_ij = cos(q_i, k_j) / t

    Args:
        query, positive_key: (N, D) each, row i of one the positive of row i of the other.
        negative_keys: (M, D) if `negative_mode` is "unpaired", (N, H, D) if "paired"; None: the other keys.
        temperature: t, a number, or a tensor of one element or (N, 1).
        reduction: "mean", "sum" or "none" (one value per query).
        negative_mode: "unpaired" (negatives shared by all queries) or "paired" (each query has its own).

    Returns:
        A 0-d loss, or (N,) for "none", in the inputs' dtype; in float32 under autocast.

    Raises:
        ValueError, TypeError: where the original does; see the top of this module.
    """
    arguments = (query, positive_key, negative_keys, temperature, reduction, negative_mode)

    def fused() -> Tensor:
        if getattr(temperature, "shape", None) != (len(query), 1):  # (N,) is one per column in the original
            one_number("temperature", temperature)
        return functional.info_nce(*arguments).to(loss_dtype(query, temperature))

    return fused_or(partial(original.info_nce, *arguments), "info_nce", fused)
