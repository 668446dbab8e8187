"""Debiased contrastive loss: InfoNCE whose negatives are corrected for the false ones among them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import BackendName, Reduction
from ..backends.contract import Problem, RowStatistics
from ..backends.row_losses import infonce
from ..compose.arguments import NegativeMode, call_options, of_keys, of_views
from ..compose.reduction import Loss, reduced
from ..compose.rows import negative_counts, one_id_a_row
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import Negatives, PairLoss


@together
def debiased_info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
    *,
    tau_plus: float | Tensor = 0.1,
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
    """Debiased contrastive loss between queries and keys, where each negative is a positive with probability tau+.

        loss_i = -log( exp(s_i,y) / (exp(s_i,y) + G_i) ),    s_ij = cos(q_i, k_j) / t_i
        G_i = max( (sum_j exp(s_ij) - n_i tau+_i exp(s_i,y)) / (1 - tau+_i),  n_i exp(-1 / t_i) )

    over the n_i negatives j of row i. The second term is the least that n_i exponentials of unit rows sum to. With
    tau+ = 0 this is `info_nce`.

    Everything is computed from logarithms, at any temperature. Where the difference nearly cancels, the loss is as
    sensitive to the embeddings as its formula is: rounding errors are larger by sum_j exp(s_ij) / ((1 - tau+_i) G_i).

    Args:
        tau_plus: tau+, the probability that a negative is of the query's class: a number in [0, 1), or an (N,) floating
            tensor of one per row, which gets no gradient. With `symmetric`, key i has the probability of row i. Values
            of tensors are checked on a CPU; on a GPU a bad one gives NaN.
        normalize: True. Without it exp(-1 / t_i) is no bound, and False is a ValueError.
        The other arguments are those of `info_nce`; `temperature` has a gradient through exp(-1 / t_i) too.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    Reference: Chuang et al. 2020, arXiv:2007.00224. `debiased_nt_xent` is its form for two views.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    problem = of_keys(
        query, positive_key, negative_keys, temperature, negative_mode, symmetric=symmetric, normalize=normalize,
        in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target, query_ids=query_ids,
        key_ids=key_ids, negative_ids=negative_ids,
    )  # fmt: skip
    one_id_a_row(problem, "the debiased loss")
    weight = checks.row_weight(weight, query, problem.acc_dtype)
    return reduced(problem, options, _loss(problem, tau_plus), weight)


