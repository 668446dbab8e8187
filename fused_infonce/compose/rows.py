"""Rows and (N,) vectors that losses compose: unit rows, dot products, guarded logarithms, sums over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.indexing import add_rows, take_rows
from ..backends.reference import unit_rows


def unit(x: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Return rows in `dtype`, divided by their norms with `normalize`, differentiable."""
    return unit_rows(x.to(dtype)) if normalize else x.to(dtype)


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot product x_i . y_i of every pair of rows."""
    return torch.linalg.vecdot(x, y)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """Compute log(exp(a) + exp(b)); where both are -inf the gradient is 0, and not NaN as torch.logaddexp's."""
    none = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(none, 0), b.masked_fill(none, 0)).masked_fill(none, -torch.inf)


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
