"""NT-Xent, SimCLR's loss, of two views or more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import contrast
from ..backends import BackendName, Reduction
from ..backends.contract import KeySet, Problem
from ..backends.precision import without_autocast
from ..backends.recording import record_positives
from ..backends.row_losses import infonce
from ..compose.across import blocked, unique
from ..compose.arguments import call_options, of_views, stacked, temperature_of, views
from ..compose.reduction import reduced, reduced_mean
from ..compose.repeated import repeated
from ..compose.rows import dots, unit
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss


@repeated
@together
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
    distributed: DistributedLike = False,
) -> Tensor:
    """NT-Xent, SimCLR's loss: rows of all views, whose positives are other views of a sample, against other samples.

        loss_i = -mean_{p in P(i)} log( exp(s_ip) / (exp(s_ip) + sum_{j in Neg(i)} exp(s_ij)) ),
        s_ij = cos(z_i, z_j) / t_i

    where z are the rows of all V views, P(i) the V - 1 other views of i's sample and Neg(i) the V (N - 1) rows of other
    samples. Of two views this is -log( exp(s_ip) / sum_{j != i} exp(s_ij) ); the scores are then symmetric, and half
    of them are computed.

    Args:
        view_a, view_b: (N, D) each, row i of one the positive of row i of the other; float16, bfloat16, float32 or
            float64.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (V N,) per row, those of `view_a`
            first; gradients flow to tensors.
        reduction: "mean" over the V N rows, "sum", or "none": (V N,), the rows of `view_a` first.
        more_views: further views, (N, D) each.
        normalize: divide every row by max(norm, 1e-12) first, so that scores are cosines.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (V N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    Reference: Chen et al. 2020, arXiv:2002.05709.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    if more_views == ():
        return reduced(of_views(view_a, view_b, temperature, normalize), options, "infonce")
    every = views(view_a, view_b, more_views)
    if options.call is not None:
        options.call.noted += f" {len(every)} views;"
    rows, samples = stacked(every), len(view_a)
    t = temperature_of(temperature, rows)
    ids = unique(torch.arange(samples, device=rows.device).repeat(len(every)), options)
    same = KeySet(rows, ids)
    problem, products = blocked(Problem(same, (same,), t, normalize=normalize), options)
    with products:
        neg = contrast.statistics(problem, options).rows.neg
    with without_autocast(rows.device.type):
        x = unit(problem.query.rows, normalize, t.dtype)
        logits = [dots(x, x.roll(-k * samples, 0)) / t.values for k in range(1, len(every))]
        record_positives(logits[0])
        return reduced_mean(torch.stack([infonce(neg - pos) for pos in logits]).mean(0), options)


class NTXentLoss(ContrastiveLoss):
    """NT-Xent, SimCLR's loss, as a module: of two or more views of a batch.

    The function `nt_xent` has the formula.

    Args:
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per row of all views).
        normalize: divide every row by its norm first, so that scores are cosines.
        learnable_temperature: hold the (1,) parameter `logit_scale = log(1 / temperature)`, as CLIP does. Give
            `loss.parameters()` to the optimizer, without weight decay.
        max_logit_scale: the largest `1 / temperature` that `clamp_logit_scale_()` leaves (CLIP: 100); None: no bound.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch memory; None: 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.
        record: keep what the rows of the last call were made of in `recorded`: the positives' logits, and the
            logsumexps and mean logits of the negatives.

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
        distributed: DistributedLike = False,
        record: bool = False,
    ):
        super().__init__(
            temperature, learnable_temperature, max_logit_scale, reduction, normalize, backend, workspace_limit,
            distributed, record,
        )  # fmt: skip

    def forward(self, view_a: Tensor, view_b: Tensor, *more_views: Tensor) -> Tensor:
        """Return the loss of two or more views of a batch, (N, D) each."""
        more: dict[str, Any] = {"more_views": more_views} if more_views else {}
        return nt_xent(view_a, view_b, self.temperature, **more, **self.options)
