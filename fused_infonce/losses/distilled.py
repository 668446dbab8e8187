"""InfoNCE with the soft targets of a teacher, from its scores or from its embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends.contract import KEY, Problem, Statistics, Upstream, accumulator
from ..backends.row_losses import infonce
from ..compose.reduction import call_options, directions, dots, reduced_rows, unit, wide
from ..contrast import Options
from .base import WithTemperature

OBJECTIVES = ("cross_entropy", "kl_div")


def distilled_info_nce(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor | None = None,
    teacher_key: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    *,
    teacher_scores: Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    objective: str = "cross_entropy",
    alpha: float = 1.0,
    temperature_squared: bool = False,
    symmetric: bool = False,
    normalize: bool = True,
    normalize_teacher: bool = True,
    ignore_index: int = -100,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """InfoNCE with a teacher's similarities as soft targets, without the N x M logits of either.

        loss_i = alpha soft_i + (1 - alpha) hard_i,    s_ij = cos(q_i, k_j) / t_i
        soft_i = -sum_j T_ij log( exp(s_ij) / sum_l exp(s_il) ),    T_ij = exp(z_ij) / sum_l exp(z_il)
        hard_i = -log( exp(s_i,y) / sum_l exp(s_il) )

    where z_ij = cos(teacher_query_i, teacher_key_j) / t'_i, or teacher_scores_ij / t'_i. "kl_div" subtracts the
    entropy of T_i from soft_i, which leaves its gradient as it is; where the pair i, i has little of T_i's mass, a
    small divergence has the absolute error of a logit, eps / t. The teacher, its temperature included, gets no
    gradient.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        key: (M, D).
        teacher_query, teacher_key: (N, D') and (M, D') embeddings of the same rows; floating, of any dtypes.
        temperature: as in `info_nce`.
        reduction: "mean", "sum" or "none" (one value per query).
        teacher_scores: (N, M) floating, in place of the embeddings, as a cross-encoder gives them. Their softmax is
            held once or twice in float32.
        teacher_temperature: t', as `temperature`. None: `temperature` for embeddings, 1 for scores.
        objective: "cross_entropy" or "kl_div".
        alpha: in [0, 1]. Below 1 the rows need labels: `target`, or N = M.
        temperature_squared: multiply soft_i by t_i^2, so that the size of its gradient depends less on t.
        symmetric: the mean of this loss and of that of the keys against the queries, whose soft targets are the softmax
            of the teacher's similarities over the queries. Needs N = M and no `target`; key j has the temperatures of
            row j.
        normalize: divide every row of query and key by max(norm, 1e-12) first.
        normalize_teacher: the same for the teacher's embeddings.
        target: (N,) integer rows y of `key`; rows with `ignore_index` count neither in the loss nor in the mean. None:
            row i, if N = M.
        ignore_index, weight, workspace_limit: as in `info_nce`.
        backend: as in `info_nce`. The teacher's embeddings are held once in the dtype of the statistics, float32 for
            16-bit inputs, in which their products are made; and so are rows of length D + D' for a while.

    Returns: as `info_nce`. A gradient is the student's part less the teacher's, and where they nearly agree the 16-bit
    rounding of the former is larger beside their difference.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: Hinton et al. 2015, arXiv:1503.02531 (`alpha`, `temperature_squared`); with `symmetric` this is the
    distillation of open_clip's `DistillClipLoss` and the contrastive relational distillation of CLIP-KD (Yang et al.
    2024, arXiv:2307.12732).
    """
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    checks.one_of("backend", backend, checks.BACKENDS)
    checks.one_of("objective", objective, OBJECTIVES)
    alpha = checks.fraction("alpha", alpha)
    _check(query, key, symmetric, target, alpha)
    teacher = _checked_teacher(query, key, teacher_query, teacher_key, teacher_scores)
    n, m, device = len(query), len(key), query.device
    acc = accumulator(contrast.compute_dtype([query]))
    t = checks.temperature(temperature, n, acc, device)
    weight = checks.row_weight(weight, t, query)
    if teacher_temperature is None:
        teacher_temperature = temperature if teacher_scores is None else 1.0
    teacher_t = checks.temperature(teacher_temperature, n, acc, device).detach()

    # Any column y may be the pivot of  soft_i = log(1 + exp(neg_i - s_iy)) + sum_{j != y} T_ij (s_iy - s_ij).
    # Where it holds most of both distributions no digits are lost
    pivot = None if target is None else checks.target(target, n, m, ignore_index, device)
    if pivot is None and n != m:
        pivot = query.new_zeros(n, dtype=torch.int64) if teacher_scores is None else teacher[0].argmax(1)
    (query, context), (key, _) = wide(query), wide(key)  # rows of two parts, whose 16-bit gradients are rounded once
    problem = Problem(query, key, t, pivot, columns=symmetric, normalize=normalize)
    with context:
        options = call_options(backend, workspace_limit, temperature, normalize)
        students = directions(problem, options, symmetric)
    with torch.autocast(device.type, enabled=False):
        x, y = unit(query, normalize, acc), unit(key, normalize, acc)
        keys = [y, x][: len(students)]
        if teacher_scores is not None:
            teachers = _of_scores(teacher[0].to(acc), teacher_t, pivot, keys)
        else:
            u, v = (unit(rows, normalize_teacher, acc) for rows in teacher)
            options = call_options(backend, workspace_limit, teacher_temperature, normalize_teacher)
            teachers = _of_embeddings(u, v, teacher_t, pivot, keys, options)
        losses = []
        for student, soft_targets, rows in zip(students, teachers, (x, y), strict=False):
            hard = infonce(student.neg - student.pos)
            mean = dots(rows, soft_targets.mixture) / t
            soft = _cross_entropy(hard, student.pos, soft_targets.others, mean)
            soft = soft - soft_targets.entropy if objective == "kl_div" else soft
            soft = t**2 * soft if temperature_squared else soft
            losses.append(soft if alpha == 1 else alpha * soft + (1 - alpha) * hard)
        return reduced_rows(torch.stack(losses).mean(0), problem, reduction, weight)


class SoftTargets(NamedTuple):
    """T (N, M) of one direction, with the pivot y of each row."""

    others: Tensor  # (N,): sum_{j != y} T_ij
    mixture: Tensor  # (N, D): sum_{j != y} T_ij y_j, differentiable in the keys y_j as the logits see them
    entropy: Tensor  # (N,)


def _cross_entropy(hard: Tensor, pos: Tensor, others: Tensor, mean: Tensor) -> Tensor:
    """`log(1 + exp(neg_i - s_iy)) + sum_{j != y} T_ij (s_iy - s_ij)`; mean_i = sum_{j != y} T_ij s_ij."""
    return hard + (others * pos - mean)


def _of_scores(scores: Tensor, t: Tensor, pivot: Tensor | None, keys: list[Tensor]) -> list[SoftTargets]:
    """Of dense scores, against the keys and, where `keys` holds the queries too, the other way round."""
    found = []
    for z, y in zip((scores, scores.T), keys, strict=False):
        targets = torch.softmax(z / t[:, None], dim=1)
        entropy = torch.special.entr(targets).sum(1)
        index = torch.arange(len(z), device=z.device) if pivot is None else pivot
        if targets.numel():
            targets = targets.scatter_(1, index.clamp(0, z.shape[1] - 1)[:, None], 0.0)
        found.append(SoftTargets(targets.sum(1), targets @ y, entropy))
    return found


def _of_embeddings(
    query: Tensor, key: Tensor, t: Tensor, pivot: Tensor | None, keys: list[Tensor], options: Options
) -> list[SoftTargets]:
    """The same of a teacher's embeddings, as its logits see them."""
    if options.backend == "reference":
        return _of_scores(query @ key.T, t, pivot, keys)
    problem = Problem(query, key, t, pivot, columns=len(keys) > 1, normalize=False)
    with torch.no_grad():
        both = directions(problem, options, problem.columns)
    found = []
    for (p, pos, neg, softmax), y in zip(both, keys, strict=True):
        others = torch.sigmoid(neg - pos)
        mixtures = _Mixtures.apply(replace(p, columns=False), options, softmax, others, y)
        own, mixture = mixtures.split([p.key.shape[1], y.shape[1]], dim=1)
        mean = dots(p.query, own.detach()) / t
        found.append(SoftTargets(others, mixture, _cross_entropy(infonce(neg - pos), pos, others, mean)))
    return found


