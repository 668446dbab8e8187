"""InfoNCE, as info-nce-pytorch has it, and an explanation of how a call would be computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import BackendName, Options, Reduction
from ..backends.contract import Problem
from ..backends.precision import statistics_dtype, without_autocast
from ..compose.across import blocked
from ..compose.arguments import NegativeMode, call_options, key_embeddings, of_keys
from ..compose.own_keys import scored_dots
from ..compose.reduction import of_statistics, reduced, reduced_rows
from ..compose.repeated import repeated
from ..compose.rows import one_id_a_row
from ..compose.several import (
    POSITIVES,
    PositivesMode,
    Several,
    by_ids,
    by_target,
    check_several,
    several_reduced,
)
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss, Plans


@repeated
@together
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
    *,
    symmetric: bool = False,
    normalize: bool = True,
    in_batch_negatives: bool | None = None,
    ignore_index: int = -100,
    target: Tensor | None = None,
    positives: PositivesMode = "each",
    positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    positive_weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    key_bias: Tensor | None = None,
    negative_bias: Tensor | None = None,
    positive_bias: bool = True,
    negative_mask: Tensor | None = None,
    negative_index: Tensor | None = None,
    weight: Tensor | None = None,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """InfoNCE between queries and keys, without the N x M logits.

        loss_i = -log( exp(s_i,y) / (exp(s_i,y) + sum_j exp(s_ij)) ),    s_ij = cos(q_i, k_j) / t_i

    over the negatives j of row i. The first six arguments are those of `info_nce` of info-nce-pytorch 0.1.4, with its
    order, defaults and values.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        positive_key: (N, D), row i the positive of query i; with `target`, (M, D).
        negative_keys: explicit negatives, (M', D) if `negative_mode` is "unpaired", (N, H, D) if "paired"; or with
            `negative_index` a table. None: the other rows of `positive_key` are the negatives.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per row; gradients
            flow to tensors. Values of tensors are checked on a CPU; on a GPU a bad one gives NaN.
        reduction: "mean", "sum" or "none" (one value per query).
        negative_mode: "unpaired" (negatives shared by all queries) or "paired" (each query its own).
        symmetric: take the mean with the loss of the keys against the queries, as CLIP does. Needs N = M and no
            `target`. Explicit negatives enter the query direction only; column j has the temperature of row j.
        normalize: divide every row by max(norm, 1e-12), as `torch.nn.functional.normalize`; else s_ij = q_i.k_j / t_i.
            A row whose norm overflows (1.8e19 in float32) is NaN, and not zeros as there.
        in_batch_negatives: whether the other rows of `positive_key` are negatives too. None: only if there are no
            `negative_keys`.
        ignore_index: rows with this target count neither in the loss nor in the mean. What is said of a `weight` of 0
            holds for them.
        target: (N,) integer indices of each query's positive in `positive_key`. None: row i. Or (N, P), the indices of
            several, padded with `ignore_index`; a row with none does not count, and a key named twice counts twice.
            Several positives go with neither `label_smoothing` nor `key_ids` without `query_ids`.
        positives: how several positives of a row are taken, none of which is a negative. "each": the mean of the
            losses that each would have alone. "all": each has the others in its denominator, as in SupCon. "any": the
            sum of their exponentials is what stands against the row's negatives, as in MIL-NCE, whose denominator has
            the negatives of both directions in one sum.
        positive_ids: integer ids in place of `target`, (N,) of the queries and (M,) of the keys, or one tensor for
            both: the keys of its id are a query's positives, whatever the id, and `negative_keys` are none. With
            `symmetric`, both directions have them. Time and memory grow with the number of pairs of one id, which one
            synchronisation reads on a GPU: for few, large classes `sup_con` is the cheaper loss.
        positive_weight: (N, P), not negative, the weights of a (N, P) target's positives in the means of "each" and
            "all". A weight of 0 leaves a positive out, which is no negative either; a row of such does not count.
        query_ids, key_ids, negative_ids: (N,), (M,) and, as `negative_keys` without its last dimension, integer ids.
            `key_ids` alone: a negative with the id of the row's positive is left out (a duplicate document). With
            `query_ids`: every negative with the id of its query is left out; class labels are passed as both. The
            positive is always kept. Ids may have one dimension more, (N, I), (M, I): a negative of which any of I ids
            agrees is left out, such as one of the same document or of the same question.
        key_bias, negative_bias: c in nats, floating, (M,) and, as `negative_keys` without its last dimension: added to
            every logit in which the key is what a query is scored against, s_ij = cos(q_i, k_j) / t_i + c_j; gradients
            flow to both. -inf leaves a key out, which may not be a row's positive, and which must be finite itself,
            since a NaN stays one. With `symmetric` keys are not what is scored in the other direction, and nothing
            there has a bias. Not with `label_smoothing`. Values are checked on a CPU; on a GPU a bad one gives NaN, and
            one with a gradient costs 8 N M D FLOPs in place of 6.
        positive_bias: whether the logit of a row's positive has its key's bias too. Without, -inf leaves it out of the
            negatives of other rows alone.
        negative_mask: (N, H), booleans, with paired `negative_keys`: whether a negative is there, so that rows may have
            different numbers of them. A row that keeps none, and has no others, has loss 0 and no gradient. What is not
            there must be finite, as with a bias of -inf.
        negative_index: (N, H) integers, places in the table `negative_keys` (M', D): the explicit negatives of query i
            are the table's rows `negative_index[i]`, as if `negative_keys[negative_index]` were passed as "paired", but
            no tensor ever holds these. -1 is no negative, so that a row may have fewer than H, or none. `negative_ids`
            are those of the table, (M',). Out of range is an error on a CPU; on a GPU it makes the row's loss NaN. A
            call reads the whole table for its norms, and under autocast casts it.
        weight: (N,) w, the weights of the rows, not negative: "none" gives w_i loss_i, "sum" the sum of these, "mean"
            that sum over the sum of w, as in `torch.nn.functional.cross_entropy`. With `symmetric`, w_i weighs row i of
            both directions. The value of a row of weight 0 is 0, even where it is NaN; a query that is NaN still makes
            gradients of the keys NaN.
        margin: m, not negative, taken off the positive's cosine, s_iy = (cos(q_i, k_y) - m) / t_i, in both directions:
            CosFace with `target` and class weights as keys, or the additive margin of bitext mining. Without
            `normalize`, off its dot product. Not with `label_smoothing`. It costs nothing.
        label_smoothing: eps, in [0, 1]: the label is (1 - eps) + eps / K at the positive and eps / K at the others of
            the K columns that are not left out, as in `torch.nn.functional.cross_entropy`.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32. With no rows, or all ignored, "mean"
        is NaN and "sum" 0, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: van den Oord et al. 2018, arXiv:1807.03748; https://github.com/RElbers/info-nce-pytorch. The margin:
    Wang et al. 2018, arXiv:1801.09414; Yang et al. 2019, arXiv:1902.08564. Several positives: Khosla et al. 2020,
    arXiv:2004.11362; Miech et al. 2020, arXiv:1912.06430.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    several = None
    if target is not None or positive_ids is not None or positive_weight is not None or positives != "each":
        several = _several(
            query, positive_key, target, positives, positive_ids, positive_weight, symmetric, ignore_index,
            {"label_smoothing": label_smoothing != 0, "key_ids alone": query_ids is None and key_ids is not None},
        )  # fmt: skip
    if several is not None:
        target, ignore_index = several.target, -1
    problem = of_keys(
        query, positive_key, negative_keys, temperature, negative_mode, symmetric=symmetric, normalize=normalize,
        in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target, query_ids=query_ids,
        key_ids=key_ids, negative_ids=negative_ids, key_bias=key_bias, negative_bias=negative_bias,
        positive_bias=positive_bias, negative_mask=negative_mask, negative_index=negative_index, margin=margin,
    )  # fmt: skip
    weight = checks.row_weight(weight, query, problem.acc_dtype)
    if several is not None:
        of_positives = key_bias if positive_bias else None
        bias = None if of_positives is None else checks.bias("key_bias", of_positives, positive_key.shape[:1], query)
        return several_reduced(problem, options, several, positives, weight, margin, bias)
    if label_smoothing == 0:
        return reduced(problem, options, "infonce", weight)
    label_smoothing = checks.fraction("label_smoothing", label_smoothing)
    if problem.added:
        raise ValueError("label_smoothing cannot be used with key_bias, negative_bias, negative_mask or margin")
    one_id_a_row(problem, "label_smoothing")
    problem, context = blocked(problem, options)
    with context:
        if problem.apart:  # one direction after the other, as its rows come
            losses = [_smoothed(block(), options, label_smoothing) for block in problem.blocks()]
            return reduced_rows(torch.stack(losses).mean(0), problem, options, weight)
        # Of what autograd saves, the loss's gradients are the largest part: they are made last, and used first.
        problem, pull = _pull(problem, options)
        loss = reduced(problem, options, "infonce", weight, gathered=True)
    return loss + label_smoothing * reduced_rows(pull, problem, options, weight)


def _several(
    query: Tensor, key: Tensor, target: Any, positives: PositivesMode, positive_ids: Any, positive_weight: Any,
    symmetric: bool, ignore_index: int, refused: dict[str, bool],
) -> Several | None:  # fmt: skip
    """Return the positives of a call whose rows may have several, checked; None where each has one.

    refused: options that do not go with several positives, and whether they were given.
    """
    many = isinstance(target, Tensor) and target.dim() == 2
    if not many and positive_ids is None and positive_weight is None and positives == "each":
        return None
    check_several(
        target, positive_ids, positive_weight, positives, symmetric, [name for name, there in refused.items() if there]
    )
    key_embeddings(query, key, None, "unpaired", targets=not symmetric)
    dtype = statistics_dtype(query)
    if positive_ids is not None:
        return by_ids(positive_ids, query, key, symmetric, dtype)
    if not many:
        raise ValueError("positives and positive_weight need several positives: a (N, P) target or positive_ids")
    return by_target(target, positive_weight, query, key.shape[0], ignore_index, dtype)


def explain(*args: Any, **kwargs: Any) -> Plans:
    """Return the plans by which `info_nce` would compute a call with these arguments; each prints as a sentence.

    There is one plan, or two with `symmetric` and explicit negatives, which are scored against the queries alone. No
    scores are computed. The answer depends on whether the inputs require gradients. Arguments that `info_nce` refuses
    raise its errors. The other losses have a method `explain`.
    """
    with contrast.explaining() as plans:
        info_nce(*args, **kwargs)
    return Plans(plans)


def _smoothed(problem: Problem, options: Options, label_smoothing: float) -> Tensor:
    """Return the (N,) losses of one direction."""
    problem, pull = _pull(problem, options)
    return of_statistics(problem, contrast.statistics(problem, options), "infonce") + label_smoothing * pull


def _pull(problem: Problem, options: Options) -> tuple[Problem, Tensor]:
    """Return the problem to go on with, and (N,) `pos_i - mean_j s_ij`, over row i's positive and negatives j, which
    label smoothing adds.

    With `problem.columns` the result is the mean over both directions. It takes O((N + M) D), and O(N H D) of keys that
    rows have alone.
    """
    if problem.columns:
        rows, columns = (_pull(each, options)[1] for each in problem.directions())
        return problem, (rows + columns) / 2
    device = problem.query.rows.device
    with without_autocast(device.type):
        recorded = options.backend == "reference"
        problem, positive, negatives, count = scored_dots(problem, recorded, options.limit(device))
        return problem, (positive - (positive + negatives) / (1 + count)) / problem.temperature.values


class FusedInfoNCELoss(ContrastiveLoss):
    """InfoNCE without the N x M logits, as a module; called and made like `InfoNCE` of info-nce-pytorch.

    The function `info_nce` has the formula, and the shapes of what a call takes.

    Args:
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per query).
        negative_mode: "unpaired" (explicit negatives are shared by all queries) or "paired" (each query has its own).
        symmetric: take the mean with the loss of the keys against the queries, as CLIP does.
        normalize: divide every row by its norm first, so that scores are cosines.
        in_batch_negatives: whether the other rows of `positive_key` are negatives; None: only without explicit ones.
        ignore_index: a row with this `target` does not count.
        positives: "each", "all" or "any", how several positives of a row are taken.
        margin: what is taken off the cosine of a positive.
        label_smoothing: the share of the label, in [0, 1], that is spread evenly over the positive and its negatives.
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
        >>> loss = FusedInfoNCELoss(temperature=0.02)
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss(query, key).backward()
    """

    own = ("negative_mode", "symmetric", "in_batch_negatives", "ignore_index", "positives", "margin", "label_smoothing")

    def __init__(
        self,
        temperature: TemperatureLike = 0.1,
        reduction: Reduction = "mean",
        negative_mode: NegativeMode = "unpaired",
        *,
        symmetric: bool = False,
        normalize: bool = True,
        in_batch_negatives: bool | None = None,
        ignore_index: int = -100,
        positives: PositivesMode = "each",
        margin: float = 0.0,
        label_smoothing: float = 0.0,
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
        checks.one_of("positives", positives, POSITIVES)
        self.positives: PositivesMode = positives
        self.margin = checks.not_negative("margin", margin)
        self.label_smoothing = checks.fraction("label_smoothing", label_smoothing)

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        target: Tensor | None = None,
        positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        positive_weight: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        key_bias: Tensor | None = None,
        negative_bias: Tensor | None = None,
        positive_bias: bool = True,
        negative_mask: Tensor | None = None,
        negative_index: Tensor | None = None,
        weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss of queries and keys, shaped as `info_nce` says; a `temperature` is for this call only."""
        return info_nce(
            query, positive_key, negative_keys, temperature=self.temperature if temperature is None else temperature,
            target=target, positive_ids=positive_ids, positive_weight=positive_weight, query_ids=query_ids,
            key_ids=key_ids, negative_ids=negative_ids, key_bias=key_bias, negative_bias=negative_bias,
            positive_bias=positive_bias, negative_mask=negative_mask, negative_index=negative_index, weight=weight,
            **self.options,
        )  # fmt: skip
