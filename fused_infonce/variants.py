"""Decoupled, debiased and distilled losses as modules: they hold options and call `functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import functional, validation
from .functional.debiased import prior
from .functional.distillation import OBJECTIVES
from .losses import WithTemperature

NEGATIVES = ("views", "keys")


class PairLoss(WithTemperature):
    """What DCLLoss and DebiasedLoss share.

    Args:
        negatives: "views" (the two inputs are views of a batch, and the rows of both views of other samples are the
            negatives) or "keys" (queries against keys, as in `functional.info_nce`).
        symmetric, negative_mode, in_batch_negatives: as in `functional.info_nce`, with negatives="keys".
    """

    def __init__(
        self, temperature: float | Tensor, reduction: str, negatives: str, symmetric: bool, negative_mode: str,
        in_batch_negatives: bool | None, normalize: bool, backend: str, workspace_limit: int | None,
    ):  # fmt: skip
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        validation.one_of("negatives", negatives, NEGATIVES)
        validation.one_of("negative_mode", negative_mode, validation.NEGATIVE_MODES)
        if negatives == "views" and (symmetric or negative_mode != "unpaired" or in_batch_negatives is not None):
            raise ValueError("symmetric, negative_mode and in_batch_negatives are options of negatives='keys'")
        self.negatives = negatives
        self.symmetric = symmetric
        self.negative_mode = negative_mode
        self.in_batch_negatives = in_batch_negatives

    def between(
        self, views: Callable[..., Tensor], keys: Callable[..., Tensor], query: Tensor, positive_key: Tensor,
        negative_keys: Tensor | None, rows: dict[str, Tensor | None], **own: Any,
    ) -> Tensor:  # fmt: skip
        """The one or the other function of these inputs; `rows` are those that only `keys` takes."""
        if self.negatives == "keys":
            return keys(
                query, positive_key, negative_keys, self.temperature, symmetric=self.symmetric,
                negative_mode=self.negative_mode, in_batch_negatives=self.in_batch_negatives, **rows, **own,
                **self.options,
            )  # fmt: skip
        for name, value in {"negative_keys": negative_keys, **rows}.items():
            if value is not None:
                raise ValueError(f"{name} needs negatives='keys': those of two views are their other rows")
        return views(query, positive_key, self.temperature, **own, **self.options)


class DCLLoss(PairLoss):
    """Decoupled contrastive loss; see `functional.decoupled_nt_xent` and `functional.decoupled_info_nce`.

    Args:
        sigma: weigh the positives by `functional.von_mises_fisher_weight` (DCLW, where it is 0.5). None: no weights.
        negatives: "views" (the two inputs are views of a batch, and the rows of both views of other samples are the
            negatives) or "keys" (queries against keys, as in `functional.info_nce`).
        symmetric, negative_mode, in_batch_negatives: as in `functional.info_nce`, with negatives="keys".
        temperature, reduction, normalize, backend, workspace_limit: as in those functions.

    Example:
        >>> loss = DCLLoss(temperature=0.1)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    shown = ("temperature", "sigma", "negatives", "reduction")

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        *,
        sigma: float | None = None,
        negatives: str = "views",
        symmetric: bool = False,
        negative_mode: str = "unpaired",
        in_batch_negatives: bool | None = None,
        normalize: bool = True,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(
            temperature, reduction, negatives, symmetric, negative_mode, in_batch_negatives, normalize, backend,
            workspace_limit,
        )  # fmt: skip
        self.sigma = None if sigma is None else validation.positive_float("sigma", sigma)

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
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of two views, or of queries and keys; all but the first two and `positive_weight` are of keys."""
        if self.sigma is not None:
            if positive_weight is not None or target is not None:
                what = "target" if positive_weight is None else "positive_weight"
                raise ValueError(f"sigma weighs row i by its likeness to key i: it cannot be used with {what}")
            positive_weight = functional.von_mises_fisher_weight(
                query, positive_key, self.sigma, normalize=self.normalize
            )
            if self.negatives == "views":
                positive_weight = positive_weight.repeat(2)
        rows = {
            "target": target, "query_ids": query_ids, "key_ids": key_ids, "negative_ids": negative_ids,
            "weight": weight,
        }  # fmt: skip
        return self.between(
            functional.decoupled_nt_xent, functional.decoupled_info_nce, query, positive_key, negative_keys, rows,
            positive_weight=positive_weight,
        )  # fmt: skip


class DebiasedLoss(PairLoss):
    """Debiased contrastive loss; see `functional.debiased_nt_xent` and `functional.debiased_info_nce`.

    Args:
        tau_plus: as in those functions.
        negatives: "views" (the two inputs are views of a batch, and the rows of both views of other samples are the
            negatives) or "keys" (queries against keys, as in `functional.info_nce`).
        symmetric, negative_mode, in_batch_negatives: as in `functional.info_nce`, with negatives="keys".
        temperature, reduction, backend, workspace_limit: as in those functions.

    Example:
        >>> loss = DebiasedLoss(temperature=0.5, tau_plus=0.1)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)).backward()
    """

    shown = ("temperature", "tau_plus", "negatives", "reduction")

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        reduction: str = "mean",
        *,
        tau_plus: float = 0.1,
        negatives: str = "views",
        symmetric: bool = False,
        negative_mode: str = "unpaired",
        in_batch_negatives: bool | None = None,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(
            temperature, reduction, negatives, symmetric, negative_mode, in_batch_negatives, True, backend,
            workspace_limit,
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
        """The loss of two views, or of queries and keys; `tau_plus` per row replaces the module's for this call. All
        but it and the first two are of keys."""
        rows = {
            "target": target, "query_ids": query_ids, "key_ids": key_ids, "negative_ids": negative_ids,
            "weight": weight,
        }  # fmt: skip
        return self.between(
            functional.debiased_nt_xent, functional.debiased_info_nce, query, positive_key, negative_keys, rows,
            tau_plus=self.tau_plus if tau_plus is None else tau_plus,
        )  # fmt: skip


class DistillationLoss(WithTemperature):
    """InfoNCE with a teacher's soft targets; see `functional.distilled_info_nce`.

    Args:
        temperature, reduction, teacher_temperature, objective, alpha, temperature_squared, symmetric, normalize,
            normalize_teacher, ignore_index, backend, workspace_limit: as in `functional.distilled_info_nce`.

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
        validation.one_of("objective", objective, OBJECTIVES)
        if not (teacher_temperature is None or isinstance(teacher_temperature, Tensor)):
            validation.positive_float("teacher_temperature", teacher_temperature)
        self.teacher_temperature = teacher_temperature
        self.objective = objective
        self.alpha = validation.fraction("alpha", alpha)
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
        return functional.distilled_info_nce(
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
