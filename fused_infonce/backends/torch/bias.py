"""The biases of a set of keys as the torch backend works on them, a tile of scores at a time.

Where every exponential fits as it is, a bias c_j is the factor 2^c_j of its key, beside an exponential E_ij of the
score alone that serves both directions; elsewhere it is added to the score before the maximum is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import LOG2E


class Bias:
    """The biases of scored rows: (T,) of the keys of a tile's columns, (R, 1) of its rows, or (R, T) of paired keys."""

    def __init__(self, bias: Tensor, shift: bool, wanted: bool, of_rows: bool = False):
        self.of_rows = of_rows  # in the direction of the columns the rows of a tile are what is scored
        self.term = bias * LOG2E
        self.factor = None if shift else torch.exp2(self.term)  # None: it is in the exponents
        self.grad = torch.zeros_like(bias) if wanted else None

    def _of(self, x: Tensor, part: slice) -> Tensor:
        return x[part, None] if self.of_rows else x[part]

    def added(self, scores: Tensor, part: slice, out: Tensor) -> Tensor:
        """Write the scores and their biases into `out`, which may be the scores."""
        return torch.add(scores, self._of(self.term, part), out=out)

    def multiply(self, w: Tensor, part: slice) -> Tensor:
        """Multiply a tile by the factors of the scored rows, in place."""
        return w if self.factor is None else w.mul_(self._of(self.factor, part))

    def total(self, e: Tensor, part: slice) -> Tensor:
        """Return the sum of each direction's exponentials, or of their products, times the factors."""
        if self.factor is None:
            return e.sum(0 if self.of_rows else 1)
        factor = self.factor[part]
        if self.of_rows:
            return torch.mv(e.T, factor)
        return torch.mv(e, factor) if factor.dim() == 1 else torch.linalg.vecdot(e, factor)

    def add_gradient(self, e: Tensor, share: Tensor, part: slice) -> None:
        """Add `sum_i share_i e_ij`, of the rows i that score j, to the gradient; `finish` multiplies by the factors."""
        if self.grad is None:
            return
        if self.of_rows:
            self.grad[part].addmv_(e, share)
        elif self.grad.dim() == 1:
            self.grad[part].addmv_(e.T, share)
        else:
            self.grad[part] = e * share[:, None]

    def finish(self) -> Tensor | None:
        return self.grad if self.grad is None or self.factor is None else self.grad.mul_(self.factor)
