"""InfoNCE with the soft targets of a teacher, from its scores or from its embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import BackendName, Reduction
from ..backends.contract import KeySet, Problem, Temperature
from ..backends.precision import accumulator, without_autocast
from ..backends.row_losses import infonce
from ..compose.across import blocked
from ..compose.arguments import call_options, temperature_of
from ..compose.reduction import reduced_rows
from ..compose.rows import dots, unit
from ..compose.teacher import favourites, taught, teachers_of
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss

Objective = Literal["cross_entropy", "kl_div"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@together
def distilled_info_nce(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor | None = None,
    teacher_key: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    *,
    teacher_scores: Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    objective: Objective = "cross_entropy",
    alpha: float = 1.0,
    temperature_squared: bool = False,
    symmetric: bool = False,
    normalize: bool = True,
    normalize_teacher: bool = True,
    ignore_index: int = -100,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """InfoNCE with a teacher's similarities as soft targets, without the N x M logits of student or teacher.

        loss_i = alpha soft_i + (1 - alpha) hard_i,    s_ij = cos(q_i, k_j) / t_i
        soft_i = -sum_j T_ij log( exp(s_ij) / sum_l exp(s_il) ),    T_ij = exp(z_ij) / sum_l exp(z_il)
        hard_i = -log( exp(s_i,y) / sum_l exp(s_il) )

    where z_ij = cos(teacher_query_i, teacher_key_j) / t'_i, or teacher_scores_ij / t'_i. "kl_div" subtracts the
    entropy of T_i from soft_i, which leaves its gradient as it is. With `symmetric`, where the pair i, i has little of
    T_i's mass, a small divergence has the absolute error of the student's logit, eps / t. The teacher, its temperature
    included, gets no gradient.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        key: (M, D).
        teacher_query, teacher_key: (N, D') and (M, D') embeddings of the same rows; floating, of any dtypes.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per row; gradients
            flow to tensors.
        reduction: "mean", "sum" or "none" (one value per query).
        teacher_scores: (N, M) floating, in place of the embeddings, as a cross-encoder gives them. They are saved for
            the backward; their softmax is made for some rows at a time.
        teacher_temperature: t', a positive number or a tensor, shaped as `temperature`. None: `temperature` for
            embeddings, 1 for scores.
        objective: "cross_entropy" or "kl_div".
        alpha: in [0, 1]. Below 1 the rows need labels: `target`, or N = M.
        temperature_squared: multiply soft_i by t_i^2, so that the size of its gradient depends less on t. No gradient
            flows through the factor, which would make a learned temperature vanish.
        symmetric: take the mean with the loss of the keys against the queries, whose soft targets are the softmax of
            the teacher's similarities over the queries. Needs N = M and no `target`; key j has the temperatures of row
            j.
        normalize: divide every row of query and key by max(norm, 1e-12) first.
        normalize_teacher: divide every row of the teacher's embeddings by max(norm, 1e-12) first.
        target: (N,) integer rows y of `key`; rows with `ignore_index` count neither in the loss nor in the mean. None:
            row i, if N = M.
        ignore_index: a row with this target does not count.
        weight: (N,) w, the weights of the rows, not negative: "none" gives w_i loss_i, "sum" the sum of these, "mean"
            that sum over the sum of w.
        backend: of the student: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
            The teacher's part is made by PyTorch for some rows at a time, within the limit; its embeddings are held
            once in the dtype of the statistics, float32 for 16-bit inputs, in which their products are made.
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32. A gradient is the student's part less
        the teacher's; where the two nearly agree, 16-bit rounding is large beside their difference.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: Hinton et al. 2015, arXiv:1503.02531 (`alpha`, `temperature_squared`); with `symmetric` this is the
    distillation of open_clip's `DistillClipLoss` and the contrastive relational distillation of CLIP-KD (Yang et al.
    2024, arXiv:2307.12732).
    """
    checks.one_of("objective", objective, OBJECTIVES)
    alpha = checks.fraction("alpha", alpha)
    options = call_options(backend, workspace_limit, reduction, distributed)
    _check(query, key, symmetric, target, alpha)
    teacher = _checked_teacher(query, key, teacher_query, teacher_key, teacher_scores)
    if options.call is not None and teacher_scores is not None:
        raise ValueError(
            "teacher_scores are of this process's keys: over several processes pass a teacher's embeddings"
        )
    if options.call is not None:
        options.call.noted += f" teacher {[(x.shape[1], x.dtype) for x in teacher]};"
    n, m = len(query), len(key)
    t = temperature_of(gather.shared(options.call, temperature), query)
    weight = checks.row_weight(weight, query, t.dtype)
    if teacher_temperature is None:
        teacher_temperature = temperature if teacher_scores is None else 1.0
    teacher_t = temperature_of(teacher_temperature, query, "teacher_temperature")
    teacher_t = Temperature(teacher_t.values.detach(), teacher_t.lowest)

    labels = None if target is None else checks.target(target, query, m, ignore_index)
    # Any column y may be the pivot of  soft_i = log(1 + exp(neg_i - s_iy)) + sum_{j != y} T_ij (s_iy - s_ij).
    # Where it holds most of both distributions no digits are lost; but the hard loss and columns need the label
    diagonal = labels is None and n == m and options.call is None  # elsewhere other ranks may have more keys
    own = diagonal and objective == "cross_entropy"  # and a diagonal takes less time
    free = alpha == 1 and not symmetric and not own
    ignored = labels
    if labels is None and free and not diagonal:
        labels = torch.zeros(n, dtype=torch.int64, device=query.device)  # in place of which the favourite comes
    problem = Problem(KeySet(query), (KeySet(key),), t, labels, columns=symmetric, normalize=normalize)
    problem, context = blocked(problem, options)  # rows of two parts, whose 16-bit gradients are rounded once
    divergence = objective == "kl_div"
    with without_autocast(query.device.type):
        teachers = iter(teachers_of(problem, teacher, normalize_teacher, teacher_t.values, options))
    losses = []
    for block_of in problem.blocks():
        with without_autocast(query.device.type):
            block, directions = taught(block_of(), teachers, free, divergence, options)
            if free:
                pivot, given = directions[0][1].pivot, None if ignored is None else block.target
                block = problem = replace(block, target=favourites(pivot, given, len(block.keys[0].rows)))
        with context:
            students = [side for side in contrast.statistics(block, options) if side is not None]
        with without_autocast(query.device.type):
            for student, (x, targets) in zip(students, directions, strict=True):
                hard = infonce(student.neg - student.pos)
                soft = hard + (targets.others * student.pos - dots(x, targets.mixture) / t.values)
                soft = soft - targets.entropy if divergence else soft
                soft = t.values.detach() ** 2 * soft if temperature_squared else soft
                losses.append(soft if alpha == 1 else alpha * soft + (1 - alpha) * hard)
    with without_autocast(query.device.type):
        return reduced_rows(torch.stack(losses).mean(0), problem, options, weight)


@together
def score_std(
    query: Tensor,
    key: Tensor,
    *,
    normalize: bool = True,
    correction: int = 1,
    distributed: DistributedLike = False,
) -> Tensor:
    """Return the standard deviation of every query's scores over all keys, without the N x M scores.

        std_i = ( sum_j (c_ij - mean_l c_il)^2 / (M - correction) )^(1/2) = ( x_i^T C x_i )^(1/2),    c_ij = x_i . y_j

    where C (D, D) is the covariance of the keys: O((N + M) D^2) and D x D numbers. It is `(x @ y.T).std(1)`, and
    differentiable in both. Logits that are standardised, as in logit-standardised distillation, are scores at the
    temperature `tau * score_std(...)`, since a softmax does not see their mean:

        distilled_info_nce(
            query, key, teacher_query, teacher_key, temperature=tau * score_std(query, key),
            teacher_temperature=tau * score_std(teacher_query, teacher_key), objective="kl_div",
        )

    A teacher's scores have `teacher_scores.std(1)`. With `symmetric`, column j has that of row j: for standard
    deviations of its own add the losses of the two directions instead.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        key: (M, D), more than `correction`.
        normalize: divide every row by max(norm, 1e-12) first, so that scores are cosines.
        correction: what is taken off the number of keys, as in `torch.std`; the authors' code has 1.
        distributed: whose keys are scored: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        (N,): float64 for float64 inputs, else float32. A query whose scores are all alike has 0, or a number of the
        size of their rounding.

    Raises:
        ValueError: shapes, devices, values, too few keys. TypeError: types, dtypes.

    References: Sun et al. 2024, arXiv:2403.01427; https://github.com/sunshangquan/logit-standardization-KD.
    """
    call = call_options("auto", None, distributed=distributed).call
    _check(query, key, False, None, 1.0)
    checks.whole("correction", correction, 0)
    if call is not None:
        said = f"(M, {key.shape[1]}) keys of scores, {key.dtype}, correction={correction}"
        (counts,) = call.counts(said, "", [len(key)])
        (key,) = gather.gather(call, [key], [counts])
    if len(key) <= correction:
        raise ValueError(f"key must have more rows than the correction, {correction}, got {len(key)}")
    acc = accumulator(query.dtype)
    with without_autocast(query.device.type):
        x, y = unit(query, normalize, acc), unit(key, normalize, acc)
        centred = y - y.mean(0)
        covariance = centred.T @ centred / (len(y) - correction)
        variance = dots(x @ covariance, x)
        none = variance <= 0  # where the root's slope is infinite; rounding may give less than 0
        return variance.masked_fill(none, 1).sqrt().masked_fill(none, 0)


def _check(query: Any, key: Any, symmetric: bool, target: Any, alpha: float) -> None:
    checks.embeddings("query", query, 2, "(N, D)")
    checks.embeddings("key", key, 2, "(M, D)")
    checks.same_kind({"query": query, "key": key})
    n, m = len(query), len(key)
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key must have {query.shape[1]} components as query has, got {key.shape[1]}")
    if n and not m:
        raise ValueError("key must have at least one row, got none")
    if symmetric and target is not None:
        raise ValueError("symmetric=True pairs query i with key i: it cannot be used with target")
    if symmetric and n != m:
        raise ValueError(f"symmetric=True pairs query i with key i: key must have {n} rows as query has, got {m}")
    if alpha < 1 and target is None and n != m:
        raise ValueError(f"alpha={alpha} needs labels: pass target, or as many keys as queries; got {m} and {n}")


def _checked_teacher(
    query: Tensor, key: Tensor, teacher_query: Any, teacher_key: Any, teacher_scores: Any
) -> list[Tensor]:
    """Return the teacher's two embeddings, or its scores, checked and detached."""
    n, m = len(query), len(key)
    if (teacher_query is None) != (teacher_key is None) or (teacher_query is None) == (teacher_scores is None):
        raise ValueError("a teacher is teacher_query and teacher_key, or teacher_scores: pass the two or the one")
    if teacher_scores is not None:
        shapes = {"teacher_scores": (teacher_scores, n, m)}
        checks.embeddings("teacher_scores", teacher_scores, 2, "(N, M)")
    else:
        checks.embeddings("teacher_query", teacher_query, 2, "(N, D')")
        checks.embeddings("teacher_key", teacher_key, 2, "(M, D')")
        width = teacher_query.shape[1]
        shapes = {"teacher_query": (teacher_query, n, width), "teacher_key": (teacher_key, m, width)}
    for name, (value, *shape) in shapes.items():
        if list(value.shape) != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        checks.on(name, value, query.device)
    return [value.detach() for value, *_ in shapes.values()]


