"""The problem of two views of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Problem


class TwoViews(Problem):
    """The problem of the rows of two views, whose targets are made where one asks for them: the dense plan does not."""

    _target: Tensor | None

    @property
    def target(self) -> Tensor | None:
        if self._target is None and self.two_views:
            rows = self.query.rows
            n = rows.shape[0]
            self._target = torch.arange(n // 2, n // 2 + n, device=rows.device).remainder_(n)  # of the other view
        return self._target

    @target.setter
    def target(self, value: Tensor | None) -> None:
        self._target = value
