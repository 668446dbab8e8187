"""Supervised contrastive loss: several positives a row, by labels or by a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import BackendName, Options, Reduction
from ..backends.contract import KeySet, Problem
from ..backends.indexing import part_of
from ..backends.precision import statistics_dtype, wide, without_autocast
from ..backends.row_losses import infonce
from ..compose.across import across, of_all, of_own, unique
from ..compose.arguments import call_options
from ..compose.reduction import reduced_mean
from ..compose.rows import class_sums, dots, unit
from ..compose.sums import summed
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss
from .nt_xent import nt_xent

ContrastMode = Literal["all", "one"]
CONTRAST_MODES: tuple[ContrastMode, ...] = get_args(ContrastMode)


@together
def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    contrast_mode: ContrastMode = "all",
    base_temperature: float | None = 0.07,
    reduction: Reduction = "mean",
    *,
    normalize: bool = True,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """SupCon: a supervised contrastive loss of every row against all others, where rows of one class are positives.

        loss_i = -(t / t_base) mean_{p in P(i)} log( exp(s_ip) / sum_{a != i} exp(s_ia) ),    s_ij = cos(x_i, x_j) / t

    where x are the V N rows of the V views of N samples, and P(i) the rows of i's class without i. The sum of s_ip over
    P(i) is x_i times the sum of these rows, so that nothing of size (V N)^2 is held.

    Args:
        features: (N, V, D), V views of N samples: `torch.stack([view_a, view_b], dim=1)`. Dimensions after the third
            are flattened into D. float16, bfloat16, float32 or float64.
        labels: (N,) or (N, 1) integers; samples with one label are each other's positives. None, without a mask: only
            the views of a sample are. One-hot labels are `labels.argmax(1)`.
        mask: (N, N), bool, integers or floats, none negative: the weight in the mean with which sample j's views are
            positives of sample i's, 0 for none. May be asymmetric. Not with labels.
        temperature: t, a positive number or a one-element tensor; gradients flow to tensors, but not through the factor
            t / t_base, which would make a learned temperature vanish.
        contrast_mode: "all" (every view is an anchor) or "one" (the first view is).
        base_temperature: t_base, a positive number; None: no factor t / t_base.
        reduction: "mean" over the anchors, those without positives counting with 0; "sum"; or "none": (V N,) for "all",
            the anchors of the first view first, (N,) for "one".
        normalize: divide every row by max(norm, 1e-12) first. The original leaves it to the caller.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (V N,) or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: features of fewer than 3 dimensions, labels together with a mask, shapes, devices, modes, values
        (those of a mask on a CPU; on a GPU a negative one gives NaN). TypeError: types, dtypes. RuntimeError: a backend
        that cannot run.

    References: Khosla et al. 2020, arXiv:2004.11362; https://github.com/HobbitLong/SupContrast (losses.py).
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    _check(features, labels, mask, temperature, contrast_mode)
    dtype = statistics_dtype(features)
    if mask is not None and options.call is not None:
        raise ValueError("mask names pairs of this process's samples: over several processes pass labels")
    t = checks.temperature(gather.shared(options.call, temperature), features, dtype)
    factor: float | Tensor = 1.0
    if base_temperature is not None:
        constant = t.values.detach()[0] if t.lowest is None else t.lowest
        factor = constant / checks.positive_float("base_temperature", base_temperature)
    weights = None if mask is None else _mask_weights(mask, dtype)
    samples, views = features.shape[:2]
    rows = features.flatten(2).transpose(0, 1).flatten(0, 1)  # (V N, D), one view after another
    if views == 2 and contrast_mode == "all" and labels is None and weights is None:
        view_a, view_b = rows.chunk(2)
        return factor * nt_xent(
            view_a, view_b, temperature, reduction, normalize=normalize, backend=backend,
            workspace_limit=workspace_limit, distributed=distributed,
        )  # fmt: skip

    index = torch.arange(len(rows), device=rows.device)
    positives = _positives(labels, weights, samples, views, index)
    anchors = samples if contrast_mode == "one" else len(rows)
    first = slice(0, anchors)
    rows, products = wide(rows)
    keys = KeySet(rows, unique(index, options))
    query = keys if contrast_mode == "all" else KeySet(rows[first], part_of(keys.ids, first))
    problem = Problem(query, (keys,), t, part_of(positives.target, first), normalize=normalize)
    with products:
        problem, others = across(problem, options)
        classes = None if labels is None else of_all(labels.flatten().long().repeat(views), options)
        if classes is not None and views == 1:  # the next row of a class may be another rank's
            problem = replace(problem, target=part_of(_next(classes), of_own(first, options)))
        with without_autocast(rows.device.type):
            if classes is not None:
                problem, total, count = _class_totals(problem, classes, of_own(first, options), options)
        with others:
            stats = contrast.statistics(problem, options).rows
    with without_autocast(rows.device.type):
        x = unit(rows, normalize, dtype)
        anchor = part_of(x, first)
        if classes is None:
            total, count = (part_of(each, first) for each in _sample_totals(x, weights, views))
        own = positives.own
        if own is None:  # every row is once among those of its class
            total, count = total - anchor, count - 1
        else:
            own = own.repeat(anchors // max(samples, 1))
            total, count = total - own[:, None] * anchor, count - own
        single = count == 1 if positives.single is None else positives.single.repeat(anchors // max(samples, 1))
        none = count == 0
        mean = dots(anchor, total) / (t.values * count.masked_fill(none, 1))
        # lse over all others - mean = softplus(neg - s_iy) + (s_iy - mean), y one of the positives. Where it is the
        # only one the second part is 0, and the first is exact however small the loss
        loss = infonce(stats.neg - stats.pos) + (stats.pos - mean).masked_fill(single, 0)
        return factor * reduced_mean(loss.masked_fill(none, 0), options)


def _class_totals(problem: Problem, classes: Tensor, own: slice, options: Options) -> tuple[Problem, Tensor, Tensor]:
    """Return the problem to go on with, and the sum and the number of the rows of all ranks of each row's class.

    own: where this rank's rows are among those of all.
    """
    wanted = part_of(classes, own)
    limit = options.limit(classes.device)
    problem, total = summed(problem, lambda y, part: class_sums(classes[part], y, wanted)[0], limit)
    return problem, total, class_sums(classes, total.new_empty(len(classes), 0), wanted)[1]


class _Positives(NamedTuple):
    """The positives of rows, as far as they are known before any score is.

    target: (V N,) one of each row, -1 where it has none. own: (N,) the weight that the row itself has among the rows
    that are summed; None: 1. single: (N,) whether there is one only; None where that is for their number to say
    """

    target: Tensor
    own: Tensor | None
    single: Tensor | None


def _positives(labels: Tensor | None, weights: Tensor | None, samples: int, views: int, index: Tensor) -> _Positives:
    """Return the positives of rows; index: their own, (V N,)."""
    if weights is not None:
        if views == 1:  # a row is never its own positive
            weights.fill_diagonal_(0)
        return _of_mask(weights, views)
    if views > 1:
        return _Positives((index + samples).remainder_(len(index)), None, None)
    return _Positives(torch.full_like(index, -1) if labels is None else _next(labels.flatten().long()), None, None)


def _sample_totals(x: Tensor, weights: Tensor | None, views: int) -> tuple[Tensor, Tensor]:
    """Return for each row the weighted sum of the views of its positives, itself perhaps among them, and its weight."""
    total = x.unflatten(0, (views, -1)).sum(0) if len(x) else x
    count = total.new_full((len(total),), views)
    if weights is not None:
        total, count = weights @ total, count * weights.sum(1)
    return total.repeat(views, 1), count.repeat(views)


def _of_mask(weights: Tensor, views: int) -> _Positives:
    """Return the positives that (N, N) weights name; a row's target is the one of the largest weight."""
    n = len(weights)
    index, own = torch.arange(n, device=weights.device), weights.diagonal().clone()
    if not n:
        return _Positives(index, own, own == 1)
    heaviest, sample = weights.max(1)
    row = torch.arange(views, device=weights.device)[:, None] * n
    # where the heaviest is the sample itself, its next view: no row is its own target
    target = torch.where(sample == index, (row + n + index) % (views * n), row + sample)
    single = views * (weights > 0).sum(1) - (own > 0).long() == 1
    return _Positives(torch.where(heaviest == 0, -1, target).flatten(), own, single)


def _next(classes: Tensor) -> Tensor:
    """Return (N,) the next row of each row's class, the first one after the last; -1 for a row that is alone."""
    ordered, order = torch.sort(classes, stable=True)
    first, end = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
    index = torch.arange(len(classes), device=classes.device)
    place = torch.where(index + 1 < end, index + 1, first)
    following = torch.where(end - first == 1, -1, order[place])
    return order.scatter(0, order, following)


def _check(features: Any, labels: Any, mask: Any, temperature: Any, contrast_mode: str) -> None:
    """Check the arguments of `sup_con`, except for the values of tensors."""
    checks.one_of("contrast_mode", contrast_mode, CONTRAST_MODES)
    if isinstance(features, Tensor) and features.dim() < 3 and not features.is_nested:
        raise ValueError(
            "features must have at least 3 dimensions (N, V, D), V views of N samples: torch.stack([view_a, view_b], "
            f"dim=1) of two (N, D) views, .unsqueeze(1) of one; got shape {tuple(features.shape)}"
        )
    checks.embeddings("features", features, features.dim() if isinstance(features, Tensor) else 3, "(N, V, D)")
    checks.with_values("features", features)
    n, views = features.shape[:2]
    if views == 0:
        raise ValueError(f"features must have at least one view, got shape {tuple(features.shape)}")
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both say what the positives are: pass one of them")
    if labels is not None:
        _check_labels(labels, features)
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor of shape ({n}, {n}), got {type(mask).__name__}")
        if mask.dtype not in (torch.bool, *checks.INTEGERS, *checks.FLOATS):
            raise TypeError(f"mask must be bool, integers or floats, got {mask.dtype}")
        checks.dense("mask", mask)
        if mask.shape != (n, n):
            raise ValueError(f"mask must have shape ({n}, {n}), got {tuple(mask.shape)}")
        checks.on("mask", mask, features.device, "features")
        if mask.requires_grad:
            raise ValueError("mask must not require a gradient: it has none")
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature must be a number or a one-element tensor, got shape {tuple(temperature.shape)}")


def _check_labels(labels: Any, features: Tensor) -> None:
    n, views = features.shape[:2]
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[0] == n and labels.shape[1] > 1:
        raise ValueError(
            f"labels must be one integer a sample, shape ({n},), got shape {tuple(labels.shape)}: one-hot labels are "
            "labels.argmax(1), and several labels a sample are mask=(labels @ labels.T) > 0"
        )
    if isinstance(labels, Tensor) and labels.shape == (views,) and n == 2 != views:
        raise ValueError(
            f"labels must have shape ({n},), one a sample, got {tuple(labels.shape)}: features are (N, V, D), so stack "
            "views with torch.stack([view_a, view_b], dim=1), not along dimension 0"
        )
    column = isinstance(labels, Tensor) and labels.dim() == 2
    checks.ids("labels", labels, (n, 1) if column else (n,), features.device, "features")


def _mask_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of positives as weights, none negative, in memory of their own."""
    if not mask.is_floating_point():
        mask = mask.to(dtype)
    return checks.only("mask", mask, (mask >= 0) & mask.isfinite(), "not be negative, and finite").to(dtype, copy=True)


class SupConLoss(ContrastiveLoss):
    """Supervised contrastive loss as a module: of V views of N samples, where rows of one label are positives.

    The function `sup_con` has the formula. The drop-in of SupContrast is `compat.supcontrast.SupConLoss`.

    Args:
        temperature: t, a positive number, a one-element tensor, or a callable of no arguments, evaluated at every call.
            It may be assigned anew.
        contrast_mode: "all" (every view is an anchor) or "one" (the first view is).
        base_temperature: t_base in the constant factor t / t_base of the loss; None: no factor.
        reduction: "mean" over the anchors, "sum" or "none" (one value per anchor).
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
        >>> loss = SupConLoss(temperature=0.07)
        >>> loss(torch.randn(32, 2, 128, requires_grad=True), labels=torch.arange(32) % 10).backward()
    """

    own = ("contrast_mode", "base_temperature")

    def __init__(
        self,
        temperature: TemperatureLike = 0.07,
        *,
        contrast_mode: ContrastMode = "all",
        base_temperature: float | None = 0.07,
        reduction: Reduction = "mean",
        normalize: bool = True,
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
        checks.one_of("contrast_mode", contrast_mode, CONTRAST_MODES)
        self.contrast_mode = contrast_mode
        if base_temperature is not None:
            checks.positive_float("base_temperature", base_temperature)
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the loss of (N, V, D) features, with (N,) labels or an (N, N) mask or neither; see `sup_con`."""
        return sup_con(features, labels, mask, self.temperature, **self.options)
