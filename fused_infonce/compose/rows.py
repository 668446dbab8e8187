"""Rows and (N,) vectors that losses compose: unit rows, dot products, guarded logarithms, sums over classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.contract import EPS
from ..backends.indexing import add_rows, take_rows


def unit(x: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Return rows in `dtype`, divided by their norms with `normalize`, differentiable."""
    x = x.to(dtype)
    if not normalize:
        return x
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return _unit_rows(x)
    unit_and_norm = _Unit.apply(x) if torch.is_grad_enabled() and x.requires_grad else _Unit.forward(x)
    return unit_and_norm[0]


def _unit_rows(x: Tensor) -> Tensor:
    """Compute `F.normalize(x, dim=-1)`, but for two kinds of rows.

    A row with a norm up to EPS has no gradient (there it would be 1e12), and a row whose norm overflows is NaN (there
    it would be zeros).
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = norm.masked_fill(norm == math.inf, math.nan)
    small = norm <= EPS
    return torch.where(small, x.detach() / EPS, x / torch.where(small, 1, norm))


class _Unit(torch.autograd.Function):
    """The unit rows of `_unit_rows` and the norms in a third of its operators, differentiable any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(EPS).nan_to_num_(math.nan, math.nan)
        return x / norm, norm

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, of_norm: Tensor | None) -> Tensor | None:
        """Return `(g - (g . unit) unit) / norm`, 0 for a row that counts as zero."""
        unit, norm = ctx.saved_tensors
        grad = None
        if upstream is not None:
            across = torch.addcmul(upstream, dots(upstream, unit).unsqueeze(-1), unit, value=-1)
            grad = across / torch.threshold(norm, EPS, math.inf)
        if of_norm is not None:
            along = (of_norm * unit).masked_fill(norm <= EPS, 0)
            grad = along if grad is None else grad + along
        return grad


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot product x_i . y_i of every pair of rows."""
    return torch.linalg.vecdot(x, y)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """Compute log(exp(a) + exp(b)); where both are -inf the gradient is 0, and not NaN as torch.logaddexp's."""
    none = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(none, 0), b.masked_fill(none, 0)).masked_fill(none, -torch.inf)


def finite(neg: Tensor) -> Tensor:
    """Return logsumexps above -1e30: of -inf, where there are no negatives, -inf - -inf would be NaN."""
    return neg.clamp_min(-1e30)


def class_sums(classes: Tensor, x: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows of x, (K, D), and their number, (K,), of each of the K wanted classes.

    wanted: (K,) classes; None: the class of every row. Rows are always added in the same order, without a
        synchronisation.
    """
    ordered, _ = torch.sort(classes)
    place = torch.searchsorted(ordered, classes)  # of the first row of the class
    sums = add_rows(x.new_zeros(len(x) + 1, x.shape[1]), place, x)
    if wanted is None:
        return take_rows(sums, place), torch.searchsorted(ordered, classes, right=True) - place
    first, end = (torch.searchsorted(ordered, wanted, right=right) for right in (False, True))
    return take_rows(sums, torch.where(end > first, first, len(x))), end - first
