"""The robust contrastive loss of iSogCLR, in which a temperature is found by its own gradient."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import checks
from ..backends import BackendName, Reduction
from ..backends.contract import Problem, RowStatistics
from ..compose.arguments import NegativeMode, call_options, of_keys
from ..compose.reduction import reduced
from ..compose.rows import negative_counts, one_id_a_row
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss


@together
def robust_info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
    *,
    rho: float = 0.3,
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
    """Robust contrastive loss between queries and keys: the mean over the worst weights of a row's negatives.

        loss_i = t_i ( log( 1/M_i sum_j exp(s_ij - s_i,y) ) + rho ),    s_ij = cos(q_i, k_j) / t_i

    over the M_i negatives j of row i. The least value over t_i is the largest mean that weights p_j of the negatives
    give to their lead over the positive, among those near to equal weights:

        min_t loss_i = max_p sum_j p_j (cos(q_i, k_j) - cos(q_i, k_y))    with  sum_j p_j log(M_i p_j) <= rho

    The temperature is the multiplier of this bound. It has a minimum of its own, at which the divergence is rho, so
    that one learned by gradient does not run away as that of InfoNCE does: d loss_i / d t_i is rho less the divergence
    of the softmax from equal weights. A row with many negatives that are alike finds a high one, a row with few that
    stand out a low one. A row without negatives has loss 0 and no gradient.

    Args:
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per row; gradients
            flow to tensors.
        rho: not negative, in nats: by how much the weights may differ from equal ones. The softmax differs from them by
            at most log M_i, so that with a larger rho a temperature falls without end. 0: equal weights.
        The other arguments are those of `info_nce`.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32. It may be negative.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: Qiu et al. 2023, arXiv:2305.11965; https://github.com/zhqiu/contrastive-learning-iSogCLR.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    rho = checks.not_negative("rho", rho)
    temperature = gather.shared(options.call, temperature)
    problem = of_keys(
        query, positive_key, negative_keys, temperature, negative_mode, symmetric=symmetric, normalize=normalize,
        in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target, query_ids=query_ids,
        key_ids=key_ids, negative_ids=negative_ids,
    )  # fmt: skip
    one_id_a_row(problem, "the robust loss")
    weight = checks.row_weight(weight, query, problem.acc_dtype)
    return reduced(problem, options, partial(_losses, rho=rho), weight)


def _losses(problem: Problem, rows: RowStatistics, rho: float) -> Tensor:
    """Compute (N,) `t (neg - pos - log M + rho)`, 0 for a row without negatives."""
    none = rows.neg == -torch.inf
    lead = (rows.neg - rows.pos).masked_fill(none, 0)
    count = negative_counts(problem).clamp(min=1).to(lead.dtype)
    return (problem.temperature.values * (lead - torch.log(count) + rho)).masked_fill(none, 0)


class RobustInfoNCELoss(ContrastiveLoss):
    """The robust contrastive loss of iSogCLR as a module: a learned temperature finds its minimum.

    The function `robust_info_nce` has the formula, and the shapes of what a call takes. With a table of one temperature
    a sample, `IndividualTemperature`, it is iSogCLR's loss of a batch.

    Args:
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per query).
        rho: by how much the weights of the negatives may differ from equal ones, in nats.
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
        >>> loss = RobustInfoNCELoss(temperature=0.1, rho=0.3)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    own = ("rho", "negative_mode", "symmetric", "in_batch_negatives", "ignore_index")

    def __init__(
        self,
        temperature: TemperatureLike = 0.1,
        *,
        reduction: Reduction = "mean",
        rho: float = 0.3,
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
        self.rho = checks.not_negative("rho", rho)

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
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss of queries and keys, shaped as `info_nce` says; a `temperature` is for this call only."""
        return robust_info_nce(
            query, positive_key, negative_keys, self.temperature if temperature is None else temperature,
            target=target, query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids, weight=weight,
            **self.options,
        )  # fmt: skip
