"""Negatives that belong to one row: K (N, H, D), k_ih against q_i only. Dots d and inverse norms b are (N, H)."""

import triton
import triton.language as tl

from .gradient import direction, exponential, term
from .rows import inverse_norm
from .statistics import store_state, update
from .tile import FLOOR, cast, live, load_rows, load_vector


@triton.jit
def cube(ptr, offs_m, offs_h, offs_d, size_q, H, D, stride_m, stride_h):
    """Return pointers to (BLOCK_M, BLOCK_H, BLOCK_D) of a (N, H, D) tensor, and which of them are inside."""
    rows = ptr + offs_m.to(tl.int64)[:, None] * stride_m + offs_h.to(tl.int64)[None, :] * stride_h
    inside = (offs_m < size_q)[:, None] & (offs_h < H)[None, :]
    return rows[:, :, None] + offs_d[None, None, :], inside[:, :, None] & (offs_d < D)[None, None, :]


@triton.jit
def load_paired(
    D_ptr, B_ptr, QI_ptr, KI_ptr, offs_m, offs_h, size_q, H, IDS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return d, b and which pairs are negatives, (BLOCK_M, BLOCK_H) each, of a block."""
    keep = (offs_m < size_q)[:, None] & (offs_h < H)[None, :]
    offs = offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
    d = tl.load(D_ptr + offs, mask=keep, other=0.0)
    if B_ptr is None:
        b = tl.full(keep.shape, 1.0, ACC)
    else:
        b = tl.load(B_ptr + offs, mask=keep, other=0.0)
    if QI_ptr is not None:
        inside = keep
        for k in tl.static_range(IDS):
            paired_ids = tl.load(KI_ptr + offs * IDS + k, mask=inside, other=0)
            ids = tl.load(QI_ptr + offs_m * IDS + k, mask=offs_m < size_q, other=0)
            keep = keep & (paired_ids != ids[:, None])
    return d, b, keep


@triton.jit
def load_biases(C_ptr, offs_m, offs_h, H, keep):
    """Return the biases of negatives, (BLOCK_M, BLOCK_H)."""
    return tl.load(C_ptr + offs_m.to(tl.int64)[:, None] * H + offs_h[None, :], mask=keep, other=0.0)


@triton.jit
def paired_dots_kernel(
    Q_ptr, K_ptr, D_ptr, B_ptr,
    size_q, H, D, stride_qm, stride_km, stride_kh,
    eps: tl.constexpr, at_eps: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write d_ih = q_i . k_ih and, with NORMALIZE, b_ih = 1 / max(|k_ih|, eps)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dots = tl.zeros((BLOCK_M, BLOCK_H), ACC)
    square = tl.zeros((BLOCK_M, BLOCK_H), ACC)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        q = load_rows(Q_ptr, offs_m, stride_qm, size_q, offs_d, D).to(ACC)
        ptrs, inside = cube(K_ptr, offs_m, offs_h, offs_d, size_q, H, D, stride_km, stride_kh)
        k = tl.load(ptrs, mask=inside, other=0.0).to(ACC)
        dots += tl.sum(k * q[:, None, :], 2)
        square += tl.sum(k * k, 2)
    offs = offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
    inside = (offs_m < size_q)[:, None] & (offs_h < H)[None, :]
    tl.store(D_ptr + offs, dots, mask=inside)
    if NORMALIZE:
        tl.store(B_ptr + offs, inverse_norm(square, eps, at_eps), mask=inside)


@triton.jit
def paired_statistics_kernel(
    D_ptr, B_ptr, C_ptr, A_ptr, S_ptr, QI_ptr, KI_ptr, ROWS_ptr,
    size_q, H,
    IDS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write states of rows over their own negatives, s_ih = a_i b_ih d_ih s_i + c_ih, into slot 0 of ROWS."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    a = load_vector(A_ptr, offs_m, size_q, 1.0, ACC)
    s = load_vector(S_ptr, offs_m, size_q, 1.0, ACC)
    m = tl.full((BLOCK_M,), FLOOR, ACC)
    l = tl.zeros((BLOCK_M,), ACC)
    x = tl.zeros((BLOCK_M,), ACC)
    for start_h in range(0, H, BLOCK_H):
        offs_h = start_h + tl.arange(0, BLOCK_H)
        d, b, keep = load_paired(D_ptr, B_ptr, QI_ptr, KI_ptr, offs_m, offs_h, size_q, H, IDS, ACC)
        v = tl.where(keep, d * (a[:, None] * b) * s[:, None], FLOOR)
        logits = v
        if C_ptr is not None:
            logits += load_biases(C_ptr, offs_m, offs_h, H, keep)
        m, l, x = update(m, l, x, logits, v, 1)
    store_state(ROWS_ptr, 0, offs_m, size_q, m, l, x)


@triton.jit
def paired_gradient_kernel(
    Q_ptr, K_ptr, D_ptr, B_ptr, C_ptr, A_ptr, S_ptr, N_ptr, U_ptr, SHARE_ptr, UNSCALE_ptr, QI_ptr, KI_ptr, G_ptr,
    DK_ptr, DC_ptr,
    size_q, H, D, stride_qm, stride_km, stride_kh, stride_gm,
    zero_row: tl.constexpr, IDS: tl.constexpr, NORMALIZE: tl.constexpr, ACCUMULATE: tl.constexpr,
    EMULATE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute g_i (+)= sum_h C_ih k_ih and dk_ih = unscale C_ih (q_i - b_ih^2 d_ih k_ih), for BLOCK_D components, and
    dc_ih = share_i 2^(s_ih - n_i) of the biases, share = u r."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    a = live(load_vector(A_ptr, offs_m, size_q, 1.0, ACC), zero_row)
    r, n, w = direction(S_ptr, N_ptr, U_ptr, a, offs_m, size_q, ACC)
    q = load_rows(Q_ptr, offs_m, stride_qm, size_q, offs_d, D).to(ACC)
    g = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start_h in range(0, H, BLOCK_H):
        offs_h = start_h + tl.arange(0, BLOCK_H)
        d, b, keep = load_paired(D_ptr, B_ptr, QI_ptr, KI_ptr, offs_m, offs_h, size_q, H, IDS, ACC)
        b = live(b, zero_row)
        bias = None
        if C_ptr is not None:
            bias = load_biases(C_ptr, offs_m, offs_h, H, keep)
        if DC_ptr is not None:
            share = load_vector(SHARE_ptr, offs_m, size_q, 0.0, ACC)
            dc = tl.where(keep, exponential(d, r[:, None], n[:, None], b, bias) * share[:, None], 0.0)
            offs = offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
            tl.store(DC_ptr + offs, dc, mask=(offs_m < size_q)[:, None] & (offs_h < H)[None, :])
        keep = keep & (b != 0.0) & (a != 0.0)[:, None]
        c = tl.where(keep, term(d, r[:, None], n[:, None], w[:, None], b, bias), 0.0)
        ptrs, inside = cube(K_ptr, offs_m, offs_h, offs_d, size_q, H, D, stride_km, stride_kh)
        k = tl.load(ptrs, mask=inside, other=0.0).to(ACC)
        g += tl.sum(c[:, :, None] * k, 1)
        if DK_ptr is not None:
            if UNSCALE_ptr is not None:
                c *= tl.load(UNSCALE_ptr)
            if NORMALIZE:
                tangent = q[:, None, :] - (d * b * b)[:, :, None] * k
            else:
                tangent = q[:, None, :]
            dk = cast(c[:, :, None] * tangent, DK_ptr.dtype.element_ty, EMULATE)
            ptrs, inside = cube(DK_ptr, offs_m, offs_h, offs_d, size_q, H, D, tl.cast(H, tl.int64) * D, D)
            tl.store(ptrs, dk, mask=inside)
    if G_ptr is not None:
        ptrs = G_ptr + offs_m.to(tl.int64)[:, None] * stride_gm + offs_d[None, :]
        inside = (offs_m < size_q)[:, None] & (offs_d < D)[None, :]
        if ACCUMULATE:
            g += tl.load(ptrs, mask=inside, other=0.0)
        tl.store(ptrs, g, mask=inside)
