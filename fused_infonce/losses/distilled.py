"""InfoNCE with the soft targets of a teacher, from its scores or from its embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import BackendName, Options, Reduction
from ..backends.contract import KeySet, Problem, RowStatistics, Statistics, Upstream
from ..backends.precision import all_wide
from ..backends.row_losses import infonce
from ..compose.arguments import call_options, temperature_of
from ..compose.reduction import reduced_rows
from ..compose.rows import dots, unit
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss

Objective = Literal["cross_entropy", "kl_div"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


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
        temperature_squared: multiply soft_i by t_i^2, so that the size of its gradient depends less on t. No gradient
            flows through the factor, which would make a learned temperature vanish.
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
    checks.one_of("objective", objective, OBJECTIVES)
    alpha = checks.fraction("alpha", alpha)
    options = call_options(backend, workspace_limit, reduction)
    _check(query, key, symmetric, target, alpha)
    teacher = _checked_teacher(query, key, teacher_query, teacher_key, teacher_scores)
    n, m = len(query), len(key)
    t = temperature_of(temperature, query)
    weight = checks.row_weight(weight, query, t.values.dtype)
    if teacher_temperature is None:
        teacher_temperature = temperature if teacher_scores is None else 1.0
    teacher_t = temperature_of(teacher_temperature, query)
    teacher_t = teacher_t._replace(values=teacher_t.values.detach())

    # Any column y may be the pivot of  soft_i = log(1 + exp(neg_i - s_iy)) + sum_{j != y} T_ij (s_iy - s_ij).
    # Where it holds most of both distributions no digits are lost
    pivot = None if target is None else checks.target(target, query, m, ignore_index)
    if pivot is None and n != m:
        pivot = query.new_zeros(n, dtype=torch.int64) if teacher_scores is None else teacher[0].argmax(1)
    (query, key), context = all_wide([query, key])  # rows of two parts, whose 16-bit gradients are rounded once
    problem = Problem(KeySet(query), (KeySet(key),), t, pivot, columns=symmetric, normalize=normalize)
    with context:
        students = [rows for rows in contrast.statistics(problem, options) if rows is not None]
    with torch.autocast(query.device.type, enabled=False):
        x, y = unit(query, normalize, t.values.dtype), unit(key, normalize, t.values.dtype)
        keys = [y, x][: len(students)]
        if teacher_scores is not None:
            teachers = _of_scores(teacher[0].to(x.dtype), teacher_t.values, pivot, keys)
        else:
            rows = [KeySet(z.to(x.dtype)) for z in teacher]
            taught = Problem(
                rows[0], (rows[1],), teacher_t, pivot, columns=symmetric, normalize=normalize_teacher
            )  # fmt: skip
            teachers = _of_embeddings(taught, keys, options)
        losses = []
        for student, soft_targets, rows_seen in zip(students, teachers, (x, y), strict=False):
            hard = infonce(student.neg - student.pos)
            mean = dots(rows_seen, soft_targets.mixture) / t.values
            soft = _cross_entropy(hard, student.pos, soft_targets.others, mean)
            soft = soft - soft_targets.entropy if objective == "kl_div" else soft
            soft = t.values.detach() ** 2 * soft if temperature_squared else soft
            losses.append(soft if alpha == 1 else alpha * soft + (1 - alpha) * hard)
        return reduced_rows(torch.stack(losses).mean(0), problem, reduction, weight)


class SoftTargets(NamedTuple):
    """T (N, M) of one direction, with the pivot y of each row."""

    others: Tensor  # (N,): sum_{j != y} T_ij
    mixture: Tensor  # (N, D): sum_{j != y} T_ij y_j, differentiable in the keys y_j as the logits see them
    entropy: Tensor  # (N,)


def _cross_entropy(hard: Tensor, pos: Tensor, others: Tensor, mean: Tensor) -> Tensor:
    """Compute `log(1 + exp(neg_i - s_iy)) + sum_{j != y} T_ij (s_iy - s_ij)`; mean_i = sum_{j != y} T_ij s_ij."""
    return hard + (others * pos - mean)


def _of_scores(scores: Tensor, t: Tensor, pivot: Tensor | None, keys: list[Tensor]) -> list[SoftTargets]:
    """Return the soft targets of dense scores, against each of `keys`: the keys, and perhaps the queries."""
    found = []
    for z, y in zip((scores, scores.T), keys, strict=False):
        targets = torch.softmax(z / t[:, None], dim=1)
        entropy = torch.special.entr(targets).sum(1)
        index = torch.arange(len(z), device=z.device) if pivot is None else pivot
        if targets.numel():
            targets = targets.scatter_(1, index.clamp(0, z.shape[1] - 1)[:, None], 0.0)
        found.append(SoftTargets(targets.sum(1), targets @ y, entropy))
    return found


def _of_embeddings(problem: Problem, keys: list[Tensor], options: Options) -> list[SoftTargets]:
    """Return the soft targets of a teacher's embeddings, against the keys and, where `columns` ask, the other way."""
    with torch.no_grad():
        rows, columns = contrast.statistics(problem, options)
    found = []
    for p, stats, y in ((problem, rows, keys[0]), (problem.swapped(), columns, keys[-1])):
        if stats is None:
            continue
        unit_problem = _unit_problem(p)
        t, others = p.temperature.values, torch.sigmoid(stats.neg - stats.pos)
        own, mixture = _mixtures(unit_problem, options, stats, others, y)
        mean = dots(unit_problem.query.rows, own.detach()) / t
        entropy = _cross_entropy(infonce(stats.neg - stats.pos), stats.pos, others, mean)
        found.append(SoftTargets(others, mixture, entropy))
    return found


