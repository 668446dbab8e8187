"""Launchers of kernels/paired.py: keys that belong to one query each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.paired import paired_dots_kernel, paired_gradient_kernel, paired_statistics_kernel
from ..contract import EPS, KeySet
from . import tiles
from .finish import finish, partners_by_target
from .launch import (
    INTERPRETED,
    Side,
    acc_of,
    cdiv,
    contiguous,
    contiguous_rows,
    id_pointers,
    ids_a_row,
    in_base_2,
    run,
    vector,
)
from .rows import inverse_norms
from .statistics import SLOTS


class Paired(NamedTuple):
    """Keys of one query each, (N, H, D) or by their places in a table (M, D), with their dot products, (N H,).

    Inverse norms or scales, and ids, are of the rows.
    """

    rows: Tensor
    dots: Tensor
    inverse: Tensor | None
    ids: Tensor | None
    zero_row: float
    bias: Tensor | None = None  # in base 2; None: 0
    indices: Tensor | None = None  # (N, H), contiguous

    def columns(self) -> int:
        return self.rows.shape[1] if self.indices is None else self.indices.shape[1]

    def arguments(self, n: int) -> dict[str, Any]:
        """Return the arguments that describe keys of n queries to every kernel."""
        looked_up = self.indices is not None
        return {
            "D_ptr": self.dots, "B_ptr": self.inverse, "INDEX_ptr": self.indices, "size_q": n,
            "size_k": self.rows.shape[0] if looked_up else None, "H": self.columns(),
        }  # fmt: skip

    def row_arguments(self) -> dict[str, Any]:
        """Return the arguments that describe their rows."""
        k = self.rows
        strides = {"stride_km": k.stride(0), "stride_kh": k.stride(1) if self.indices is None else None}
        return {"K_ptr": k, "D": k.shape[-1], **strides}

    def pair_arguments(self, x: Side) -> dict[str, Any]:
        """Return the arguments that say how pairs with queries x are scored."""
        x_ids, key_ids = id_pointers(x, self)
        ids = {"QI_ptr": x_ids, "KI_ptr": key_ids, "IDS": ids_a_row(x_ids, x.rows)}
        return {"C_ptr": self.bias, "A_ptr": x.inverse, "S_ptr": x.scale, **ids, **self.arguments(len(x))}

    def tile(self) -> tuple[int, int, int]:
        return tiles.paired_tile(tiles.architecture(self.rows.device), self.columns(), self.rows.shape[-1])


def paired_keys(q: Tensor, keys: KeySet, normalize: bool) -> Paired:
    """Return keys of one query each with their dot products and inverse norms, from one reading of them.

    The norms of a table are made before, once a row.
    """
    n, h = q.shape[0], keys.columns()
    k, indices, inverse = contiguous_rows(keys.rows), contiguous(keys.indices), contiguous(keys.scale)
    if normalize:
        inverse = vector(q, n * h) if indices is None else inverse_norms(k)
    zero_row = 1 / EPS if normalize else math.inf
    pairs = Paired(k, vector(q, n * h), inverse, contiguous(keys.ids), zero_row, in_base_2(keys.bias), indices)
    block_m, block_h, block_d = pairs.tile()
    run(
        paired_dots_kernel, (cdiv(n, block_m), cdiv(h, block_h)),
        Q_ptr=q, stride_qm=q.stride(0), eps=EPS, at_eps=1 / EPS, NORMALIZE=normalize and indices is None,
        ACC=acc_of(q), BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_D=block_d, **pairs.arguments(n), **pairs.row_arguments(),
    )  # fmt: skip
    return pairs


def paired_states(x: Side, keys: Paired) -> Tensor:
    """Return the (1, SLOTS, N) states of the rows of x over their own keys."""
    n = len(x)
    states = keys.dots.new_empty((1, SLOTS, n))
    block_m, block_h, _ = keys.tile()
    run(
        paired_statistics_kernel, (cdiv(n, block_m),),
        ROWS_ptr=states, ACC=acc_of(x.rows), BLOCK_M=block_m, BLOCK_H=block_h, **keys.pair_arguments(x),
    )  # fmt: skip
    return states


def paired_gradient(
    g: Tensor | None, x: Side, keys: Paired, normalize: bool, unscale: Tensor | None, dtype: torch.dtype | None,
    accumulate: bool, biases: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Return the gradient of paired keys in `dtype`, and add their part of the rows' to g (slots, N, width of x).

    biases: (N, H), which that of the biases is written into.
    """
    (n, d), q, dk, v = (len(x), keys.rows.shape[-1]), x.rows, None, None
    if dtype is not None and keys.indices is None:
        dk = torch.empty(keys.rows.shape, dtype=dtype, device=q.device)
    elif dtype is not None:
        v = vector(q, n * keys.columns())
    block_m, block_h, block_d = keys.tile()
    run(
        paired_gradient_kernel, (cdiv(n, block_m), cdiv(d, block_d)),
        Q_ptr=q, N_ptr=x.shift, U_ptr=x.weight, SHARE_ptr=None if biases is None else x.share, UNSCALE_ptr=unscale,
        G_ptr=g, DK_ptr=dk, DC_ptr=biases, V_ptr=v, stride_qm=q.stride(0), stride_gm=q.shape[1],
        zero_row=keys.zero_row, NORMALIZE=normalize, ACCUMULATE=accumulate, EMULATE=INTERPRETED, ACC=acc_of(q),
        BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=8,  # with 4 it spills some of bfloat16
        **keys.pair_arguments(x), **keys.row_arguments(),
    )  # fmt: skip
    return dk if v is None or dtype is None else table_gradient(x, keys, v, normalize, dtype)


def table_gradient(x: Side, keys: Paired, v: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a table's rows: of row m the sum of b_m v_ih q_i over its uses, projected."""
    assert keys.indices is not None
    table = Side(keys.rows, keys.inverse, zero_row=keys.zero_row)
    uses = partners_by_target(Side(x.rows, None), v, None, keys.indices.flatten(), len(table), keys.columns())
    return finish(None, table, keys.rows.shape[1], normalize, uses, None, dtype)