class _Mixtures(torch.autograd.Function):
    """`weight_i sum_j p_ij [k_j | y_j]`, (N, D' + D), over the negatives j of a problem; differentiable in y (M, D).

    The backends make them as gradients of `sum_i t_i weight_i neg_i`. Over longer rows that leave the logits alone,

        queries [q_i | 0], keys [k_j | y_j]      with respect to the queries it is the sum above
        queries [q_i | g_i], keys [k_j | 0]      with respect to the keys it ends in sum_i weight_i p_ij g_i
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, options: Options, softmax: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        ctx.problem, ctx.options = problem.with_tensors([None] * len(problem.tensors())), options
        ctx.save_for_backward(*problem.tensors(), softmax, weight)
        return _gradients(problem, y.new_zeros(len(weight), y.shape[1]), y, options, softmax, weight, of=0)

    @staticmethod
    @contrast.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        *tensors, softmax, weight = ctx.saved_tensors
        problem = ctx.problem.with_tensors(tensors)
        first = problem.key.shape[1]
        g = upstream[:, first:]
        grad = _gradients(problem, g, g.new_zeros(len(problem.key), g.shape[1]), ctx.options, softmax, weight, of=KEY)
        return None, None, None, None, grad[:, first:]


def _gradients(
    problem: Problem, left: Tensor, right: Tensor, options: Options, softmax: Tensor, weight: Tensor, of: int
) -> Tensor:
    """Of `sum_i t_i weight_i neg_i` with respect to [query | left], if `of` is 0, or [key | right]."""
    with contrast.products(softmax.device.type):
        query, key = torch.cat([problem.query, left], 1), torch.cat([problem.key, right], 1)
        problem = replace(problem, query=query, key=key)
        plan = contrast.make_plan(problem, options, reduced=False)
        zero, dtypes = torch.zeros_like(weight), [weight.dtype if i == of else None for i in (0, KEY)]
        upstream = Upstream(weight * problem.temperature, zero)
        grad = contrast.run_gradients(problem, plan, Statistics(zero, zero, zero, softmax), upstream, dtypes)[of]
    assert grad is not None
    return grad


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
    """The two embeddings or the scores, without a gradient."""
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
        if value.device != query.device:
            raise ValueError(f"{name} must be on {query.device} as query is, got {value.device}")
    return [value.detach() for value, *_ in shapes.values()]


class DistillationLoss(WithTemperature):
    """InfoNCE with a teacher's soft targets; see `distilled_info_nce`.

    Args:
        temperature, reduction, teacher_temperature, objective, alpha, temperature_squared, symmetric, normalize,
            normalize_teacher, ignore_index, backend, workspace_limit: as in `distilled_info_nce`.

    Example:
        >>> loss = DistillationLoss(temperature=0.05, symmetric=True)
        >>> images, texts = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> teacher_images, teacher_texts = torch.randn(32, 256), torch.randn(32, 256)
        >>> loss(images, texts, teacher_images, teacher_texts).backward()
    """

    shown = ("temperature", "teacher_temperature", "objective", "alpha", "symmetric", "reduction")

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        *,
        teacher_temperature: float | Tensor | None = None,
        objective: str = "cross_entropy",
        alpha: float = 1.0,
        temperature_squared: bool = False,
        symmetric: bool = False,
        normalize: bool = True,
        normalize_teacher: bool = True,
        ignore_index: int = -100,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        checks.one_of("objective", objective, OBJECTIVES)
        if not (teacher_temperature is None or isinstance(teacher_temperature, Tensor)):
            checks.positive_float("teacher_temperature", teacher_temperature)
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
        return distilled_info_nce(
            query,
            key,
            teacher_query,
            teacher_key,
            self.temperature,
            teacher_scores=teacher_scores,
            teacher_temperature=self.teacher_temperature,
            objective=self.objective,
            alpha=self.alpha,
            temperature_squared=self.temperature_squared,
            symmetric=self.symmetric,
            normalize_teacher=self.normalize_teacher,
            ignore_index=self.ignore_index,
            target=target,
            weight=weight,
            **self.options,
        )