class DistillationLoss(ContrastiveLoss):
    """InfoNCE with a teacher's soft targets, as a module.

    The function `distilled_info_nce` has the formula.

    Args:
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per query).
        teacher_temperature: the teacher's, a positive number or a tensor; None: `temperature` for a teacher's
            embeddings, 1 for its scores.
        objective: "cross_entropy", or "kl_div", which subtracts the entropy of the soft targets.
        alpha: the share of the soft targets, in [0, 1]; the rest is InfoNCE with labels.
        temperature_squared: multiply the soft part by t^2, so that its gradient depends less on t.
        symmetric: take the mean with the loss of the keys against the queries.
        normalize: divide every row by its norm first, so that scores are cosines.
        normalize_teacher: divide every row of the teacher's embeddings by its norm first.
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
        >>> loss = DistillationLoss(temperature=0.05, symmetric=True)
        >>> images, texts = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> teacher_images, teacher_texts = torch.randn(32, 256), torch.randn(32, 256)
        >>> loss(images, texts, teacher_images, teacher_texts).backward()
    """

    own = (
        "teacher_temperature", "objective", "alpha", "temperature_squared", "symmetric", "normalize_teacher",
        "ignore_index",
    )  # fmt: skip

    def __init__(
        self,
        temperature: TemperatureLike = 0.1,
        *,
        reduction: Reduction = "mean",
        teacher_temperature: float | Tensor | None = None,
        objective: Objective = "cross_entropy",
        alpha: float = 1.0,
        temperature_squared: bool = False,
        symmetric: bool = False,
        normalize: bool = True,
        normalize_teacher: bool = True,
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
        checks.one_of("objective", objective, OBJECTIVES)
        checks.flags(temperature_squared=temperature_squared, symmetric=symmetric, normalize_teacher=normalize_teacher)
        checks.whole("ignore_index", ignore_index, -(2**63))
        if teacher_temperature is not None:
            checks.number_or_tensor("teacher_temperature", teacher_temperature)
        if isinstance(teacher_temperature, Tensor) and teacher_temperature.requires_grad:
            raise ValueError("teacher_temperature gets no gradient and cannot be trained: pass its .detach()")
        self.teacher_temperature = teacher_temperature
        self.objective = objective
        self.alpha = checks.fraction("alpha", alpha)
        self.temperature_squared = temperature_squared
        self.symmetric = symmetric
        self.normalize_teacher = normalize_teacher
        self.ignore_index = ignore_index

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        teacher_query: Tensor | None = None,
        teacher_key: Tensor | None = None,
        *,
        teacher_scores: Tensor | None = None,
        target: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a student's embeddings, given a teacher's embeddings or `teacher_scores`."""
        return distilled_info_nce(
            query, key, teacher_query, teacher_key, self.temperature, teacher_scores=teacher_scores, target=target,
            weight=weight, **self.options,
        )  # fmt: skip