@together
def debiased_nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    *,
    tau_plus: float | Tensor = 0.1,
    normalize: bool = True,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """Debiased contrastive loss of two views: NT-Xent whose negatives are corrected for the false ones among them.

        loss_i = -log( exp(s_ip) / (exp(s_ip) + G_i) ),    s_ij = cos(z_i, z_j) / t_i
        G_i = max( (sum_j exp(s_ij) - n tau+_i exp(s_ip)) / (1 - tau+_i),  n exp(-1 / t_i) )

    where z are the 2 N rows of both views, p is the other view of i's sample and j the n = 2 N - 2 rows of other
    samples. The values are those of the authors' code, whose outputs are unit rows.

    Args:
        view_a, view_b: (N, D) each, row i of one the positive of row i of the other; float16, bfloat16, float32 or
            float64.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (2 N,) per row, those of `view_a`
            first; gradients flow to tensors.
        reduction: "mean" over the 2 N rows, "sum", or "none": (2 N,), the rows of `view_a` first.
        tau_plus: tau+, the probability that a negative is of the row's class: a number in [0, 1), or a (2 N,) floating
            tensor of one per row, which gets no gradient.
        normalize: True. Without it exp(-1 / t_i) is no bound, and False is a ValueError.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (2 N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: Chuang et al. 2020, arXiv:2007.00224; https://github.com/chingyaoc/DCL.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    problem = of_views(view_a, view_b, temperature, normalize)
    return reduced(problem, options, _loss(problem, tau_plus))


def _loss(problem: Problem, tau_plus: Any) -> Loss:
    """Return the loss of rows with this prior, checked."""
    if not problem.normalize:
        raise ValueError("the bound n exp(-1 / t) is of unit rows: normalize must be True, got False")
    return partial(_losses, tau=_tau_plus(tau_plus, problem))


def _losses(problem: Problem, rows: RowStatistics, tau: Tensor) -> Tensor:
    """Compute (N,) `log(1 + G exp(-pos))`, from `x = neg - pos` and tau+, (1,) or (N,).

        log(G exp(-pos)) = max( x + log(1 - exp(y)) - log(1 - tau+),  log n - 1 / t - pos ),  y = log(n tau+) - x

    the first part -inf unless y < 0.
    """
    t, x = problem.temperature.values, rows.neg - rows.pos
    none = x == -torch.inf  # the row has no negatives
    x = x.masked_fill(none, 0)
    n = negative_counts(problem).clamp(min=1).to(x.dtype)
    y = torch.log(n * tau) - x
    over = y > -torch.finfo(y.dtype).tiny  # NaN is not over, and stays; below this -y the slope 1 / y is infinite
    log1mexp = torch.log(-torch.expm1(y.masked_fill(over, -1)))
    estimate = (x + log1mexp - torch.log1p(-tau)).masked_fill(over, -torch.inf)
    floor = torch.log(n) - 1 / t - rows.pos
    return infonce(torch.clamp(estimate, min=floor)).masked_fill(none, 0)


def prior(value: Any) -> float:
    """Return a checked number as tau+."""
    number = checks.real("tau_plus", value)
    if not 0 <= number < 1:
        raise ValueError(f"tau_plus must be in [0, 1), got {value}")
    return number


def _tau_plus(value: Any, problem: Problem) -> Tensor:
    """Return the prior, (1,) or (N,), checked, in the dtype of the statistics."""
    t = problem.temperature.values
    if not isinstance(value, Tensor):
        return t.new_full((1,), prior(value))
    checks.per_row("tau_plus", value, problem.query.rows, number=True)
    if value.requires_grad:
        raise ValueError("tau_plus must not require a gradient: it has none")
    return checks.only("tau_plus", value, (value >= 0) & (value < 1), "be in [0, 1)").to(t.dtype)


class DebiasedLoss(PairLoss):
    """Debiased contrastive loss as a module: of two views of a batch, or of queries against keys.

    The functions `debiased_nt_xent` (views) and `debiased_info_nce` (keys) have the formulas. Rows are always divided
    by their norms.

    Args:
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per row of both views, or per query).
        tau_plus: the probability, in [0, 1), that a negative is of the row's own class.
        negatives: "views" (the inputs are two views of a batch, and the rows of both views of other samples are the
            negatives) or "keys" (the inputs are queries and keys). The next four are options of "keys".
        symmetric: take the mean with the loss of the keys against the queries.
        negative_mode: "unpaired" (explicit negatives are shared by all queries) or "paired" (each query has its own).
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
        >>> loss = DebiasedLoss(temperature=0.5, tau_plus=0.1)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    def __init__(
        self,
        temperature: TemperatureLike = 0.5,
        *,
        reduction: Reduction = "mean",
        tau_plus: float = 0.1,
        negatives: Negatives = "views",
        symmetric: bool = False,
        negative_mode: NegativeMode = "unpaired",
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
            negatives, symmetric, negative_mode, in_batch_negatives, ignore_index, temperature=temperature,
            learnable_temperature=learnable_temperature, max_logit_scale=max_logit_scale, reduction=reduction,
            normalize=True, backend=backend, workspace_limit=workspace_limit, distributed=distributed, record=record,
        )  # fmt: skip
        self.tau_plus = prior(tau_plus)

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        tau_plus: Tensor | None = None,
        target: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of two views of a batch, or with negatives="keys" of queries and keys.

        The first two inputs are (N, D) each. A `tau_plus` per row is for this call only. All other arguments are for
        negatives="keys".
        """
        of_keys = self.of_keys(
            negative_keys=negative_keys, target=target, query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids,
            weight=weight,
        )  # fmt: skip
        function = debiased_info_nce if self.negatives == "keys" else debiased_nt_xent
        tau = self.tau_plus if tau_plus is None else tau_plus
        return function(query, positive_key, temperature=self.temperature, tau_plus=tau, **of_keys, **self.options)
