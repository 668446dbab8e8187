"""InfoNCE over groups of a positive and its hard negatives, as retrievers are trained, and its distillation."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import BackendName, Options, Reduction
from ..backends.contract import KeySet, Problem, Temperature
from ..backends.indexing import part_of, slices
from ..backends.precision import without_autocast
from ..backends.row_losses import infonce, temperature_gradient
from ..backends.rows import Rows
from ..compose.across import across, unique
from ..compose.arguments import call_options, temperature_of
from ..compose.reduction import reduced_mean
from ..compose.rows import finite, unit
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss
from .info_nce import info_nce

Distillation = Literal["kl_div", "m3_kd_loss"]
DISTILLATIONS: tuple[Distillation, ...] = get_args(Distillation)


@together
def grouped_info_nce(
    query: Tensor,
    passages: Tensor,
    group_size: int,
    *,
    temperature: float | Tensor = 0.02,
    normalize: bool = True,
    in_batch_negatives: bool = True,
    target: Tensor | None = None,
    offset: int = 0,
    key_bias: Tensor | None = None,
    positive_bias: bool = True,
    reduction: Reduction = "mean",
    teacher_scores: Tensor | None = None,
    distillation: Distillation | None = None,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """InfoNCE over groups of G passages: query i's are rows `offset + i G + k`, a positive (k = 0) and hard negatives.

        loss_i = -log( exp(s_i,y) / sum_j exp(s_ij) ),    s_ij = cos(q_i, p_j) / t_i,  y = offset + i G

    over all passages j, or without `in_batch_negatives` over the query's own group. With teacher scores T and
    p_ik = exp(T_ik) / sum_l exp(T_il), k and l in the group:

        "kl_div"      loss_i - sum_k p_ik log( exp(s_ik) / sum_l exp(s_il) )
        "m3_kd_loss"  -sum_k p_ik log( exp(s_ik) / (sum_{l >= k} exp(s_il) + sum_{j outside the group} exp(s_ij)) )

    which are FlagEmbedding's losses of these names: the first adds to the plain loss, the second replaces it.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        passages: (M G, D) in M >= N groups of `group_size` rows; M > N where they were gathered from other processes.
        group_size: G, the positive included.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per row; gradients
            flow to tensors.
        normalize: divide every row by max(norm, 1e-12) first, so that scores are cosines.
        in_batch_negatives: whether the passages of other groups are negatives too. Without them G must be 2 or more.
        target: (N,) integer rows of `passages`, each query's positive in place of `offset + i G`; the others are its
            negatives, and -100 leaves the query out. Needs in-batch negatives, no `offset` and no distillation.
        offset: the row where the first query's group begins, a multiple of G: `rank * N * G` of gathered passages.
        key_bias: (M G,) of the passages, floating, in nats: added to every logit of passage j, s_ij + c_j; gradients
            flow to it. -inf leaves a passage out, which may not be a positive. Needs no distillation.
        positive_bias: whether the logit of a query's positive has its bias too.
        reduction: "mean", "sum" or "none" (one value per query).
        teacher_scores: (N, G) floating, of each query's own group, before their softmax; they get no gradient.
        distillation: "kl_div" or "m3_kd_loss" (which needs in-batch negatives); with `teacher_scores`, else None.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
            Beside it "m3_kd_loss" holds the (N, G, D) own passages once in float32, and N G^2 / 2 numbers.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: FlagEmbedding (Xiao et al. 2023, arXiv:2309.07597), BGE-M3 (Chen et al. 2024, arXiv:2402.03216);
    tevatron and GradCache have this layout and loss.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    _check_embeddings(query, passages)
    _check_groups(query, passages, group_size, offset, target, in_batch_negatives)
    _check_distillation(query, group_size, target, in_batch_negatives, teacher_scores, distillation)
    if distillation is not None and (key_bias is not None or not positive_bias):
        raise ValueError("key_bias and positive_bias cannot be used with a distillation")
    n = len(query)
    t = temperature_of(gather.shared(options.call, temperature), query)
    # a view (N, G, D) of the passages; a target replaces the groups
    own = None if target is not None else passages[offset : offset + n * group_size].unflatten(0, (n, group_size))

    distilled: Tensor | None = None
    if own is not None and distillation is not None and teacher_scores is not None:
        teacher = teacher_scores.detach()
        if distillation == "m3_kd_loss":
            outside = _outside(query, passages, group_size, offset, t, normalize, options)
            rows = _falling_groups(outside, _own_scores(query, own, t.values, normalize), _weights(teacher, t))
            return reduced_mean(rows, options)
        # made first, so that its gradients are made last: those of the passages are then not held meanwhile
        rows = _divergence(query, passages, own, t, teacher, offset, normalize, options)
        distilled = reduced_mean(rows, options)
    shared: dict[str, Any] = {
        "temperature": temperature, "reduction": reduction, "normalize": normalize, "backend": backend,
        "workspace_limit": workspace_limit, "positive_bias": positive_bias, "distributed": distributed,
    }  # fmt: skip
    if own is not None and not in_batch_negatives:
        biases = _own_biases(key_bias, positive_bias, query, passages, offset, group_size)
        contrastive = info_nce(query, own[:, 0], own[:, 1:], negative_mode="paired", **shared | biases)
    else:
        if target is None:
            target = torch.arange(n, device=query.device) * group_size + offset
        contrastive = info_nce(query, passages, target=target, key_bias=key_bias, **shared)
    return contrastive if distilled is None else contrastive + distilled


