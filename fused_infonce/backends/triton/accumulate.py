"""Sums of coefficients times rows over all tiles: in registers, or through a workspace and library products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..indexing import slices
from ..plan import PRODUCT_SHARE, Plan
from ..precision import accumulator
from .coefficients import block_of, block_size, write_coefficients
from .gradient import add_streaming_gradient, gradient_slots
from .launch import Excluded, Side
from .work import Work


def streaming(work: Work, plan: Plan, wanted: Sequence[bool]) -> dict[int, Tensor]:
    """Return the accumulated gradients, (slots, rows, D) by place in the inputs, from sums kept in registers.

    The problem has no biases.
    """
    accumulators: dict[int, Tensor] = {}
    query, segments = work.query, list(work.segments)

    def add(index: int, x: Side, y: Side, excluded: Excluded, widest: int) -> None:
        first = index not in accumulators
        if first:
            slots = gradient_slots(x, y, widest, plan.limit)
            accumulators[index] = x.rows.new_empty((slots, *x.rows.shape), dtype=work.problem.acc_dtype)
        add_streaming_gradient(accumulators[index], x, y, excluded, index == 0, not first)

    for index, keys, excluded in segments:
        if wanted[0]:
            add(0, query, keys, excluded, max(len(keys) for _, keys, _ in segments))
        if wanted[index]:
            add(index, keys, query, excluded, len(query))
    return accumulators


def workspace(work: Work, plan: Plan, wanted: Sequence[bool], biases: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the accumulated gradients, (1, rows, D) by place in the inputs, from blocks of C and library products.

    biases: the gradients of biases by place in the inputs, which are added to.

    Of a symmetric C the blocks under the diagonal are left out: a block above it stands for its transpose too.
    """
    query, n, mirrored = work.query, len(work.query), work.problem.self_similar
    places = {place for place, want in enumerate(wanted) if want} | biases.keys()
    segments = [segment for segment in work.segments if n and places & {0, segment[0]}]
    if not segments:
        return {}
    sums = Sums(plan.limit)
    widest = max((keys for _, keys, _ in segments), key=len)
    block_rows, block_cols = block_size(query, widest, plan.rows, plan.cols)
    if mirrored:
        block_rows = block_cols = min(block_rows, block_cols)
    block = block_of(query, widest, block_rows, block_cols)
    for index, keys, excluded in segments:
        symmetric = mirrored and index == 1
        for rows in slices(n, block_rows):
            for cols in slices(len(keys), block_cols):
                if symmetric and cols.start < rows.start:
                    continue
                of_biases = (biases.get(0) if index == 1 else None), biases.get(index)
                c = write_coefficients(block, query, keys, rows, cols, excluded, *of_biases)
                if wanted[0]:
                    sums.add(0, query, rows, c, keys.rows[cols])
                other = 0 if symmetric else index
                if wanted[other] and not (symmetric and cols.start == rows.start):
                    sums.add(other, keys, cols, c.T, query.rows[rows])
    return sums.of


@cache
def adds_in_place(device: torch.device) -> bool:
    """Return whether this PyTorch adds 16-bit products to float32 in place: a trial tells, since older ones refuse."""
    out, x = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(out, x, x, out_dtype=torch.float32, out=out)
    except RuntimeError:
        return False
    return True


@cache
def multiplies_wide(device: torch.device) -> bool:
    """Return whether this PyTorch multiplies 16-bit factors to float32: a trial tells; ROCm's refuse before 2025-09."""
    x = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


class Sums:
    """Sums of products by place in the inputs, (1, rows, D) in the accumulator dtype, the first of some rows written.

    What a product cannot add in place takes a share of `limit`.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.of: dict[int, Tensor] = {}
        self.begun: set[tuple[int, int]] = set()  # (place, first row): each place is divided in one way

    def add(self, index: int, side: Side, rows: slice, a: Tensor, b: Tensor) -> None:
        """Add a @ b to these rows of a place, whose rows are those of `side`."""
        like, acc = side.rows, accumulator(side.rows.dtype)
        narrow = a.dtype != acc
        native = not narrow or multiplies_wide(a.device)  # a library product in the accumulator's dtype
        first = (index, rows.start) not in self.begun
        self.begun.add((index, rows.start))
        if first and native and rows == slice(0, like.shape[0]):
            self.of[index] = (torch.mm(a, b, out_dtype=acc) if narrow else torch.mm(a, b))[None]
            return
        if index not in self.of:
            self.of[index] = like.new_empty((1, *like.shape), dtype=acc)
        out, beta = self.of[index][0, rows], 0 if first else 1  # with 0 what is there is not read
        if not narrow:
            out.addmm_(a, b, beta=beta)
        elif adds_in_place(out.device):
            torch.addmm(out, a, b, beta=beta, out_dtype=acc, out=out)
        else:
            most = max(self.limit // PRODUCT_SHARE // (out.element_size() * out.shape[1]), 1)
            for part in slices(len(out), most):
                if not native:
                    out[part].addmm_(a[part].to(acc), b.to(acc), beta=beta)
                elif first:
                    out[part] = torch.mm(a[part], b, out_dtype=acc)
                else:
                    out[part].add_(torch.mm(a[part], b, out_dtype=acc))
