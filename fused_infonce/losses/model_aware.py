"""Model-aware contrastive loss (MACL): a temperature by the pairs' alignment, and gradients that do not vanish."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..backends import BackendName, Options, Reduction
from ..backends.contract import Problem, RowStatistics
from ..backends.row_losses import balanced
from ..compose.across import across
from ..compose.arguments import NegativeMode, call_options, of_keys, of_views
from ..compose.reduction import reduced
from ..compose.rows import at_temperature
from ..distributed import DistributedLike, gather, together
from ..temperature.alignment import aligned, check_alignment
from ..temperature.scale import TemperatureLike
from .base import Negatives, PairLoss


@together
def model_aware_info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
    *,
    alpha: float = 0.5,
    threshold: float = 0.0,
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
    """Model-aware contrastive loss (MACL) between queries and keys.

        loss_i = -V_i log P_i,    P_i = exp(s_i,y) / (exp(s_i,y) + sum_j exp(s_ij)),    V_i = 1 / (1 - P_i)
        s_ij = cos(q_i, k_j) / t_i,    t_i = temperature_i (1 + alpha (A - threshold)),    A = mean_i cos(q_i, k_y)

    over the negatives j of row i. Neither V_i nor A has a gradient. V_i undoes the factor 1 - P_i that the gradient of
    InfoNCE has, so that few negatives or easy ones do not make it vanish: it is that of `decoupled_info_nce` at the
    temperature of `alignment_temperature`, while the value is at least 1. A row without negatives has loss 0 and no
    gradient.

    Args:
        temperature: the temperature at an alignment of `threshold`, a positive number, a one-element tensor (on the CPU
            too), or (N,) or (N, 1) per row; gradients flow to tensors.
        alpha: in [0, 1], how far the temperature follows the alignment.
        threshold: in [0, 1], the alignment that leaves the temperature as it is.
        The other arguments are those of `info_nce`.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values, an alignment at which the temperature is not positive. TypeError:
        types, dtypes. RuntimeError: a backend that cannot run.

    Reference: Huang et al. 2023, arXiv:2207.07874. `model_aware_nt_xent` is its form for two views.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    check_alignment(alpha, threshold)
    temperature = gather.shared(options.call, temperature)
    problem = of_keys(
        query, positive_key, negative_keys, temperature, negative_mode, symmetric=symmetric, normalize=normalize,
        in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target, query_ids=query_ids,
        key_ids=key_ids, negative_ids=negative_ids,
    )  # fmt: skip
    weight = checks.row_weight(weight, query, problem.acc_dtype)
    return _reduced(problem, options, alpha, threshold, weight)


@together
def model_aware_nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    *,
    alpha: float = 0.5,
    threshold: float = 0.0,
    normalize: bool = True,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """Model-aware contrastive loss (MACL) of two views.

        loss_i = -V_i log P_i,    P_i = exp(s_ip) / sum_{j != i} exp(s_ij),    V_i = 1 / (1 - P_i)
        s_ij = cos(z_i, z_j) / t_i,    t_i = temperature_i (1 + alpha (A - threshold)),    A = mean_i cos(z_i, z_p)

    where z are the 2 N rows of both views and p is the other view of i's sample. Neither V_i nor A has a gradient. The
    values are those of lightly's `MACLLoss`, which adds 1e-8 to 1 - P_i, and so departs where P_i is within about 1e-3
    of 1. A sample alone has loss 0 and no gradient.

    Args:
        view_a, view_b: (N, D) each, row i of one the positive of row i of the other; float16, bfloat16, float32 or
            float64.
        temperature: the temperature at an alignment of `threshold`, a positive number, a one-element tensor (on the CPU
            too), or (2 N,) per row, those of `view_a` first; gradients flow to tensors.
        reduction: "mean" over the 2 N rows, "sum", or "none": (2 N,), the rows of `view_a` first.
        alpha: in [0, 1], how far the temperature follows the alignment.
        threshold: in [0, 1], the alignment that leaves the temperature as it is.
        normalize: divide every row by max(norm, 1e-12) first, so that scores are cosines.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (2 N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values, an alignment at which the temperature is not positive. TypeError:
        types, dtypes. RuntimeError: a backend that cannot run.

    References: Huang et al. 2023, arXiv:2207.07874; https://github.com/lightly-ai/lightly (MACLLoss).
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    check_alignment(alpha, threshold)
    temperature = gather.shared(options.call, temperature)
    return _reduced(of_views(view_a, view_b, temperature, normalize), options, alpha, threshold)


def _reduced(
    problem: Problem, options: Options, alpha: float, threshold: float, weight: Tensor | None = None
) -> Tensor:
    """Return the loss of a problem whose temperature is that of an alignment of `threshold`."""
    problem, context = across(problem, options)
    problem = at_temperature(problem, aligned(problem, options, alpha, threshold))
    with context:
        return reduced(problem, options, _losses, weight, gathered=True)


def _losses(problem: Problem, rows: RowStatistics) -> Tensor:
    return balanced(rows.neg - rows.pos)


class MACLLoss(PairLoss):
    """Model-aware contrastive loss as a module: of two views of a batch, or of queries against keys.

    The functions `model_aware_nt_xent` (views) and `model_aware_info_nce` (keys) have the formulas.

    Args:
        temperature: the temperature at an alignment of `threshold`, a positive number, a tensor of one element or of
            one value per row, or a callable of no arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per row of both views, or per query).
        alpha: in [0, 1], how far the temperature follows the alignment of the pairs.
        threshold: in [0, 1], the alignment that leaves the temperature as it is.
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
        >>> loss = MACLLoss(temperature=0.1, alpha=0.5)
        >>> loss(torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)).backward()
    """

    own = ("alpha", "threshold")

    def __init__(
        self,
        temperature: TemperatureLike = 0.1,
        *,
        reduction: Reduction = "mean",
        alpha: float = 0.5,
        threshold: float = 0.0,
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
        check_alignment(alpha, threshold)
        self.alpha, self.threshold = alpha, threshold

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
        """Return the loss of two views of a batch, or with negatives="keys" of queries and keys, (N, D) each.

        All further arguments are for negatives="keys".
        """
        of_keys = self.of_keys(
            negative_keys=negative_keys, target=target, query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids,
            weight=weight,
        )  # fmt: skip
        function = model_aware_info_nce if self.negatives == "keys" else model_aware_nt_xent
        return function(query, positive_key, temperature=self.temperature, **of_keys, **self.options)
