"""Decoupled contrastive loss: InfoNCE without the positive in the denominator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import BackendName, Reduction
from ..backends.contract import Problem
from ..backends.precision import accumulator, without_autocast
from ..backends.row_losses import decoupled
from ..compose.arguments import NegativeMode, call_options, of_keys, of_views, views
from ..compose.reduction import Loss, reduced
from ..compose.rows import dots, unit
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import Negatives, PairLoss


@together
def decoupled_info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
    *,
    positive_weight: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    in_batch_negatives: bool | None = None,
    ignore_index: int = -100,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    key_bias: Tensor | None = None,
    negative_bias: Tensor | None = None,
    positive_bias: bool = True,
    weight: Tensor | None = None,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """Decoupled contrastive loss (DCL) between queries and keys: InfoNCE without the positive in the denominator.

        loss_i = log( sum_j exp(s_ij) ) - w_i s_i,y,    s_ij = cos(q_i, k_j) / t_i

    over the negatives j of row i alone, so that a pair that is already alike keeps its gradient. A row without
    negatives has loss 0 and no gradient.

    Args:
        positive_weight: (N,) w, finite; gradients flow to it. None: 1. See `von_mises_fisher_weight` for DCLW's. With
            `symmetric` it holds in both directions.
        The other arguments are those of `info_nce`.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32. It may be negative.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    Reference: Yeh et al. 2022, arXiv:2110.06848. `decoupled_nt_xent` is its form for two views.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    problem = of_keys(
        query, positive_key, negative_keys, temperature, negative_mode, symmetric=symmetric, normalize=normalize,
        in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target, query_ids=query_ids,
        key_ids=key_ids, negative_ids=negative_ids, key_bias=key_bias, negative_bias=negative_bias,
        positive_bias=positive_bias,
    )  # fmt: skip
    weight = checks.row_weight(weight, query, problem.acc_dtype)
    return reduced(problem, options, _loss(problem, positive_weight), weight)


