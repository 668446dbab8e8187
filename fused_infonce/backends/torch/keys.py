"""One set of keys as the torch backend works on it, a tile at a time.

Rows are held as the logits see them: unit rows (raw ones without `normalize`), in the accumulator dtype. In the shapes
below x (R, D) are the queries of a chunk, y the keys, and W (R, T) the coefficients of `chunked`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import KeySet, Problem
from ..indexing import add_uses, same_ids, slices, take_rows
from ..rows import Rows, RowsByPart, is_its_guide
from .bias import Bias


class Guide:
    """A guide's view of the queries, which tells negatives from false ones."""

    def __init__(self, query: Tensor, ceiling: Tensor):
        self.query, self.ceiling = Rows(query, True, None, ceiling.dtype).unit, ceiling

    def rejects(self, keys: Tensor, rows: slice) -> Tensor:
        """Return (R, T): whether the guide's cosine of a query and a key, unit rows, is above the query's ceiling."""
        return (self.query[rows] @ keys.T) > self.ceiling[rows, None]


class SharedKeys:
    """Keys (M, D) that every query is scored against.

    targets: whether they are the set that holds the queries' targets
    """

    def __init__(
        self, problem: Problem, keys: KeySet, step: int, wanted: bool, guide: Guide | None = None, targets: bool = False
    ):
        self.problem, self.step, self.ids, self.targets = problem, step, keys.ids, targets
        self.bias: Bias | None = None
        self.guide = None if keys.guide is None else guide
        self.rejected: tuple[slice, slice, Tensor] | None = None  # of the tile that was last asked for
        self.rows = _rows_of(keys, problem, step)
        self.view: Rows | RowsByPart | None = None
        if keys.guide is not None:
            shared = problem.normalize and is_its_guide(keys)
            self.view = self.rows if shared else Rows(keys.guide, True, None, problem.acc_dtype)
        self.grad = torch.zeros_like(keys.rows, dtype=problem.acc_dtype) if wanted else None
        self.parts = slices(len(keys.rows), step)

    def tiles(self) -> list[slice]:
        return self.parts

    def longest(self) -> float:
        return self.rows.longest()

    def part(self, rows: slice, cols: slice) -> slice:
        """Return which of the set's rows are scored in a tile."""
        return cols

    def scores(self, x: Tensor, alpha: float, rows: slice, cols: slice, out: Tensor) -> Tensor:
        """Write `alpha x . y` into `out`."""
        return out.addmm_(x, self.rows.units(cols).T, beta=0, alpha=alpha)

    def exclude(self, tile: Tensor, value: float, rows: slice, cols: slice) -> None:
        """Write `value` where a column is no negative of its row."""
        row_ids, target = self.problem.query.ids, self.problem.target
        if row_ids is not None and self.ids is not None:
            tile.masked_fill_(same_ids(row_ids[rows], self.ids[cols]), value)
        if self.guide is not None and self.view is not None:
            if self.rejected is None or self.rejected[:2] != (rows, cols):
                self.rejected = rows, cols, self.guide.rejects(self.view.units(cols), rows)
            tile.masked_fill_(self.rejected[2], value)
        if not self.targets:
            return
        if target is None or self.problem.self_similar:
            tile.diagonal(rows.start - cols.start).fill_(value)
        if target is not None:  # one element a row, without asking how many are in this tile
            local = target[rows, None] - cols.start
            inside = (local >= 0) & (local < tile.shape[1])
            local = local.clamp(0, tile.shape[1] - 1)
            tile.scatter_(1, local, torch.where(inside, value, tile.gather(1, local)))

    def add_gradients(self, w: Tensor, x: Tensor, rows: slice, cols: slice, grad_x: Tensor | None) -> None:
        """Add W y to the queries' gradient and W' x to the keys'."""
        if grad_x is not None:
            grad_x.addmm_(w, self.rows.units(cols))
        if self.grad is not None:
            self.grad[cols].addmm_(w.T, x)

    def finish(self, dtype: torch.dtype | None) -> Tensor | None:
        return None if self.grad is None else self.rows.finish(self.grad).to(dtype)