def _own_biases(
    key_bias: Any, positive_bias: bool, query: Tensor, passages: Tensor, offset: int, group_size: int
) -> dict[str, Any]:
    """Return the biases of each query's own group, as `info_nce` takes them."""
    checks.flags(positive_bias=positive_bias)
    if key_bias is None:
        return {}
    bias = checks.bias("key_bias", key_bias, tuple(passages.shape[:1]), query)
    own = bias[offset : offset + len(query) * group_size].unflatten(0, (len(query), group_size))
    return {"key_bias": own[:, 0] if positive_bias else None, "negative_bias": own[:, 1:], "positive_bias": True}


def _weights(teacher: Tensor, t: Temperature) -> Tensor:
    return torch.softmax(teacher.to(t.dtype), dim=1)


def _divergence(
    query: Tensor, passages: Tensor, own: Tensor, t: Temperature, teacher: Tensor, offset: int, normalize: bool,
    options: Options,
) -> Tensor:  # fmt: skip
    """Return the (N,) cross-entropies of the teacher's weights and each query's scores of its own group."""
    if options.backend == "reference" or contrast.is_explaining():  # it is differentiable any number of times
        scores = _own_scores(query, own, t.values, normalize)
        return -(_weights(teacher, t) * torch.log_softmax(scores, dim=1)).sum(1)
    limit = options.limit(query.device)
    return _Divergence.apply(query, passages, t.values, teacher, offset, normalize, limit)


