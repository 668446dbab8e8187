"""Rows as the logits see them, and the gradient of what they were: autograd sees none of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import EPS, KeySet, Problem
from .indexing import part_of, slices, take_rows

FINISHED = 2**18  # components of gradients that a CPU finishes at a time, which lie in a second cache with their rows


def norms(x: Tensor, keepdim: bool = True) -> Tensor:
    """Return what rows are divided by, (..., 1): their norms, at least EPS; NaN where a norm overflows.

    Divided by infinity, a row that is not zero would be zeros. keepdim: whether the last dimension stays.
    """
    return torch.linalg.vector_norm(x, 2, -1, keepdim).clamp_min_(EPS).nan_to_num_(math.nan, math.nan)


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

    def units(self, part: slice) -> Tensor:
        """Return some of the rows as the logits see them."""
        unit: Tensor = part_of(self.unit, part)
        return unit

    def taken(self, index: Tensor) -> Tensor:
        """Return the rows at these places as the logits see them."""
        return take_rows(self.unit, index)

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
        if grad.numel() > FINISHED and len(grad) > 1 and grad.device.type == "cpu":
            for part in slices(len(grad), finished_at_once(grad)):
                self[part].finish(grad[part])
            return grad
        grad.addcmul_(self.unit, (grad * self.unit).sum(-1, True), value=-1)
        return grad.div_(torch.threshold(self.norm, EPS, torch.inf))


def finished_at_once(grad: Tensor) -> int:
    """Return how many rows' gradients are finished at a time."""
    return FINISHED * len(grad) // max(grad.numel(), 1) if grad.device.type == "cpu" else len(grad)


class RowsByPart:
    """The rows of `Rows` of which a part is made whenever it is asked for, and none is held: x as it is, and norms.

    step: how many rows are made at a time where all are gone through
    """

    def __init__(self, x: Tensor, normalize: bool, scale: Tensor | None, acc: torch.dtype, step: int):
        self.x, self.scale, self.acc, self.step = x, None if normalize else scale, acc, step
        self.parts = slices(len(x), step)
        self.norm = x.new_empty((len(x), 1), dtype=acc) if normalize else None
        if self.norm is not None:
            for part in self.parts:
                self.norm[part] = norms(x[part].to(acc))

    def __getitem__(self, part: slice) -> Rows:
        if self.norm is None:
            return Rows(self.x[part], False, None if self.scale is None else self.scale[part], self.acc)
        x, norm = self.x[part], self.norm[part]
        return Rows.made([x / norm if x.dtype == self.acc else x.to(self.acc).div_(norm), norm], True, False)

    def units(self, part: slice) -> Tensor:
        """Return some of the rows as the logits see them."""
        return self[part].unit

    def taken(self, index: Tensor) -> Tensor:
        """Return the rows at these places as the logits see them."""
        rows = take_rows(self.x, index).to(self.acc)  # a copy of rows, whatever their dtype
        if self.norm is not None:
            return rows.div_(take_rows(self.norm, index))
        return rows if self.scale is None else rows.mul_(take_rows(self.scale, index)[:, None])

    def longest(self) -> float:
        """Return the largest norm among the rows as the logits see them."""
        return max((self[part].longest() for part in self.parts), default=0.0)

    def finish(self, grad: Tensor) -> Tensor:
        """Turn the gradient of the rows as the logits see them into that of x, in place; see `Rows.finish`."""
        for part in slices(len(grad), min(self.step, finished_at_once(grad))):
            self[part].finish(grad[part])
        return grad


def is_its_guide(keys: KeySet) -> bool:
    """Return whether a set's guide is its own rows, in the same memory."""
    guide, rows = keys.guide, keys.rows
    if guide is None or guide.data_ptr() != rows.data_ptr():
        return False
    return guide.dtype == rows.dtype and guide.shape == rows.shape and guide.stride() == rows.stride()


def as_held(keys: KeySet, problem: Problem, takes_unit_rows: bool) -> KeySet:
    """Return shared keys of a problem, without a graph, as a backend holds them: as unit rows with their norms where it
    takes such, else as they are."""
    rows = keys.rows.detach()
    if not (takes_unit_rows and problem.normalize and rows.dtype == problem.acc_dtype):
        return keys._replace(rows=rows)
    unit, norm = Rows(rows, True, None, problem.acc_dtype).tensors()
    return keys._replace(rows=unit, norm=norm)