class PairedKeys:
    """Keys (N, H, D), each query's own. Unit rows are made for a few queries at a time, within `limit` bytes."""

    def __init__(self, problem: Problem, keys: KeySet, limit: int, dtype: torch.dtype | None):
        self.problem, self.keys = problem, keys
        self.bias: Bias | None = None
        n, h, d = len(problem.query.rows), keys.columns(), keys.rows.shape[-1]
        self.every = slice(0, n)
        self.block = max(1, limit // max(4 * h * d * problem.acc_dtype.itemsize, 1))
        self.grad = torch.empty(keys.rows.shape, dtype=dtype, device=keys.rows.device) if dtype else None

    def tiles(self) -> list[slice]:
        h = self.keys.columns()
        return [slice(0, h)] if h else []

    def longest(self) -> float:
        if self.problem.normalize:
            return 1.0
        return max((self.unit(part).longest() for _, part in self.blocks(self.every)), default=0.0)

    def part(self, rows: slice, cols: slice) -> slice:
        return rows

    def blocks(self, rows: slice) -> list[tuple[slice, slice]]:
        """Return the blocks of some rows, each as a slice of these rows and as one of the problem's."""
        local = slices(rows.stop - rows.start, self.block)
        return [(part, slice(rows.start + part.start, rows.start + part.stop)) for part in local]

    def unit(self, part: slice) -> Rows:
        scale = None if self.keys.scale is None else self.keys.scale[part]
        return Rows(self.keys.rows[part], self.problem.normalize, scale, self.problem.acc_dtype)

    def scores(self, x: Tensor, alpha: float, rows: slice, cols: slice, out: Tensor) -> Tensor:
        for local, part in self.blocks(rows):
            torch.mul(torch.bmm(self.unit(part).unit, x[local, :, None])[..., 0], alpha, out=out[local])
        return out

    def exclude(self, tile: Tensor, value: float, rows: slice, cols: slice) -> None:
        row_ids, ids = self.problem.query.ids, self.keys.ids
        if row_ids is not None and ids is not None:
            tile.masked_fill_(same_ids(row_ids[rows], ids[rows]), value)

    def add_gradients(self, w: Tensor, x: Tensor, rows: slice, cols: slice, grad_x: Tensor | None) -> None:
        for local, part in self.blocks(rows):
            keys = self.unit(part)
            if grad_x is not None:
                grad_x[local] += torch.bmm(w[local, None], keys.unit)[:, 0]
            if self.grad is not None:
                self.grad[part] = keys.finish(w[local, :, None] * x[local, None])

    def finish(self, dtype: torch.dtype | None) -> Tensor | None:
        return self.grad


class IndexedKeys(PairedKeys):
    """Keys of each query's own by their places in a table (M, D), from which they are taken a few queries at a time.

    The gradient of the table's unit rows is added up over their uses, in the order of the queries.
    """

    def __init__(self, problem: Problem, keys: KeySet, limit: int, dtype: torch.dtype | None):
        super().__init__(problem, keys, limit, None)
        assert keys.indices is not None
        self.indices, (self.size, d), acc = keys.indices, keys.rows.shape, problem.acc_dtype
        self.ids, table, scale = _not_empty(keys.ids), _not_empty(keys.rows), _not_empty(keys.scale)
        self.table = RowsByPart(table, problem.normalize, scale, acc, limit // max(4 * d * acc.itemsize, 1))
        self.whole = False  # whether every index is a row, as far as that is free to read
        if self.indices.device.type == "cpu" and self.indices.numel():
            least, most = torch.aminmax(self.indices)
            self.whole = least.item() >= 0 and most.item() < self.size
        # what is no row adds 0 or NaN, to a row after the last
        rows = self.size + (not self.whole)
        self.grad = torch.zeros((rows, d), dtype=acc, device=self.indices.device) if dtype else None

    def longest(self) -> float:
        return self.table.longest()

    def places(self, rows: slice) -> Tensor:
        """Return the places of some queries' keys, (R H,), those of rows that are not there being any."""
        return self.indices[rows].clamp(0, max(self.size - 1, 0)).flatten()

    def unit(self, part: slice) -> Rows:
        index, rows = self.indices[part], self.table.taken(self.places(part))
        rows = rows.view(*index.shape, rows.shape[1])
        if not self.whole:
            rows.masked_fill_((index == -1)[..., None], 0).masked_fill_((index == self.size)[..., None], torch.nan)
        return Rows.made([rows], False, False)

    def exclude(self, tile: Tensor, value: float, rows: slice, cols: slice) -> None:
        row_ids, index = self.problem.query.ids, self.indices[rows]
        if not self.whole:
            tile.masked_fill_(index == -1, value)
        if row_ids is not None and self.ids is not None:
            ids = take_rows(self.ids, self.places(rows))
            same = same_ids(row_ids[rows], ids.view(*index.shape, *ids.shape[1:]))
            tile.masked_fill_(same & (index != self.size), value)

    def add_gradients(self, w: Tensor, x: Tensor, rows: slice, cols: slice, grad_x: Tensor | None) -> None:
        for local, part in self.blocks(rows):
            if grad_x is not None:
                grad_x[local] += torch.bmm(w[local, None], self.unit(part).unit)[:, 0]
            if self.grad is not None:
                index = self.indices[part]
                places = index if self.whole else index.masked_fill(index == -1, self.size)
                add_uses(self.grad, places, w[local], x[local])

    def finish(self, dtype: torch.dtype | None) -> Tensor | None:
        return None if self.grad is None else self.table.finish(self.grad[: self.size]).to(dtype)


def _rows_of(keys: KeySet, problem: Problem, step: int) -> Rows | RowsByPart:
    """Return shared keys as the logits see them; 16-bit ones are widened a part at a time, and never held so."""
    acc = problem.acc_dtype
    if keys.norm is not None:
        return Rows.made([keys.rows, keys.norm], True, False)
    if keys.rows.dtype == acc:
        return Rows(keys.rows, problem.normalize, keys.scale, acc)
    return RowsByPart(keys.rows, problem.normalize, keys.scale, acc, step)


def _not_empty(x: Tensor | None) -> Any:
    """Return x, or a row of zeros where it has none, so that there is one to take."""
    return x if x is None or len(x) else x.new_zeros((1, *x.shape[1:]))


Keys = SharedKeys | PairedKeys
