"""What the torch backend does with one set of keys, a tile at a time.

Rows are held as the logits see them: unit rows (raw ones without `normalize`), in the accumulator dtype.
x (R, D) are a chunk's queries, y the keys, W (R, T) the coefficients of `backend_torch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import EPS, KEY, Problem


class Rows:
    """Rows as the logits see them: `unit = x / norm`, or without `normalize` `scale x`."""

    def __init__(self, x: Tensor, normalize: bool, scale: Tensor | None, acc: torch.dtype):
        x = x if x.dtype == acc else x.to(acc)
        self.norm: Tensor | None = None
        self.scale: Tensor | None = None
        self.unit = x
        if normalize:
            self.norm = torch.linalg.vector_norm(x, 2, -1, True).clamp_min_(EPS)
            self.unit = x / self.norm
        elif scale is not None:
            self.scale = scale.to(acc)[..., None]
            self.unit = x * self.scale

    def __getitem__(self, rows: slice) -> Rows:
        """Some of them."""
        part = object.__new__(Rows)
        part.unit = self.unit[rows]
        part.norm = None if self.norm is None else self.norm[rows]
        part.scale = None if self.scale is None else self.scale[rows]
        return part

    def finish(self, grad: Tensor) -> Tensor:
        """The gradient of x from that of the unit rows, in place: `(g - (g . unit) unit) / norm`; 0 for zero rows."""
        if self.norm is None:
            return grad if self.scale is None else grad.mul_(self.scale)
        grad.addcmul_(self.unit, torch.linalg.vecdot(grad, self.unit).unsqueeze(-1), value=-1)
        return grad.div_(torch.threshold(self.norm, EPS, torch.inf))


class Guide:
    """Another view of the queries, which tells negatives from false ones."""

    def __init__(self, query: Tensor, ceiling: Tensor):
        self.query, self.ceiling = Rows(query, True, None, ceiling.dtype).unit, ceiling

    def rejects(self, keys: Tensor, rows: slice) -> Tensor:
        """(R, T): cos_ij > ceiling_i, of unit rows."""
        return (self.query[rows] @ keys.T) > self.ceiling[rows, None]


class SharedKeys:
    """(M, D) keys that every row is scored against: input `index` of the problem."""

    def __init__(self, problem: Problem, index: int, step: int, wanted: bool, guide: Guide | None = None):
        self.problem, self.index, self.step = problem, index, step
        view = problem.guide(index)
        self.guide = None if view is None else guide
        self.view = None if view is None else Rows(view, True, None, problem.acc_dtype).unit
        self.rejected: tuple[slice, slice, Tensor] | None = None  # of the tile that was last asked for
        self.rows = Rows(problem.inputs[index], problem.normalize, problem.scale(index), problem.acc_dtype)
        self.grad = torch.zeros_like(self.rows.unit) if wanted else None

    def tiles(self) -> list[slice]:
        m = self.rows.unit.shape[0]
        return [slice(c, min(c + self.step, m)) for c in range(0, m, self.step)]

    def longest(self) -> float:
        return 1.0 if self.rows.norm is not None else longest_row(self.rows.unit)

    def scores(self, x: Tensor, alpha: float, rows: slice, cols: slice, out: Tensor) -> Tensor:
        """`alpha x . y`."""
        return out.addmm_(x, self.rows.unit[cols].T, beta=0, alpha=alpha)

    def exclude(self, tile: Tensor, value: float, rows: slice, cols: slice) -> None:
        """Write `value` where a column is no negative of its row."""
        row_ids, ids, target = self.problem.row_ids, self.problem.ids(self.index), self.problem.target
        if row_ids is not None and ids is not None:
            tile.masked_fill_(row_ids[rows, None] == ids[cols], value)
        if self.guide is not None and self.view is not None:
            if self.rejected is None or self.rejected[:2] != (rows, cols):
                self.rejected = rows, cols, self.guide.rejects(self.view[cols], rows)
            tile.masked_fill_(self.rejected[2], value)
        if self.index != KEY:
            return
        if target is None or self.problem.self_similar:
            tile.diagonal(rows.start - cols.start).fill_(value)
        if target is not None:  # one element a row, without asking how many are in this tile
            local = target[rows, None] - cols.start
            inside = (local >= 0) & (local < tile.shape[1])
            local = local.clamp(0, tile.shape[1] - 1)
            tile.scatter_(1, local, torch.where(inside, value, tile.gather(1, local)))

    def add_gradients(self, w: Tensor, x: Tensor, rows: slice, cols: slice, grad_x: Tensor | None) -> None:
        if grad_x is not None:
            grad_x.addmm_(w, self.rows.unit[cols])
        if self.grad is not None:
            self.grad[cols].addmm_(w.T, x)

    def finish(self, dtype: torch.dtype | None) -> Tensor | None:
        return None if self.grad is None else self.rows.finish(self.grad).to(dtype)


class RowKeys:
    """(N, H, D) keys, each row's own. Unit rows are made for a few queries at a time, within `limit` bytes."""

    def __init__(self, problem: Problem, index: int, limit: int, dtype: torch.dtype | None):
        self.problem, self.index = problem, index
        self.keys = problem.inputs[index]
        _, h, d = self.keys.shape
        self.block = max(1, limit // max(4 * h * d * problem.acc_dtype.itemsize, 1))
        self.grad = torch.empty(self.keys.shape, dtype=dtype, device=self.keys.device) if dtype else None

    def tiles(self) -> list[slice]:
        h = self.keys.shape[1]
        return [slice(0, h)] if h else []

    def longest(self) -> float:
        if self.problem.normalize:
            return 1.0
        parts = self.blocks(slice(0, self.keys.shape[0]))
        return max((longest_row(self.unit(part).unit) for _, part in parts), default=0.0)

    def blocks(self, rows: slice) -> list[tuple[slice, slice]]:
        """(rows of the chunk, rows of the problem)."""
        starts = range(rows.start, rows.stop, self.block)
        parts = [slice(start, min(start + self.block, rows.stop)) for start in starts]
        return [(slice(part.start - rows.start, part.stop - rows.start), part) for part in parts]

    def unit(self, part: slice) -> Rows:
        scale = self.problem.scale(self.index)
        scale = None if scale is None else scale[part]
        return Rows(self.keys[part], self.problem.normalize, scale, self.problem.acc_dtype)

    def scores(self, x: Tensor, alpha: float, rows: slice, cols: slice, out: Tensor) -> Tensor:
        for local, part in self.blocks(rows):
            torch.mul(torch.bmm(self.unit(part).unit, x[local, :, None])[..., 0], alpha, out=out[local])
        return out

    def exclude(self, tile: Tensor, value: float, rows: slice, cols: slice) -> None:
        row_ids, ids = self.problem.row_ids, self.problem.ids(self.index)
        if row_ids is not None and ids is not None:
            tile.masked_fill_(row_ids[rows, None] == ids[rows], value)

    def add_gradients(self, w: Tensor, x: Tensor, rows: slice, cols: slice, grad_x: Tensor | None) -> None:
        for local, part in self.blocks(rows):
            keys = self.unit(part)
            if grad_x is not None:
                grad_x[local] += torch.bmm(w[local, None], keys.unit)[:, 0]
            if self.grad is not None:
                self.grad[part] = keys.finish(w[local, :, None] * x[local, None])

    def finish(self, dtype: torch.dtype | None) -> Tensor | None:
        return self.grad


Segment = SharedKeys | RowKeys


def longest_row(rows: Tensor) -> float:
    return torch.linalg.vector_norm(rows, dim=-1).max().item() if rows.numel() else 0.0
