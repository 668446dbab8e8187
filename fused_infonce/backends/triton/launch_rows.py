"""One function per kernel that works on rows one by one: what a side needs, the last pass over its gradient, and
negatives of one row each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.finish import finish_kernel
from ...kernels.paired import own_dots_kernel, own_gradient_kernel, own_statistics_kernel
from ...kernels.rows import scale_kernel, side_kernel
from ..contract import EPS
from . import tiles
from .launch import INTERPRETED, Side, acc_of, cdiv, id_pointers, run, vector


class Own(NamedTuple):
    """Negatives (N, H, D) of one row each, with their dot products and inverse norms or scales, (N, H)."""

    rows: Tensor
    dots: Tensor
    inverse: Tensor | None
    ids: Tensor | None
    zero_row: float


def temperature_arguments(temperature: Tensor | None) -> dict[str, Any]:
    """(1,) for all rows or (N,)."""
    return {"TEMPERATURE_ptr": temperature, "stride_t": 0 if temperature is None or temperature.shape[0] == 1 else 1}


def inverse_norms(x: Tensor, at_eps: float) -> Tensor:
    """1 / max(|x_i|, EPS); `at_eps` is its value for rows with a norm up to EPS."""
    a = vector(x, x.shape[0])
    _side(x, a, True, at_eps)
    return a


def side(
    x: Tensor,
    ids: Tensor | None,
    scales: Tensor | None,
    normalize: bool,
    temperature: Tensor | None = None,
    *,
    softmax: Tensor | None = None,
    u: Tensor | None = None,
    positive: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
) -> tuple[Side, Tensor | None]:
    """The rows x made ready for tile passes; with a `temperature` for a direction of which they are the rows, with
    softmax and u for its gradients. `positive`: (rows, scales, target) of the keys, for the (N,) logits of the targets.
    """
    inverse = vector(x, x.shape[0]) if normalize else scales
    scale = None if temperature is None else vector(x, x.shape[0])
    shift, r = (None, None) if softmax is None else softmax
    weight = None if u is None else torch.empty_like(u)
    pos = None if positive is None else vector(x, x.shape[0])
    if normalize or temperature is not None:
        y, y_scales, target = positive or (None, None, None)
        _side(
            x, inverse, normalize, 1 / EPS, temperature, S_ptr=scale, U_ptr=u, R_ptr=r, W_ptr=weight, Y_ptr=y,
            B_ptr=y_scales, T_ptr=target, POS_ptr=pos,
        )  # fmt: skip
    zero_row = 1 / EPS if normalize else math.inf
    return Side(x, inverse, ids, scale, shift, weight, zero_row=zero_row), pos


SIDE = dict.fromkeys(("S_ptr", "U_ptr", "R_ptr", "W_ptr", "Y_ptr", "B_ptr", "T_ptr", "POS_ptr"))


def _side(
    x: Tensor, inverse: Tensor | None, normalize: bool, at_eps: float, t: Tensor | None = None, **wanted: Tensor | None
) -> None:
    y = wanted.get("Y_ptr")
    block_m, block_d = tiles.row_tile(tiles.architecture(x.device), x.shape[1])
    run(
        side_kernel, (cdiv(x.shape[0], block_m),),
        X_ptr=x, A_ptr=inverse, size_x=x.shape[0], size_y=0 if y is None else y.shape[0], D=x.shape[1],
        stride_xm=x.stride(0), stride_yn=0 if y is None else y.stride(0), eps=EPS, at_eps=at_eps, NORMALIZE=normalize,
        ACC=acc_of(x), BLOCK_M=block_m, BLOCK_D=block_d, **temperature_arguments(t), **SIDE | wanted,
    )  # fmt: skip


def scaled_rows(x: Side, rows: slice, u: Tensor, softmax: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """(factors, some rows times them): a_i u_i 2^-m_i r_i / t_i."""
    part, inverse = (v if v is None else part_of(v, rows) for v in (x.rows, x.inverse))
    assert part is not None
    out, factor, (m, r) = torch.empty(part.shape, dtype=part.dtype, device=part.device), torch.empty_like(u), softmax
    block_m, block_d = tiles.row_tile(tiles.architecture(part.device), part.shape[1])
    run(
        scale_kernel, (cdiv(part.shape[0], block_m),),
        X_ptr=part, A_ptr=inverse, U_ptr=u, M_ptr=m, R_ptr=r, F_ptr=factor, OUT_ptr=out, size_x=part.shape[0],
        D=part.shape[1], stride_xm=part.stride(0), zero_row=x.zero_row, EMULATE=INTERPRETED, ACC=acc_of(part),
        BLOCK_M=block_m, BLOCK_D=block_d, **temperature_arguments(temperature),
    )  # fmt: skip
    return factor, out


def part_of(x: Tensor, rows: slice) -> Tensor:
    """Those rows of x (N, ...), or x itself where they are all or it has one for all."""
    return x if x.shape[0] == 1 or rows.stop - rows.start == x.shape[0] else x[rows]


def without_zero_rows(inverse: Tensor | None, zero_row: float) -> Tensor | None:
    """Inverse norms as gradients take them: 0 for rows that count as zero."""
    return inverse if inverse is None or zero_row == math.inf else inverse.masked_fill(inverse >= zero_row, 0)


class Partners(NamedTuple):
    """What the positives add to each row of one side: see `positive_part` in kernels/finish.py."""

    rows: Tensor
    inverse: Tensor | None
    v: Tensor  # of the queries, as is the temperature
    temperature: Tensor
    indices: Tensor | None = None
    starts: Tensor | None = None
    mutual: bool = False


def finish(
    g: Tensor | None,
    x: Side,
    project: bool,
    partners: Partners | None,
    unscale: Tensor | None,
    dtype: torch.dtype,
    factor: Tensor | None = None,
) -> Tensor:
    """The gradient of x in `dtype` from accumulators g (slots, n, D), times a factor a row; None: zeros."""
    n, d = x.rows.shape
    in_place = g is not None and g.shape[0] == 1 and g.dtype == dtype  # a program reads and writes rows of its own
    dx = g[0] if in_place and g is not None else torch.empty((n, d), dtype=dtype, device=x.rows.device)
    z, inverse, v, t, indices, starts, mutual = partners or (None, None, None, None, None, None, False)
    block_m, block_d, block_e = tiles.finish_tile(tiles.architecture(x.rows.device), d, gather=starts is not None)
    warps = 8 if starts is None else 4  # with which nothing spills in the default cases of tests/aot.py
    run(
        finish_kernel, (cdiv(n, block_m),),
        G_ptr=g, F_ptr=factor, X_ptr=x.rows, A_ptr=x.inverse, Z_ptr=z, B_ptr=inverse, V_ptr=v, T_ptr=indices,
        STARTS_ptr=starts, UNSCALE_ptr=unscale, DX_ptr=dx, slots=0 if g is None else g.shape[0], size_x=n,
        size_z=0 if z is None else z.shape[0], D=d, stride_xm=x.rows.stride(0),
        stride_zn=0 if z is None else z.stride(0), zero_row=x.zero_row, MUTUAL=mutual, PROJECT=project,
        EMULATE=INTERPRETED, ACC=acc_of(x.rows), BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_E=block_e,
        num_warps=warps, **temperature_arguments(t),
    )  # fmt: skip
    return dx


def own_negatives(q: Tensor, k: Tensor, normalize: bool, scale: Tensor | None, ids: Tensor | None) -> Own:
    """Dot products and inverse norms of (N, H, D) negatives, from one reading of them."""
    n, h, d = k.shape
    dots = vector(q, n * h)
    inverse = vector(q, n * h) if normalize else scale
    block_m, block_h, block_d = tiles.own_tile(tiles.architecture(q.device), h, d)
    run(
        own_dots_kernel, (cdiv(n, block_m), cdiv(h, block_h)),
        Q_ptr=q, K_ptr=k, D_ptr=dots, B_ptr=inverse, size_q=n, H=h, D=d,
        stride_qm=q.stride(0), stride_km=k.stride(0), stride_kh=k.stride(1), eps=EPS, at_eps=1 / EPS,
        NORMALIZE=normalize, ACC=acc_of(q), BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_D=block_d,
    )  # fmt: skip
    return Own(k, dots, inverse, ids, 1 / EPS if normalize else math.inf)


def own_states(x: Side, own: Own) -> Tensor:
    """(1, 3, N) states of the rows of x over their own negatives."""
    n, h, d = own.rows.shape
    states = own.dots.new_empty((1, 3, n))
    x_ids, own_ids = id_pointers(x, own)
    block_m, block_h, _ = tiles.own_tile(tiles.architecture(x.rows.device), h, d)
    run(
        own_statistics_kernel, (cdiv(n, block_m),),
        D_ptr=own.dots, B_ptr=own.inverse, A_ptr=x.inverse, S_ptr=x.scale, QI_ptr=x_ids, KI_ptr=own_ids,
        ROWS_ptr=states, size_q=n, H=h, ACC=acc_of(x.rows), BLOCK_M=block_m, BLOCK_H=block_h,
    )  # fmt: skip
    return states


def own_gradient(
    g: Tensor | None,
    x: Side,
    own: Own,
    normalize: bool,
    unscale: Tensor | None,
    dtype: torch.dtype | None,
    accumulate: bool,
) -> Tensor | None:
    """The gradient of rows' own negatives in `dtype`, adding to g (slots, N, D) what they give the rows of x."""
    n, h, d = own.rows.shape
    dk = None if dtype is None else torch.empty((n, h, d), dtype=dtype, device=own.rows.device)
    x_ids, own_ids = id_pointers(x, own)
    block_m, block_h, block_d = tiles.own_tile(tiles.architecture(x.rows.device), h, d)
    run(
        own_gradient_kernel, (cdiv(n, block_m), cdiv(d, block_d)),
        Q_ptr=x.rows, K_ptr=own.rows, D_ptr=own.dots, B_ptr=own.inverse, A_ptr=x.inverse, S_ptr=x.scale, N_ptr=x.shift,
        U_ptr=x.weight, UNSCALE_ptr=unscale, QI_ptr=x_ids, KI_ptr=own_ids, G_ptr=g, DK_ptr=dk, size_q=n, H=h, D=d,
        stride_qm=x.rows.stride(0), stride_km=own.rows.stride(0), stride_kh=own.rows.stride(1),
        zero_row=own.zero_row, NORMALIZE=normalize, ACCUMULATE=accumulate, EMULATE=INTERPRETED, ACC=acc_of(x.rows),
        BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_D=block_d,
    )  # fmt: skip
    return dk
