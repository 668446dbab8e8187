"""Rows as the logits see them, and the gradient of what they were: autograd sees none of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import EPS


def norms(x: Tensor) -> Tensor:
    """Return what rows are divided by, (..., 1): their norms, at least EPS; NaN where a norm overflows.

    Divided by infinity, a row that is not zero would be zeros.
    """
    return torch.linalg.vector_norm(x, 2, -1, True).clamp_min_(EPS).nan_to_num_(math.nan, math.nan)


class Rows:
    """Rows as the logits see them: `unit = x / norm`, or without `normalize` `scale x`.

    spare: whether x may be overwritten
    """

    def __init__(self, x: Tensor, normalize: bool, scale: Tensor | None, acc: torch.dtype, spare: bool = False):
        if x.dtype != acc:
            x, spare = x.to(acc), True
        self.norm: Tensor | None = None
        self.scale: Tensor | None = None
        self.unit = x
        if normalize:
            self.norm = norms(x)
            self.unit = x.div_(self.norm) if spare else x / self.norm
        elif scale is not None:
            self.scale = scale.to(acc)[..., None]
            self.unit = x * self.scale

    @staticmethod
    def made(tensors: Sequence[Tensor], normalize: bool, scaled: bool) -> Rows:
        """Return rows from what `tensors` returned of them, perhaps followed by others."""
        rows = object.__new__(Rows)
        rows.unit = tensors[0]
        rows.norm = tensors[1] if normalize else None
        rows.scale = tensors[1] if scaled and not normalize else None
        return rows

    def __getitem__(self, rows: slice) -> Rows:
        part = [x[rows] for x in self.tensors()]
        return Rows.made(part, self.norm is not None, self.scale is not None)

    def tensors(self) -> list[Tensor]:
        """Return the unit rows, and what `finish` needs beside them."""
        return [x for x in (self.unit, self.norm, self.scale) if x is not None]

    def longest(self) -> float:
        """Return the largest norm among the rows as the logits see them."""
        if self.norm is not None:
            return 1.0
        return torch.linalg.vector_norm(self.unit, 2, -1).max().item() if self.unit.numel() else 0.0

    def finish(self, grad: Tensor) -> Tensor:
        """Turn the gradient of the unit rows into that of x, in place: `(g - (g . unit) unit) / norm`.

        A row whose norm is at most EPS counts as zero and has no gradient.
        """
        if self.norm is None:
            return grad if self.scale is None else grad.mul_(self.scale)
        grad.addcmul_(self.unit, (grad * self.unit).sum(-1, True), value=-1)
        return grad.div_(torch.threshold(self.norm, EPS, torch.inf))
