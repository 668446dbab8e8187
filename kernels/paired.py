"""Negatives that belong to one row: K (N, H, D), k_ih against q_i only. Dots d and inverse norms b are (N, H).

With INDEX (N, H), K is a table of `size_k` rows, k_ih its row INDEX[i, h], and b and ids are of the table's rows: -1 is
no negative, and a dot with a row that is not there is NaN.
"""

import triton
import triton.language as tl

from .gradient import direction, exponential, slope, term
from .rows import inverse_norm
from .statistics import store_state, update
from .tile import FLOOR, cast, live, load_rows, load_vector


@triton.jit
def load_index(INDEX_ptr, offs_m, offs_h, size_q, H):
    """Return (BLOCK_M, BLOCK_H) of INDEX; -1 outside."""
    offs = offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
    return tl.load(INDEX_ptr + offs, mask=(offs_m < size_q)[:, None] & (offs_h < H)[None, :], other=-1)


@triton.jit
def cube(ptr, INDEX_ptr, offs_m, offs_h, offs_d, size_q, size_k, H, D, stride_m, stride_h):
    """Return pointers to (BLOCK_M, BLOCK_H, BLOCK_D) of a (N, H, D) tensor, and which of them are inside."""
    if INDEX_ptr is None:
        rows = ptr + offs_m.to(tl.int64)[:, None] * stride_m + offs_h.to(tl.int64)[None, :] * stride_h
        inside = (offs_m < size_q)[:, None] & (offs_h < H)[None, :]
    else:
        index = load_index(INDEX_ptr, offs_m, offs_h, size_q, H)
        rows = ptr + index * stride_m
        inside = (index >= 0) & (index < size_k)
    return rows[:, :, None] + offs_d[None, None, :], inside[:, :, None] & (offs_d < D)[None, None, :]