def _outside(
    query: Tensor, passages: Tensor, group_size: int, offset: int, t: Temperature, normalize: bool, options: Options
) -> Tensor:
    """Return the (N,) logsumexp over the passages of other groups."""
    n, first, device = len(query), offset // group_size, query.device
    groups = torch.arange(-first, len(passages) // group_size - first, device=device)
    ids = groups.repeat_interleave(group_size, output_size=len(passages))
    none = torch.full((n,), -1, device=device)
    queries = KeySet(query, unique(torch.arange(n, device=device), options))
    problem = Problem(queries, (KeySet(passages, unique(ids, options)),), t, none, normalize=normalize)
    problem, products = across(problem, options, reused=True)
    with products:
        return contrast.statistics(problem, options).rows.neg


def _own_scores(query: Tensor, own: Tensor, t: Tensor, normalize: bool) -> Tensor:
    """Return the (N, G) logits of each query's own group, in the dtype of the statistics whatever autocast says."""
    if contrast.is_explaining():
        return t.new_zeros(own.shape[:2])
    with without_autocast(query.device.type):
        q, p = unit(query, normalize, t.dtype), unit(own, normalize, t.dtype)
        return torch.bmm(p, q[:, :, None])[..., 0] / t[:, None]


class _Divergence(torch.autograd.Function):
    """The cross-entropy of a teacher's weights w and the scores s of each query's own group, (N,).

        loss_i = -sum_k w_ik log p_ik,    dloss_i / ds_ik = p_ik sum_l w_il - w_ik

    Groups are worked on a few at a time, within the limit, and once more in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, passages: Tensor, t: Tensor, teacher: Tensor, offset: int, normalize: bool, limit: int
    ) -> Tensor:
        ctx.save_for_backward(query, passages, t, teacher)
        n, size = teacher.shape
        # unit rows, their gradients or squares, and some vectors
        ctx.parts = slices(n, limit // max(size * (2 * query.shape[1] + 4) * t.element_size(), 1))
        ctx.offset, ctx.normalize = offset, normalize
        loss = t.new_zeros(n)
        with without_autocast(query.device.type):
            for part in ctx.parts:
                *_, scores, weight = _group_scores(query, passages, t, teacher, part, offset, normalize)
                loss[part] = weight.mul_(torch.log_softmax(scores, dim=1)).sum(1).neg_()
        return loss

    @staticmethod
    @contrast.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        query, passages, t, teacher = ctx.saved_tensors
        n, size = teacher.shape
        for_query, for_passages, for_t, *_ = ctx.needs_input_grad
        grad_query = torch.zeros_like(query) if for_query else None
        grad_passages = torch.zeros_like(passages) if for_passages else None
        logits = t.new_zeros(n)
        with without_autocast(query.device.type):
            for part in ctx.parts:
                x, y, scores, weight = _group_scores(query, passages, t, teacher, part, ctx.offset, ctx.normalize)
                slope = torch.softmax(scores, dim=1).mul_(weight.sum(1, keepdim=True)).sub_(weight)
                slope *= upstream[part, None]
                logits[part] = torch.linalg.vecdot(slope, scores)
                slope /= part_of(t, part)[:, None]
                if grad_query is not None:
                    grad_query[part] = x.finish(torch.bmm(slope[:, None], y.unit)[:, 0])
                if grad_passages is not None:
                    grad = y.finish(slope[:, :, None] * x.unit[:, None])
                    grad_passages[_members(ctx.offset, size, part)] = grad.flatten(0, 1)
        dt = temperature_gradient(logits, Temperature(t)) if for_t else None
        return grad_query, grad_passages, dt, None, None, None, None


def _group_scores(
    query: Tensor, passages: Tensor, t: Tensor, teacher: Tensor, part: slice, offset: int, normalize: bool
) -> tuple[Rows, Rows, Tensor, Tensor]:
    """Return some queries and their groups as the scores see them, the scores, and the teacher's weights."""
    own = passages[_members(offset, teacher.shape[1], part)].unflatten(0, (-1, teacher.shape[1]))
    x, y = (Rows(rows, normalize, None, t.dtype) for rows in (query[part], own))
    scores = torch.bmm(y.unit, x.unit[:, :, None])[..., 0].div_(part_of(t, part)[:, None])
    return x, y, scores, torch.softmax(teacher[part].to(t.dtype), dim=1)


def _members(offset: int, size: int, part: slice) -> slice:
    return slice(offset + part.start * size, offset + part.stop * size)


def _falling_groups(outside: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
    """Compute `sum_k weight_ik log(1 + exp(x_ik))` with x_ik = log(exp(outside_i) + sum_{l > k} exp(s_il)) - s_ik."""
    later = finite(outside)[:, None]  # with a single group nothing is outside
    terms = []
    for k in range(scores.shape[1] - 1, -1, -1):
        terms.append(weight[:, k] * infonce(torch.logsumexp(later, dim=1) - scores[:, k]))
        later = torch.cat([later, scores[:, k, None]], dim=1)
    return torch.stack(terms).sum(0)


def _check_embeddings(query: Any, passages: Any) -> None:
    checks.embeddings("query", query, 2, "(N, D)")
    checks.embeddings("passages", passages, 2, "(M * group_size, D)")
    checks.same_kind({"query": query, "passages": passages})
    if passages.shape[1] != query.shape[1]:
        raise ValueError(f"passages must have {query.shape[1]} components as query has, got {passages.shape[1]}")


def _check_groups(
    query: Tensor, passages: Tensor, group_size: Any, offset: Any, target: Any, in_batch_negatives: bool
) -> None:
    n, rows = len(query), len(passages)
    checks.whole("group_size", group_size, 1)
    checks.whole("offset", offset, 0)
    if rows % group_size:
        raise ValueError(f"passages must have a multiple of group_size={group_size} rows, got {rows}")
    if offset % group_size:
        raise ValueError(f"offset must be a multiple of group_size={group_size}, got {offset}")
    if not in_batch_negatives and group_size == 1:
        raise ValueError("in_batch_negatives=False leaves no negatives in groups of one: group_size must be above 1")
    if target is not None:
        if not in_batch_negatives:
            raise ValueError("target says which passage is the positive among all: it needs in_batch_negatives=True")
        if offset:
            raise ValueError(f"target replaces offset: pass one of them, got offset={offset}")
        checks.target(target, query, rows, -100)
    elif offset + n * group_size > rows:
        raise ValueError(
            f"passages must have {offset + n * group_size} rows or more, offset={offset} and {n} groups of "
            f"{group_size}, got {rows}"
        )


def _check_distillation(
    query: Tensor, group_size: int, target: Any, in_batch_negatives: bool, teacher_scores: Any, distillation: Any
) -> None:
    if distillation is None:
        if teacher_scores is not None:
            raise ValueError(f"teacher_scores need a distillation: one of {', '.join(map(repr, DISTILLATIONS))}")
        return
    checks.one_of("distillation", distillation, DISTILLATIONS)
    if teacher_scores is None:
        raise ValueError(f"distillation={distillation!r} needs teacher_scores")
    if target is not None:
        raise ValueError("target cannot be used with a distillation: teacher_scores are of the groups from offset on")
    if distillation == "m3_kd_loss" and not in_batch_negatives:
        raise ValueError("distillation='m3_kd_loss' compares with all passages: it needs in_batch_negatives=True")
    checks.embeddings("teacher_scores", teacher_scores, 2, "(N, group_size)")
    if tuple(teacher_scores.shape) != (len(query), group_size):
        raise ValueError(
            f"teacher_scores must have shape {(len(query), group_size)}, got {tuple(teacher_scores.shape)}"
        )
    checks.on("teacher_scores", teacher_scores, query.device)


class GroupedInfoNCELoss(ContrastiveLoss):
    """InfoNCE over groups of a positive and its hard negatives, as a module, perhaps with a teacher's scores.

    The function `grouped_info_nce` has the formulas.

    Args:
        group_size: passages per query, the positive first among them.
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        normalize: divide every row by its norm first, so that scores are cosines.
        in_batch_negatives: whether the passages of other queries are negatives too.
        reduction: "mean", "sum" or "none" (one value per query).
        distillation: what `teacher_scores` are used for, "kl_div" or "m3_kd_loss" of FlagEmbedding; None: no teacher.
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
        >>> loss = GroupedInfoNCELoss(group_size=8)
        >>> query, passages = torch.randn(32, 128, requires_grad=True), torch.randn(32 * 8, 128)
        >>> loss(query, passages).backward()
    """

    own = ("group_size", "in_batch_negatives", "distillation")

    def __init__(
        self,
        group_size: int,
        *,
        temperature: TemperatureLike = 0.02,
        normalize: bool = True,
        in_batch_negatives: bool = True,
        reduction: Reduction = "mean",
        distillation: Distillation | None = None,
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
        if distillation is not None:
            checks.one_of("distillation", distillation, DISTILLATIONS)
        checks.flags(in_batch_negatives=in_batch_negatives)
        self.group_size = checks.whole("group_size", group_size, 1)
        self.in_batch_negatives = in_batch_negatives
        self.distillation = distillation

    def check_record(self) -> None:
        if self.distillation == "m3_kd_loss":
            raise ValueError(
                "record keeps statistics of one softmax a row: distillation='m3_kd_loss' has one a passage"
            )

    def forward(
        self,
        query: Tensor,
        passages: Tensor,
        teacher_scores: Tensor | None = None,
        *,
        target: Tensor | None = None,
        offset: int = 0,
        key_bias: Tensor | None = None,
        positive_bias: bool = True,
    ) -> Tensor:
        """Return the loss of (N, D) queries and (M G, D) passages, with a distillation of (N, G) `teacher_scores`."""
        return grouped_info_nce(
            query, passages, temperature=self.temperature, target=target, offset=offset, key_bias=key_bias,
            positive_bias=positive_bias, teacher_scores=teacher_scores, **self.options,
        )  # fmt: skip
