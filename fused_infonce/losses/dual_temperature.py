"""InfoNCE with dual temperature: one for the negatives of a row among themselves, one for the rows among themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import BackendName, Reduction
from ..backends.recording import unrecorded
from ..backends.row_losses import balanced
from ..compose.across import blocked
from ..compose.arguments import NegativeMode, call_options, of_keys, temperature_of
from ..compose.reduction import reduced_rows
from ..compose.rows import at_temperature
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss


@together
def dual_temperature_info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
    *,
    inter_temperature: float | Tensor = 1.0,
    symmetric: bool = False,
    normalize: bool = True,
    in_batch_negatives: bool | None = None,
    ignore_index: int = -100,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    weight: Tensor | None = None,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """InfoNCE with dual temperature: hard negatives are weighed at one temperature, hard rows at another.

        loss_i = -W_i log P_i(t),    W_i = (1 - P_i(t')) / (1 - P_i(t))
        P_i(t) = exp(c_iy / t) / (exp(c_iy / t) + sum_j exp(c_ij / t)),    c_ij = cos(q_i, k_j)

    over the negatives j of row i, at t = temperature_i and t' = inter_temperature_i. W_i has no gradient. The gradient
    of InfoNCE has a factor 1 - P_i(t) for a row, so that a low temperature, which finds the hard negatives, leaves rows
    that are told apart without a gradient. Here the factor is 1 - P_i(t'), and with t' = t this is `info_nce`. A row
    without negatives has loss 0 and no gradient.

    Args:
        temperature: t, that of the negatives within a row, a positive number, a one-element tensor (on the CPU too), or
            (N,) or (N, 1) per row; gradients flow to tensors.
        inter_temperature: t', that of the rows among one another, shaped as `temperature`; it gets no gradient. The
            paper has 10 times `temperature`. It costs the products of the scores once more, 2 N M D FLOPs.
        The other arguments are those of `info_nce`.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: Zhang et al. 2022, arXiv:2203.17248; https://github.com/ChaoningZhang/Dual-temperature, which adds the
    losses of two pairs of encoders.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    problem = of_keys(
        query, positive_key, negative_keys, temperature, negative_mode, symmetric=symmetric, normalize=normalize,
        in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target, query_ids=query_ids,
        key_ids=key_ids, negative_ids=negative_ids,
    )  # fmt: skip
    inter = temperature_of(inter_temperature, query, "inter_temperature")
    weight = checks.row_weight(weight, query, problem.acc_dtype)
    problem, context = blocked(problem, options)
    with context:
        found = contrast.statistics(problem, options)
        with torch.no_grad(), unrecorded():
            between = contrast.statistics(at_temperature(problem, inter), options)
    losses = [
        # 1 - P(t) is the slope that `balanced` divides by
        torch.sigmoid(warm.neg - warm.pos) * balanced(cold.neg - cold.pos)
        for cold, warm in zip(found, between, strict=True)
        if cold is not None and warm is not None
    ]
    return reduced_rows(torch.stack(losses).mean(0), problem, options, weight)


class DualTemperatureLoss(ContrastiveLoss):
    """InfoNCE with dual temperature, as a module.

    The function `dual_temperature_info_nce` has the formula, and the shapes of what a call takes.

    Args:
        temperature: that of the negatives within a row: a positive number, a tensor of one element or of one value per
            row, or a callable of no arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per query).
        inter_temperature: that of the rows among one another, a positive number or a tensor, without a gradient.
        negative_mode: "unpaired" (explicit negatives are shared by all queries) or "paired" (each query has its own).
        symmetric: take the mean with the loss of the keys against the queries.
        normalize: divide every row by its norm first, so that scores are cosines.
        in_batch_negatives: whether the other rows of `positive_key` are negatives; None: only without explicit ones.
        ignore_index: a row with this `target` does not count.
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
        >>> loss = DualTemperatureLoss(temperature=0.1, inter_temperature=1.0)
        >>> loss(torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)).backward()
    """

    own = ("inter_temperature", "negative_mode", "symmetric", "in_batch_negatives", "ignore_index")

    def __init__(
        self,
        temperature: TemperatureLike = 0.1,
        *,
        reduction: Reduction = "mean",
        inter_temperature: float | Tensor = 1.0,
        negative_mode: NegativeMode = "unpaired",
        symmetric: bool = False,
        normalize: bool = True,
        in_batch_negatives: bool | None = None,
        ignore_index: int = -100,
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
        self.hold_options_of_keys(symmetric, negative_mode, in_batch_negatives, ignore_index)
        checks.number_or_tensor("inter_temperature", inter_temperature)
        if isinstance(inter_temperature, Tensor) and inter_temperature.requires_grad:
            raise ValueError("inter_temperature gets no gradient and cannot be trained: pass its .detach()")
        self.inter_temperature = inter_temperature

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        target: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of queries and keys, shaped as `info_nce` says."""
        return dual_temperature_info_nce(
            query, positive_key, negative_keys, self.temperature, target=target, query_ids=query_ids, key_ids=key_ids,
            negative_ids=negative_ids, weight=weight, **self.options,
        )  # fmt: skip