def _unit_problem(problem: Problem) -> Problem:
    """Return one direction over rows as the logits see them, which leaves the logits as they are."""
    query, key = (KeySet(unit(s.rows, problem.normalize, s.rows.dtype)) for s in (problem.query, problem.keys[0]))
    return replace(problem, query=query, keys=(key,), normalize=False, columns=False)


def _mixtures(
    problem: Problem, options: Options, stats: RowStatistics, weight: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `weight_i sum_j p_ij k_j` and `weight_i sum_j p_ij y_j` over the negatives, differentiable in y (M, D)."""
    if options.backend == "reference":  # whose gradients are differentiable
        mixtures = _gradients(problem, y.new_zeros(len(weight), y.shape[1]), y, options, stats, weight, of=0)
    else:
        mixtures = _Mixtures.apply(problem, options, stats, weight, y)
    own, mixture = mixtures.split([problem.keys[0].rows.shape[1], y.shape[1]], dim=1)
    return own, mixture


class _Mixtures(torch.autograd.Function):
    """`weight_i sum_j p_ij [k_j | y_j]`, (N, D' + D), over the negatives j of a problem; differentiable in y (M, D).

    The backends make them as gradients of `sum_i t_i weight_i neg_i`. Over longer rows that leave the logits alone,

        queries [q_i | 0], keys [k_j | y_j]      with respect to the queries it is the sum above
        queries [q_i | g_i], keys [k_j | 0]      with respect to the keys it ends in sum_i weight_i p_ij g_i
    """

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, options: Options, stats: RowStatistics, weight: Tensor, y: Tensor
    ) -> Tensor:
        ctx.problem, ctx.options = problem.with_tensors([None] * len(problem.tensors())), options
        ctx.save_for_backward(weight, *stats, *problem.tensors())
        return _gradients(problem, y.new_zeros(len(weight), y.shape[1]), y, options, stats, weight, of=0)

    @staticmethod
    @contrast.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        weight, *tensors = ctx.saved_tensors
        width = len(RowStatistics._fields)
        stats, problem = RowStatistics(*tensors[:width]), ctx.problem.with_tensors(tensors[width:])
        first = problem.keys[0].rows.shape[1]
        g = upstream[:, first:]
        none = g.new_zeros(len(problem.keys[0].rows), g.shape[1])
        grad = _gradients(problem, g, none, ctx.options, stats, weight, of=1)
        return None, None, None, None, grad[:, first:]


def _gradients(
    problem: Problem, left: Tensor, right: Tensor, options: Options, stats: RowStatistics, weight: Tensor, of: int
) -> Tensor:
    """Return those of `sum_i t_i weight_i neg_i` with respect to [query | left], if `of` is 0, or [key | right]."""
    query, key = torch.cat([problem.query.rows, left], 1), torch.cat([problem.keys[0].rows, right], 1)
    problem = replace(problem, query=KeySet(query), keys=(KeySet(key),))
    upstream = Upstream(torch.zeros_like(weight), weight * problem.temperature.values)
    dtypes = [weight.dtype if i == of else None for i in (0, 1)]
    grad = contrast.gradients(problem, options, Statistics(stats), upstream, dtypes)[of]
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
    """Return the two embeddings or the scores, without a gradient."""
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


class DistillationLoss(ContrastiveLoss):
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

    shown = ("teacher_temperature", "objective", "alpha", "symmetric")

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
    ):
        super().__init__(
            temperature, learnable_temperature, max_logit_scale, reduction, normalize, backend, workspace_limit
        )
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
