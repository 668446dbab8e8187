"""The problem of two views of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Problem


def other_views(rows: Tensor) -> Tensor:
    """Return the targets of the rows of two views, (N,): row i + N / 2 of row i, or i - N / 2."""
    n = rows.shape[0]
    return torch.arange(n // 2, n // 2 + n, device=rows.device).remainder_(n)


class TwoViews(Problem):
    """The problem of the rows of two views, whose targets are made where one asks for them: the dense plan does not.

    `torch.compile` is given a `Problem` instead: that of PyTorch 2.9 does not call the setter of a property.
    """

    _target: Tensor | None

    @property
    def target(self) -> Tensor | None:
        if self._target is None and self.two_views:
            self._target = other_views(self.query.rows)
        return self._target

    @target.setter
    def target(self, value: Tensor | None) -> None:
        self._target = value
