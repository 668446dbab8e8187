"""NT-Xent, SimCLR's loss, of two views or more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import BackendName, Reduction
from ..backends.contract import KeySet, Problem
from ..backends.precision import wide
from ..backends.row_losses import infonce
from ..compose.arguments import call_options, of_views, stacked, temperature_of, views
from ..compose.reduction import reduced, reduced_mean
from ..compose.rows import dots, unit
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss


def nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    *,
    more_views: Sequence[Tensor] = (),
    normalize: bool = True,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """NT-Xent, SimCLR's loss: every row of all views against the rows of all other samples, its other views positives.

        loss_i = -mean_{p in P(i)} log( exp(s_ip) / (exp(s_ip) + sum_{j in Neg(i)} exp(s_ij)) ),
        s_ij = cos(z_i, z_j) / t_i

    where z are the rows of all V views, P(i) the V - 1 other views of i's sample and Neg(i) the V (N - 1) rows of other
    samples. Of two views this is -log( exp(s_ip) / sum_{j != i} exp(s_ij) ); the scores are then symmetric, and half
    of them are computed.

    Args:
        view_a, view_b: (N, D) each, row i of one the positive of row i of the other; dtypes as in `info_nce`.
        temperature: as in `info_nce`; per row it has (V N,) values, those of `view_a` first.
        reduction: "mean" over the V N rows, "sum", or "none": (V N,), the rows of `view_a` first.
        more_views: further views, (N, D) each.
        normalize, backend, workspace_limit: as in `info_nce`.

    Returns and raises: as `info_nce`. Reference: Chen et al. 2020, arXiv:2002.05709.
    """
    options = call_options(backend, workspace_limit, reduction)
    if more_views == ():
        return reduced(of_views(view_a, view_b, temperature, normalize), options, "infonce")
    every = views(view_a, view_b, more_views)
    rows, samples = stacked(every), len(view_a)
    if samples == 1:
        checks.lonely()
    t = temperature_of(temperature, rows)
    rows, products = wide(rows)
    ids = torch.arange(samples, device=rows.device).repeat(len(every))
    same = KeySet(rows, ids)
    with products:
        neg = contrast.statistics(Problem(same, (same,), t, normalize=normalize), options).rows.neg
    with torch.autocast(rows.device.type, enabled=False):
        x = unit(rows, normalize, rows.dtype)
        losses = [infonce(neg - dots(x, x.roll(-k * samples, 0)) / t.values) for k in range(1, len(every))]
        return reduced_mean(torch.stack(losses).mean(0), reduction)


class NTXentLoss(ContrastiveLoss):
    """NT-Xent, SimCLR's loss, from two or more views of a batch; see `nt_xent`.

    Example:
        >>> loss = NTXentLoss(temperature=0.1)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    def __init__(
        self,
        temperature: TemperatureLike = 0.1,
        *,
        reduction: Reduction = "mean",
        normalize: bool = True,
        learnable_temperature: bool = False,
        max_logit_scale: float | None = None,
        backend: BackendName = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(
            temperature, learnable_temperature, max_logit_scale, reduction, normalize, backend, workspace_limit
        )

    def forward(self, view_a: Tensor, view_b: Tensor, *more_views: Tensor) -> Tensor:
        return nt_xent(
            view_a,
            view_b,
            self.temperature,
            more_views=more_views,
            **self.options,
        )
