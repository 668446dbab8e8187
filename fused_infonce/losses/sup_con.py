"""Supervised contrastive loss: several positives a row, by labels or by a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import reference
from ..backends.contract import Problem, accumulator
from ..backends.row_losses import infonce
from ..compose.reduction import call_options, class_sums, dots, reduced_mean, unit, wide
from .base import WithTemperature
from .nt_xent import nt_xent


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    base_temperature: float = 0.07,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """SupCon: every row against all others, all rows of its class its positives.

        loss_i = -(t / t_base) mean_{p in P(i)} log( exp(s_ip) / sum_{a != i} exp(s_ia) ),    s_ij = cos(x_i, x_j) / t

    where x are the V N rows of the V views of N samples and P(i) those of i's class but i itself. The sum over P(i) is
    <x_i, sum of its rows>, so that nothing of size (V N)^2 is held.

    Args:
        features: (N, V, D), V views of N samples; dimensions after the third are flattened into D. Dtypes as in
            `info_nce`.
        labels: (N,) or (N, 1) integers; samples with one label are each other's positives. None, without a mask: only
            the views of a sample are.
        mask: (N, N), bool, integers or floats, none negative: the weight in the mean with which sample j's views are
            positives of sample i's, 0 for none. May be asymmetric. Not with labels.
        temperature: t, a positive number or a one-element tensor; gradients flow to tensors, through t / t_base too.
        contrast_mode: "all" (every view is an anchor) or "one" (the first view is).
        base_temperature: t_base, a positive number.
        reduction: "mean" over the anchors, those without positives counting with 0; "sum"; or "none": (V N,) for "all",
            the anchors of the first view first, (N,) for "one".
        normalize: as in `info_nce`. The original leaves it to the caller.
        backend, workspace_limit: as in `info_nce`.

    Returns and raises: as `info_nce`; ValueError also for features of fewer than 3 dimensions and both labels and mask.
    Values of the mask are checked on a CPU; on a GPU a negative one gives NaN.

    References: Khosla et al. 2020, arXiv:2004.11362; https://github.com/HobbitLong/SupContrast (losses.py).
    """
    base = checks.sup_con(features, labels, mask, temperature, contrast_mode, base_temperature, reduction, backend)
    samples, views = features.shape[:2]
    device, acc = features.device, accumulator(contrast.compute_dtype([features]))
    t = checks.temperature(temperature, 1, acc, device)
    options = call_options(backend, workspace_limit, temperature, normalize)
    labels = None if labels is None else labels.flatten().long()
    weights = None if mask is None else checks.mask_weights(mask, acc)
    if backend == "reference":
        return reference.sup_con(features, labels, weights, t, contrast_mode, base, reduction, normalize=normalize)
    rows = features.flatten(2).transpose(0, 1).flatten(0, 1)  # (V N, D), one view after another
    if views == 2 and contrast_mode == "all" and labels is None and weights is None:
        view_a, view_b = rows.chunk(2)
        loss = nt_xent(
            view_a,
            view_b,
            temperature,
            reduction,
            normalize=normalize,
            backend=backend,
            workspace_limit=workspace_limit,
        )
        return loss * (t[0] / base)

    repeats = 1 if contrast_mode == "one" else views
    anchors = repeats * samples
    rows, products = wide(rows)
    index = torch.arange(len(rows), device=device)
    single = None
    own = torch.ones(samples, dtype=acc, device=device)
    if weights is not None:
        if views == 1:  # a row is never its own positive
            weights = weights.masked_fill(torch.eye(samples, dtype=torch.bool, device=device), 0)
        target, own, single = _of_mask(weights, views)
    elif views > 1:
        target = index.roll(-samples)
    else:
        target = torch.full_like(index, -1) if labels is None else _next(labels)
    problem = Problem(
        rows[:anchors], rows, t, target[:anchors], row_ids=index[:anchors], key_ids=index, normalize=normalize
    )
    with products:
        stats = contrast.statistics(problem, options)

    with torch.autocast(device.type, enabled=False):
        x = unit(rows, normalize, acc)
        total, count = x.unflatten(0, (views, samples)).sum(0), torch.full((samples,), views, dtype=acc, device=device)
        if labels is not None:
            total, members = class_sums(labels, total)
            count = count * members
        elif weights is not None:
            total, count = weights @ total, count * weights.sum(1)
        count = count - own
        if single is None:
            single = count == 1
        count, single, own = (y.repeat(repeats) for y in (count, single, own))
        total = total.repeat(repeats, 1)
        query = x[:anchors]
        mean = (dots(query, total) - own * dots(query, query)) / (t * torch.where(count == 0, 1, count))
        # lse over all others - mean = softplus(neg - s_iy) + (s_iy - mean), y one of the positives. Where it is the
        # only one the second part is 0, and the first is exact however small the loss
        loss = infonce(stats.neg - stats.pos) + torch.where(single, 0, stats.pos - mean)
        return reduced_mean(torch.where(count == 0, 0, loss) * (t / base), reduction)


def _of_mask(weights: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of (N, N) weights: (V N,) a positive of each row, the heaviest, -1 where it has none; (N,) the weight of the row
    itself in its row of the mask, and whether it has one positive only."""
    n = len(weights)
    index, own = torch.arange(n, device=weights.device), weights.diagonal()
    if not n:
        return index, own, own == 1
    heaviest, sample = weights.max(1)
    row = torch.arange(views, device=weights.device)[:, None] * n
    target = torch.where(sample == index, (row + n + index) % (views * n), row + sample)  # its next view, not itself
    single = views * (weights > 0).sum(1) - (own > 0).long() == 1
    return torch.where(heaviest == 0, -1, target).flatten(), own, single


def _next(classes: Tensor) -> Tensor:
    """(N,) for each row the next one of its class, after the last the first; -1 where it is alone."""
    ordered, order = torch.sort(classes, stable=True)
    first, end = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
    index = torch.arange(len(classes), device=classes.device)
    place = torch.where(index + 1 < end, index + 1, first)
    following = torch.where(end - first == 1, -1, order[place])
    return torch.empty_like(order).scatter_(0, order, following)


class SupConLoss(WithTemperature):
    """Supervised contrastive loss; a drop-in for `SupConLoss` of SupContrast. See `sup_con`.

    Example:
        >>> loss = SupConLoss(temperature=0.07)
        >>> loss(torch.randn(32, 2, 128, requires_grad=True), labels=torch.arange(32) % 10).backward()
    """

    shown = ("temperature", "contrast_mode", "base_temperature", "reduction")

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        reduction: str = "mean",
        *,
        normalize: bool = True,
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        checks.one_of("contrast_mode", contrast_mode, checks.CONTRAST_MODES)
        self.contrast_mode = contrast_mode
        self.base_temperature = checks.positive_float("base_temperature", base_temperature)

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return sup_con(
            features,
            labels,
            mask,
            self.temperature,
            self.contrast_mode,
            self.base_temperature,
            **self.options,
        )
