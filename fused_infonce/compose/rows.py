"""Rows and (N,) vectors that losses compose: unit rows, dot products, guarded logarithms, sums over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.contract import EPS
from ..backends.indexing import add_rows, take_rows


def unit(x: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Return rows in `dtype`, differentiable, with `normalize` as `F.normalize(x, dim=-1)` but for two kinds of rows.

    A row with a norm up to EPS has no gradient (there it would be 1e12), and a row whose norm overflows is NaN (there
    it would be zeros).
    """
    x = x.to(dtype)
    if not normalize:
        return x
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = norm.masked_fill(norm == torch.inf, torch.nan)
    small = norm <= EPS
    return torch.where(small, x.detach() / EPS, x / torch.where(small, 1, norm))


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
    wanted = classes if wanted is None else wanted
    ordered, _ = torch.sort(classes)
    place = torch.searchsorted(ordered, classes)  # of the first row of the class
    sums = add_rows(x.new_zeros(len(x) + 1, x.shape[1]), place, x)
    first, end = (torch.searchsorted(ordered, wanted, right=right) for right in (False, True))
    return take_rows(sums, torch.where(end > first, first, len(x))), end - first
