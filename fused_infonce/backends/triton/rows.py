"""Launchers of kernels/rows.py: the quantities that each row of a side has by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...kernels.rows import scale_kernel, side_kernel
from ..contract import EPS, LOG2E, KeySet, RowStatistics
from ..indexing import part_of
from . import tiles
from .launch import (
    INTERPRETED,
    Side,
    acc_of,
    cdiv,
    contiguous,
    contiguous_rows,
    in_base_2,
    padded_rows,
    run,
    temperature_arguments,
    vector,
)

# what `side_kernel` makes of rows with a temperature, statistics or targets
OF_MORE = ("S_ptr", "U_ptr", "R_ptr", "W_ptr", "B_ptr", "TARGET_ptr", "POS_ptr", "PADDED_Y_ptr")


def side(
    keys: KeySet, normalize: bool, temperature: Tensor | None = None, *, statistics: RowStatistics | None = None,
    u: Tensor | None = None, positive: tuple[KeySet, Tensor | None] | None = None, ceiling: Tensor | None = None,
    shifted: bool = True,
) -> tuple[Side, Tensor | None]:  # fmt: skip
    """Return a set of rows made ready for tile passes, and the (N,) logits of its targets if asked for.

    temperature: of the direction whose rows they are; statistics, u: of that direction, for its gradients
    positive: the set that holds the rows' targets, and the targets
    shifted: whether a maximum of the statistics may be other than 0
    """
    x, ids = contiguous_rows(keys.rows), contiguous(keys.ids)
    padded = padded_rows(x)
    inverse = vector(x, x.shape[0]) if normalize else contiguous(keys.scale)
    scale = None if temperature is None else vector(x, x.shape[0])
    weight = None if u is None else torch.empty_like(u)
    pos = None if positive is None else vector(x, x.shape[0])
    if normalize or temperature is not None or padded is not None:
        others, target = positive or (None, None)
        y = None if others is None else contiguous_rows(others.rows)
        run(
            side_kernel, **_rows_arguments(x, padded, y), **temperature_arguments(temperature), A_ptr=inverse,
            S_ptr=scale, U_ptr=u, R_ptr=None if statistics is None else statistics.scale, W_ptr=weight,
            B_ptr=None if others is None or normalize else contiguous(others.scale), TARGET_ptr=target, POS_ptr=pos,
            PADDED_Y_ptr=None, at_eps=1 / EPS, NORMALIZE=normalize,
        )  # fmt: skip
    guide, norms = (None, None) if keys.guide is None else _guide(contiguous_rows(keys.guide))
    shift = statistics.maximum if statistics is not None and shifted else None
    zero_row = 1 / EPS if normalize else math.inf
    rows = x if padded is None else padded
    bias = in_base_2(keys.bias)
    return Side(rows, inverse, ids, scale, shift, weight, guide, norms, contiguous(ceiling), bias, zero_row), pos


def _guide(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a guide's rows as tile passes read them, and 1 / max(|g_i|, EPS), 0 for those that count as zero."""
    padded = padded_rows(x)
    return x if padded is None else padded, inverse_norms(x, padded, at_eps=0.0)


def inverse_norms(x: Tensor, padded: Tensor | None = None, at_eps: float = 1 / EPS) -> Tensor:
    """Return 1 / max(|x_i|, EPS) of rows, `at_eps` of those that count as zero; padded: memory for their copy."""
    norms = vector(x, x.shape[0])
    none: dict[str, Any] = dict.fromkeys(OF_MORE)
    run(
        side_kernel, **_rows_arguments(x, padded, None), **temperature_arguments(None), **none, A_ptr=norms,
        at_eps=at_eps, NORMALIZE=True,
    )  # fmt: skip
    return norms


def _rows_arguments(x: Tensor, padded: Tensor | None, y: Tensor | None) -> dict[str, Any]:
    """Return the arguments that describe rows x, memory for their copy, and the rows y that hold their targets."""
    block_m, block_d = tiles.row_tile(tiles.architecture(x.device), x.shape[1])
    return {
        "grid": (cdiv(x.shape[0], block_m),), "X_ptr": x, "Y_ptr": y, "size_x": x.shape[0], "D": x.shape[1],
        "PADDED_ptr": padded, "width": 0 if padded is None else padded.shape[1],
        "size_y": 0 if y is None else y.shape[0], "stride_xm": x.stride(0),
        "stride_yn": 0 if y is None else y.stride(0), "eps": EPS, "log2e": LOG2E, "ACC": acc_of(x),
        "BLOCK_M": block_m, "BLOCK_D": block_d,
    }  # fmt: skip


def scaled_rows(
    x: Side, rows: slice, u: Tensor, statistics: RowStatistics, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Return factors RAISE a_i u_i 2^(n_i - m_i) r_i / t_i of some rows, n their shifts, and these rows times them."""
    part = part_of(x.rows, rows)
    inverse, shift = (None if v is None else part_of(v, rows) for v in (x.inverse, x.shift))
    out, factor = torch.empty(part.shape, dtype=part.dtype, device=part.device), torch.empty_like(u)
    block_m, block_d = tiles.row_tile(tiles.architecture(part.device), part.shape[1])
    run(
        scale_kernel, (cdiv(part.shape[0], block_m),),
        X_ptr=part, A_ptr=inverse, U_ptr=u, N_ptr=shift, M_ptr=statistics.maximum, R_ptr=statistics.scale,
        F_ptr=factor, OUT_ptr=out, size_x=part.shape[0], D=part.shape[1], stride_xm=part.stride(0), zero_row=x.zero_row,
        EMULATE=INTERPRETED, ACC=acc_of(part), BLOCK_M=block_m, BLOCK_D=block_d, **temperature_arguments(temperature),
    )  # fmt: skip
    return factor, out


def without_zero_rows(inverse: Tensor | None, zero_row: float) -> Tensor | None:
    """Return inverse norms as gradients take them: 0 for rows that count as zero."""
    return inverse if inverse is None or zero_row == math.inf else inverse.masked_fill(inverse >= zero_row, 0)