@triton.jit
def load_paired(
    D_ptr, B_ptr, QI_ptr, KI_ptr, INDEX_ptr, offs_m, offs_h, size_q, size_k, H, IDS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return d, b and which pairs are negatives, (BLOCK_M, BLOCK_H) each, of a block."""
    keep = (offs_m < size_q)[:, None] & (offs_h < H)[None, :]
    offs = offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
    d = tl.load(D_ptr + offs, mask=keep, other=0.0)
    there = keep
    if INDEX_ptr is not None:
        offs = load_index(INDEX_ptr, offs_m, offs_h, size_q, H)
        keep = offs != -1
        there = (offs >= 0) & (offs < size_k)
    if B_ptr is None:
        b = tl.full(keep.shape, 1.0, ACC)
    else:
        b = tl.load(B_ptr + offs, mask=there, other=0.0)
    if QI_ptr is not None:
        for k in tl.static_range(IDS):
            paired_ids = tl.load(KI_ptr + offs * IDS + k, mask=there, other=0)
            ids = tl.load(QI_ptr + offs_m * IDS + k, mask=offs_m < size_q, other=0)
            different = paired_ids != ids[:, None]
            if INDEX_ptr is not None:  # rather than | ~there, which Triton 3.6 gives layouts that do not compile
                different = different | (offs < 0) | (offs >= size_k)
            keep = keep & different
    return d, b, keep


@triton.jit
def load_biases(C_ptr, offs_m, offs_h, H, keep):
    """Return the biases of negatives, (BLOCK_M, BLOCK_H)."""
    return tl.load(C_ptr + offs_m.to(tl.int64)[:, None] * H + offs_h[None, :], mask=keep, other=0.0)


@triton.jit
def paired_dots_kernel(
    Q_ptr, K_ptr, D_ptr, B_ptr, INDEX_ptr,
    size_q, size_k, H, D, stride_qm, stride_km, stride_kh,
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
        ptrs, inside = cube(K_ptr, INDEX_ptr, offs_m, offs_h, offs_d, size_q, size_k, H, D, stride_km, stride_kh)
        k = tl.load(ptrs, mask=inside, other=0.0).to(ACC)
        dots += tl.sum(k * q[:, None, :], 2)
        square += tl.sum(k * k, 2)
    offs = offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
    inside = (offs_m < size_q)[:, None] & (offs_h < H)[None, :]
    if INDEX_ptr is not None:
        index = load_index(INDEX_ptr, offs_m, offs_h, size_q, H)
        dots = tl.where((index >= -1) & (index < size_k), dots, float("nan"))
    tl.store(D_ptr + offs, dots, mask=inside)
    if NORMALIZE:
        tl.store(B_ptr + offs, inverse_norm(square, eps, at_eps), mask=inside)


@triton.jit
def paired_statistics_kernel(
    D_ptr, B_ptr, C_ptr, A_ptr, S_ptr, QI_ptr, KI_ptr, INDEX_ptr, ROWS_ptr,
    size_q, size_k, H,
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
        d, b, keep = load_paired(D_ptr, B_ptr, QI_ptr, KI_ptr, INDEX_ptr, offs_m, offs_h, size_q, size_k, H, IDS, ACC)
        v = tl.where(keep, d * (a[:, None] * b) * s[:, None], FLOOR)
        logits = v
        if C_ptr is not None:
            logits += load_biases(C_ptr, offs_m, offs_h, H, keep)
        m, l, x = update(m, l, x, logits, v, 1)
    store_state(ROWS_ptr, 0, offs_m, size_q, m, l, x)


@triton.jit
def paired_gradient_kernel(
    Q_ptr, K_ptr, D_ptr, B_ptr, C_ptr, A_ptr, S_ptr, N_ptr, U_ptr, SHARE_ptr, UNSCALE_ptr, QI_ptr, KI_ptr, INDEX_ptr,
    G_ptr, DK_ptr, DC_ptr, V_ptr,
    size_q, size_k, H, D, stride_qm, stride_km, stride_kh, stride_gm,
    zero_row: tl.constexpr, IDS: tl.constexpr, NORMALIZE: tl.constexpr, ACCUMULATE: tl.constexpr,
    EMULATE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute g_i (+)= sum_h C_ih k_ih and dk_ih = unscale C_ih (q_i - b_ih^2 d_ih k_ih), for BLOCK_D components, and
    dc_ih = share_i 2^(s_ih - n_i) of the biases, share = u r.

    Of a table's rows the gradient is made elsewhere, from v_ih = unscale C_ih / b_ih.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    a = live(load_vector(A_ptr, offs_m, size_q, 1.0, ACC), zero_row)
    r, n, w = direction(S_ptr, N_ptr, U_ptr, a, offs_m, size_q, ACC)
    q = load_rows(Q_ptr, offs_m, stride_qm, size_q, offs_d, D).to(ACC)
    g = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start_h in range(0, H, BLOCK_H):
        offs_h = start_h + tl.arange(0, BLOCK_H)
        d, b, keep = load_paired(D_ptr, B_ptr, QI_ptr, KI_ptr, INDEX_ptr, offs_m, offs_h, size_q, size_k, H, IDS, ACC)
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
        ptrs, inside = cube(K_ptr, INDEX_ptr, offs_m, offs_h, offs_d, size_q, size_k, H, D, stride_km, stride_kh)
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
            ptrs, inside = cube(DK_ptr, None, offs_m, offs_h, offs_d, size_q, None, H, D, tl.cast(H, tl.int64) * D, D)
            tl.store(ptrs, dk, mask=inside)
        if V_ptr is not None:
            v = tl.where(keep, slope(d, r[:, None], n[:, None], w[:, None], b, bias), 0.0)
            if UNSCALE_ptr is not None:
                v *= tl.load(UNSCALE_ptr)
            offs = offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
            inside = (offs_m < size_q)[:, None] & (offs_h < H)[None, :]
            tl.store(V_ptr + offs, v, mask=inside & (tl.program_id(1) == 0))
    if G_ptr is not None:
        ptrs = G_ptr + offs_m.to(tl.int64)[:, None] * stride_gm + offs_d[None, :]
        inside = (offs_m < size_q)[:, None] & (offs_d < D)[None, :]
        if ACCUMULATE:
            g += tl.load(ptrs, mask=inside, other=0.0)
        tl.store(ptrs, g, mask=inside)