@together
def decoupled_nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    *,
    positive_weight: Tensor | None = None,
    normalize: bool = True,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """Decoupled contrastive loss (DCL) of two views: NT-Xent without the positive in the denominator.

        loss_i = log( sum_j exp(s_ij) ) - w_i s_ip,    s_ij = cos(z_i, z_j) / t_i

    where z are the 2 N rows of both views, p is the other view of i's sample and j the 2 (N - 1) rows of other samples.
    The values are those of lightly's `DCLLoss`, and with `von_mises_fisher_weight` of its `DCLWLoss`. A sample alone
    has loss 0 and no gradient, where theirs is -inf.

    Args:
        view_a, view_b: (N, D) each, row i of one the positive of row i of the other; float16, bfloat16, float32 or
            float64.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (2 N,) per row, those of `view_a`
            first; gradients flow to tensors.
        reduction: "mean" over the 2 N rows, "sum", or "none": (2 N,), the rows of `view_a` first.
        positive_weight: (2 N,) w, finite, of the rows of `view_a` first; gradients flow to it. None: 1.
        normalize: divide every row by max(norm, 1e-12) first, so that scores are cosines.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (2 N,) for "none": float64 for float64 inputs, else float32. It may be negative.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: Yeh et al. 2022, arXiv:2110.06848 (equation 6); https://github.com/lightly-ai/lightly (DCLLoss).
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    problem = of_views(view_a, view_b, temperature, normalize)
    return reduced(problem, options, _loss(problem, positive_weight))


@together
@torch.no_grad()
def von_mises_fisher_weight(
    query: Tensor,
    positive_key: Tensor,
    sigma: float = 0.5,
    *,
    normalize: bool = True,
    distributed: DistributedLike = False,
) -> Tensor:
    """Compute the weights of the positives in DCLW, the decoupled loss where less similar pairs weigh more.

        w_i = 2 - N exp(c_i / sigma) / sum_j exp(c_j / sigma),    c_i = cos(q_i, k_i)

    Queries and keys have equal weights, so that the weights of two views a and b are
    `von_mises_fisher_weight(a, b).repeat(2)`. The mean of the weights is 1, and they have no gradient.

    Args:
        query, positive_key: (N, D) each; float16, bfloat16, float32 or float64.
        sigma: a positive number.
        normalize: divide every row by max(norm, 1e-12) first.
        distributed: over whose pairs j goes and N counts: False (this process's), True (those of the default process
            group), a `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        (N,) weights: float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, values. TypeError: types, dtypes.

    Reference: Yeh et al. 2022, arXiv:2110.06848 (section 3.2).
    """
    call = call_options("auto", None, distributed=distributed).call
    query, positive_key = views(query, positive_key, ())
    sigma = checks.positive_float("sigma", sigma)
    acc = accumulator(query.dtype)
    with without_autocast(query.device.type):
        cosine = dots(unit(query, normalize, acc), unit(positive_key, normalize, acc))
        if call is None:
            return 2 - len(cosine) * torch.softmax(cosine / sigma, dim=0)
        (counts,) = call.counts(f"weights of {cosine.dtype}", f"sigma {sigma}", [len(cosine)])
        (every,) = gather.gather(call, [cosine], [counts])
        weights = 2 - len(every) * torch.softmax(every / sigma, dim=0)
        return weights[call.start(counts) :][: len(cosine)]


def _loss(problem: Problem, positive_weight: Any) -> Loss:
    """Return the loss of rows whose positives have these weights, checked."""
    if positive_weight is None:
        return "decoupled"
    checks.per_row("positive_weight", positive_weight, problem.query.rows)
    dtype = problem.acc_dtype
    scale = checks.only("positive_weight", positive_weight, positive_weight.isfinite(), "be finite").to(dtype)
    return lambda problem, rows: decoupled(rows.neg - scale * rows.pos)


class DCLLoss(PairLoss):
    """Decoupled contrastive loss as a module: of two views of a batch, or of queries against keys.

    The functions `decoupled_nt_xent` (views) and `decoupled_info_nce` (keys) have the formulas.

    Args:
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per row of both views, or per query).
        sigma: weigh the positives by `von_mises_fisher_weight` (DCLW, where it is 0.5); None: no weights.
        negatives: "views" (the inputs are two views of a batch, and the rows of both views of other samples are the
            negatives) or "keys" (the inputs are queries and keys). The next four are options of "keys".
        symmetric: take the mean with the loss of the keys against the queries.
        negative_mode: "unpaired" (explicit negatives are shared by all queries) or "paired" (each query has its own).
        in_batch_negatives: whether the other rows of `positive_key` are negatives; None: only without explicit ones.
        ignore_index: a row with this `target` does not count.
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
        >>> loss = DCLLoss(temperature=0.1)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    def __init__(
        self,
        temperature: TemperatureLike = 0.1,
        *,
        reduction: Reduction = "mean",
        sigma: float | None = None,
        negatives: Negatives = "views",
        symmetric: bool = False,
        negative_mode: NegativeMode = "unpaired",
        in_batch_negatives: bool | None = None,
        ignore_index: int = -100,
        normalize: bool = True,
        learnable_temperature: bool = False,
        max_logit_scale: float | None = None,
        backend: BackendName = "auto",
        workspace_limit: int | None = None,
        distributed: DistributedLike = False,
        record: bool = False,
    ):
        super().__init__(
            negatives, symmetric, negative_mode, in_batch_negatives, ignore_index, temperature=temperature,
            learnable_temperature=learnable_temperature, max_logit_scale=max_logit_scale, reduction=reduction,
            normalize=normalize, backend=backend, workspace_limit=workspace_limit, distributed=distributed,
            record=record,
        )  # fmt: skip
        self.sigma = None if sigma is None else checks.positive_float("sigma", sigma)

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        positive_weight: Tensor | None = None,
        target: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        key_bias: Tensor | None = None,
        negative_bias: Tensor | None = None,
        positive_bias: bool = True,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of two views of a batch, or with negatives="keys" of queries and keys.

        The first two inputs are (N, D) each. A `positive_weight` has one value per row: (N,) of queries, (2 N,) of two
        views. All other arguments are for negatives="keys".
        """
        if self.sigma is not None:
            if positive_weight is not None or target is not None:
                what = "target" if positive_weight is None else "positive_weight"
                raise ValueError(f"sigma weighs row i by its likeness to key i: it cannot be used with {what}")
            positive_weight = von_mises_fisher_weight(
                query, positive_key, self.sigma, normalize=self.normalize, distributed=self.distributed
            )
            if self.negatives == "views":
                positive_weight = positive_weight.repeat(2)
        of_keys = self.of_keys(
            negative_keys=negative_keys, target=target, query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids,
            key_bias=key_bias, negative_bias=negative_bias, weight=weight,
        )  # fmt: skip
        if not positive_bias:
            of_keys |= self.of_keys(positive_bias=positive_bias)
        function = decoupled_info_nce if self.negatives == "keys" else decoupled_nt_xent
        return function(
            query,
            positive_key,
            temperature=self.temperature,
            positive_weight=positive_weight,
            **of_keys,
            **self.options,
        )
