"""InfoNCE, the drop-in of info-nce-pytorch, and what plan a call of it has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, contrast
from ..backends import reference
from ..backends.plan import Plan
from ..compose.arguments import of_keys
from ..compose.reduction import reduced
from .base import ContrastiveLoss


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    symmetric: bool = False,
    normalize: bool = True,
    in_batch_negatives: bool | None = None,
    ignore_index: int = -100,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """InfoNCE between queries and keys, without the N x M logits.

        loss_i = -log( exp(s_i,y) / (exp(s_i,y) + sum_j exp(s_ij)) ),    s_ij = cos(q_i, k_j) / t_i

    over the negatives j of row i. The first six arguments are those of `info_nce` of info-nce-pytorch 0.1.4, with its
    order, defaults and values.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        positive_key: (N, D), row i the positive of query i; with `target`, (M, D).
        negative_keys: explicit negatives, (M', D) if `negative_mode` is "unpaired", (N, H, D) if "paired". None: the
            other rows of `positive_key` are the negatives.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per row; gradients
            flow to tensors. Values of tensors are checked on a CPU; on a GPU a bad one gives NaN.
        reduction: "mean", "sum" or "none" (one value per query).
        negative_mode: "unpaired" (negatives shared by all queries) or "paired" (each query its own).
        symmetric: the mean of this loss and of that of the keys against the queries, as CLIP has it. Needs N = M and no
            `target`. Explicit negatives enter the query direction only; column j has the temperature of row j.
        normalize: divide every row by max(norm, 1e-12), as `torch.nn.functional.normalize`; else s_ij = q_i.k_j / t_i.
        in_batch_negatives: whether the other rows of `positive_key` are negatives too. None: only if there are no
            `negative_keys`.
        ignore_index: rows with this target count neither in the loss nor in the mean.
        target: (N,) integer indices of each query's positive in `positive_key`. None: row i.
        query_ids, key_ids, negative_ids: (N,), (M,) and, as `negative_keys` without its last dimension, integer ids.
            `key_ids` alone: a negative with the id of the row's positive is left out (a duplicate document). With
            `query_ids`: every negative with the id of its query is left out (labels). The positive is always kept.
        weight: (N,) what each row counts for, not negative: "none" gives w_i loss_i, "sum" their sum, "mean" that over
            the sum of w, as in `torch.nn.functional.cross_entropy`. With `symmetric` of key i too.
        label_smoothing: eps, in [0, 1]: the label is (1 - eps) + eps / K at the positive and eps / K at the others of
            the K columns that are not left out, as in `torch.nn.functional.cross_entropy`.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 256 MiB elsewhere.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32. With no rows, or all ignored, "mean"
        is NaN and "sum" 0, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: van den Oord et al. 2018, arXiv:1807.03748; https://github.com/RElbers/info-nce-pytorch.
    """
    problem, options = of_keys(
        query, positive_key, negative_keys, temperature, reduction, negative_mode, symmetric=symmetric,
        normalize=normalize, in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target,
        query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids, backend=backend,
        workspace_limit=workspace_limit,
    )  # fmt: skip
    if weight is not None:
        weight = checks.row_weight(weight, problem.temperature, query)
    if label_smoothing != 0:
        label_smoothing = checks.fraction("label_smoothing", label_smoothing)
    if backend == "reference":
        return reference.info_nce(
            query, positive_key, negative_keys, problem.temperature, reduction, negative_mode, symmetric=symmetric,
            normalize=normalize, in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target,
            query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids, weight=weight,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    return reduced(problem, options, reduction, symmetric, weight, label_smoothing)


def explain(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    symmetric: bool = False,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Plan:
    """How `info_nce` would compute this very call, and why: a `Plan`, which prints as a sentence. Computes nothing.

    Takes what `info_nce` takes, and raises what it raises. Whether inputs require gradients matters.
    """
    if options.get("backend") == "reference":
        raise ValueError("backend='reference' has no plan: it holds the dense matrices")
    problem, settings = of_keys(
        query, positive_key, negative_keys, temperature, reduction, negative_mode, symmetric=symmetric, **options
    )
    checks.row_weight(weight, problem.temperature, query)
    checks.fraction("label_smoothing", label_smoothing)
    at_once = reduction != "none" and problem.columns == symmetric and not (weight is not None and weight.requires_grad)
    weighted = weight is not None or problem.target is not None
    return contrast.make_plan(problem, settings, reduced=at_once, weighted=weighted)


class FusedInfoNCELoss(ContrastiveLoss):
    """InfoNCE without the N x M logits; a drop-in for `InfoNCE` of info-nce-pytorch. See `info_nce`.

    Args:
        temperature, reduction, negative_mode, symmetric, normalize, in_batch_negatives, ignore_index,
            label_smoothing, backend, workspace_limit: as in `info_nce`.
        learnable_temperature: hold the 0-d float32 parameter `logit_scale = log(1 / temperature)`, as CLIP does
            (Radford et al. 2021, arXiv:2103.00020). Give `loss.parameters()` to the optimizer, without weight decay.
        max_logit_scale: with it, `clamp_logit_scale_()` keeps `1 / temperature` at or under this value (CLIP: 100).

    Example:
        >>> loss = FusedInfoNCELoss(temperature=0.02)
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss(query, key).backward()
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        symmetric: bool = False,
        normalize: bool = True,
        in_batch_negatives: bool | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        learnable_temperature: bool = False,
        max_logit_scale: float | None = None,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(reduction, normalize, backend, workspace_limit)
        checks.one_of("negative_mode", negative_mode, checks.NEGATIVE_MODES)
        if max_logit_scale is not None:
            checks.positive_float("max_logit_scale", max_logit_scale)
            if not learnable_temperature:
                raise ValueError("max_logit_scale bounds a learnable temperature: pass learnable_temperature=True")
        self.negative_mode = negative_mode
        self.symmetric = symmetric
        self.in_batch_negatives = in_batch_negatives
        self.ignore_index = ignore_index
        self.label_smoothing = checks.fraction("label_smoothing", label_smoothing)
        self.max_logit_scale = max_logit_scale
        self.logit_scale = nn.Parameter(torch.zeros((), dtype=torch.float32)) if learnable_temperature else None
        self.temperature = temperature

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":  # nn.Module would register a Parameter under the property's name
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: what was assigned, or `exp(-logit_scale)` where it is learnable. Assignable."""
        return self._temperature if self.logit_scale is None else torch.exp(-self.logit_scale)

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        if self.logit_scale is None:
            value = value if isinstance(value, Tensor) else checks.positive_float("temperature", value)
            self._parameters.pop("_temperature", None)  # a Parameter of the user's gives way to what is assigned
            self._temperature = value
            return
        scalar = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        scale = -math.log(checks.positive_float("temperature", scalar))
        with torch.no_grad():
            self.logit_scale.fill_(scale)

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep `1 / temperature` at or under `max_logit_scale`. Call it after the optimizer's step: a clamp inside the
        forward would stop the gradient at the bound."""
        if self.logit_scale is None or self.max_logit_scale is None:
            raise RuntimeError("clamp_logit_scale_ needs learnable_temperature=True and a max_logit_scale")
        self.logit_scale.clamp_(max=math.log(self.max_logit_scale))

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
        """The loss; `temperature` replaces the module's for this call."""
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature if temperature is None else temperature,
            negative_mode=self.negative_mode,
            symmetric=self.symmetric,
            in_batch_negatives=self.in_batch_negatives,
            ignore_index=self.ignore_index,
            target=target,
            query_ids=query_ids,
            key_ids=key_ids,
            negative_ids=negative_ids,
            weight=weight,
            label_smoothing=self.label_smoothing,
            **self.options,
        )

    def extra_repr(self) -> str:
        options: dict[str, Any] = {
            "temperature": self._temperature
            if self.logit_scale is None
            else float(f"{torch.exp(-self.logit_scale).item():.6g}"),
            "reduction": self.reduction,
            "negative_mode": self.negative_mode,
        }
        defaults: dict[str, Any] = {
            "symmetric": False, "normalize": True, "in_batch_negatives": None, "ignore_index": -100,
            "label_smoothing": 0.0,
            "max_logit_scale": None, "backend": "auto", "workspace_limit": None,
        }  # fmt: skip
        options.update({name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value})
        if self.logit_scale is not None:
            options["learnable_temperature"] = True
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
