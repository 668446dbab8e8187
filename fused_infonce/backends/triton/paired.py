"""Launchers of kernels/paired.py: keys that belong to one query each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.paired import paired_dots_kernel, paired_gradient_kernel, paired_statistics_kernel
from ..contract import EPS, LOG2E, KeySet
from . import tiles
from .launch import INTERPRETED, Side, acc_of, cdiv, contiguous, contiguous_rows, id_pointers, ids_a_row, run, vector
from .statistics import SLOTS


class Paired(NamedTuple):
    """Keys (N, H, D) of one query each, with their dot products and inverse norms or scales, (N, H)."""

    rows: Tensor
    dots: Tensor
    inverse: Tensor | None
    ids: Tensor | None
    zero_row: float
    bias: Tensor | None = None  # in base 2; None: 0


def paired_keys(q: Tensor, keys: KeySet, normalize: bool) -> Paired:
    """Return keys (N, H, D) with their dot products and inverse norms, from one reading of them."""
    k = contiguous_rows(keys.rows)
    n, h, d = k.shape
    dots = vector(q, n * h)
    inverse = vector(q, n * h) if normalize else contiguous(keys.scale)
    block_m, block_h, block_d = tiles.paired_tile(tiles.architecture(q.device), h, d)
    run(
        paired_dots_kernel, (cdiv(n, block_m), cdiv(h, block_h)),
        Q_ptr=q, K_ptr=k, D_ptr=dots, B_ptr=inverse, size_q=n, H=h, D=d,
        stride_qm=q.stride(0), stride_km=k.stride(0), stride_kh=k.stride(1), eps=EPS, at_eps=1 / EPS,
        NORMALIZE=normalize, ACC=acc_of(q), BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_D=block_d,
    )  # fmt: skip
    bias = None if keys.bias is None else keys.bias * LOG2E
    return Paired(k, dots, inverse, contiguous(keys.ids), 1 / EPS if normalize else math.inf, bias)


def paired_states(x: Side, keys: Paired) -> Tensor:
    """Return the (1, SLOTS, N) states of the rows of x over their own keys."""
    n, h, d = keys.rows.shape
    states = keys.dots.new_empty((1, SLOTS, n))
    x_ids, key_ids = id_pointers(x, keys)
    block_m, block_h, _ = tiles.paired_tile(tiles.architecture(x.rows.device), h, d)
    run(
        paired_statistics_kernel, (cdiv(n, block_m),),
        D_ptr=keys.dots, B_ptr=keys.inverse, C_ptr=keys.bias, A_ptr=x.inverse, S_ptr=x.scale, QI_ptr=x_ids,
        KI_ptr=key_ids, ROWS_ptr=states, size_q=n, H=h, IDS=ids_a_row(x_ids, x.rows), ACC=acc_of(x.rows),
        BLOCK_M=block_m, BLOCK_H=block_h,
    )  # fmt: skip
    return states


def paired_gradient(
    g: Tensor | None, x: Side, keys: Paired, normalize: bool, unscale: Tensor | None, dtype: torch.dtype | None,
    accumulate: bool, biases: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Return the gradient of paired keys in `dtype`, and add their part of the rows' to g (slots, N, width of x).

    biases: (N, H), which that of the biases is written into.
    """
    (n, h, d), q = keys.rows.shape, x.rows
    dk = None if dtype is None else torch.empty((n, h, d), dtype=dtype, device=keys.rows.device)
    x_ids, key_ids = id_pointers(x, keys)
    block_m, block_h, block_d = tiles.paired_tile(tiles.architecture(x.rows.device), h, d)
    run(
        paired_gradient_kernel, (cdiv(n, block_m), cdiv(d, block_d)),
        Q_ptr=q, K_ptr=keys.rows, D_ptr=keys.dots, B_ptr=keys.inverse, C_ptr=keys.bias,
        A_ptr=x.inverse, S_ptr=x.scale, N_ptr=x.shift, U_ptr=x.weight, SHARE_ptr=None if biases is None else x.share,
        UNSCALE_ptr=unscale, QI_ptr=x_ids, KI_ptr=key_ids, G_ptr=g, DK_ptr=dk, DC_ptr=biases, size_q=n, H=h, D=d,
        stride_qm=q.stride(0), stride_km=keys.rows.stride(0), stride_kh=keys.rows.stride(1), stride_gm=q.shape[1],
        zero_row=keys.zero_row, IDS=ids_a_row(x_ids, x.rows), NORMALIZE=normalize, ACCUMULATE=accumulate,
        EMULATE=INTERPRETED, ACC=acc_of(x.rows), BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_D=block_d,
    )  # fmt: skip
    return dk
