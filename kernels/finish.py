"""The last pass over a gradient: the positive in full precision, the projection, one rounding."""

import triton
import triton.language as tl

from .tile import cast, live, load_rows, load_vector


@triton.jit
def pair_weight(V_ptr, TEMPERATURE_ptr, stride_t, rows, valid):
    """Return v_i / t_i of queries; 0 where not valid."""
    v = tl.load(V_ptr + rows, mask=valid, other=0.0)
    return v / tl.load(TEMPERATURE_ptr + rows * stride_t, mask=valid, other=1.0)


@triton.jit
def positive_part(
    Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr,
    a, offs_m, offs_d, size_x, size_z, D, stride_zn, stride_t,
    zero_row: tl.constexpr, MUTUAL: tl.constexpr, ACC: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return the sum of w z over the partners of each row: (BLOCK_M, BLOCK_D), w = v / t of the pair's query times a b.

    Without STARTS, row i has one partner z_{T[i]} (z_i without T) and i is the query; MUTUAL: so is the partner. With
    STARTS, the partners of row i are the queries z_o, o in T[STARTS[i] : STARTS[i + 1]], summed in an order that does
    not depend on other rows.
    """
    inside = offs_m < size_x
    if STARTS_ptr is None:
        partner = offs_m.to(tl.int64)
        if TARGET_ptr is not None:
            partner = tl.load(TARGET_ptr + offs_m, mask=inside, other=-1)
        valid = inside & (partner >= 0) & (partner < size_z)
        partner = tl.where(valid, partner, size_z)
        w = pair_weight(V_ptr, TEMPERATURE_ptr, stride_t, offs_m, valid)
        if MUTUAL:
            w += pair_weight(V_ptr, TEMPERATURE_ptr, stride_t, partner, valid)
        w = w * a * live(load_vector(B_ptr, partner, size_z, 1.0, ACC), zero_row)
        z = load_rows(Z_ptr, partner, stride_zn, size_z, offs_d, D)
        part = w[:, None] * z.to(ACC)
    else:
        start = tl.load(STARTS_ptr + offs_m, mask=inside, other=0)
        end = tl.load(STARTS_ptr + offs_m + 1, mask=inside, other=0)
        part = tl.zeros((offs_m.shape[0], offs_d.shape[0]), ACC)
        for first in range(0, tl.max(end - start, 0), BLOCK_E):
            offs_e = start[:, None] + first + tl.arange(0, BLOCK_E)[None, :]
            valid = offs_e < end[:, None]
            partner = tl.load(TARGET_ptr + offs_e, mask=valid, other=0)
            w = pair_weight(V_ptr, TEMPERATURE_ptr, stride_t, partner, valid)
            w = w * a[:, None] * live(load_vector(B_ptr, partner, size_z, 1.0, ACC), zero_row)
            ptrs = (Z_ptr + partner * stride_zn)[:, :, None] + offs_d[None, None, :]
            z = tl.load(ptrs, mask=valid[:, :, None] & (offs_d < D)[None, None, :], other=0.0)
            part += tl.sum(w[:, :, None] * z.to(ACC), 1)
    return part


@triton.jit
def finished_rows(
    G_ptr, F_ptr, Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, UNSCALE_ptr,
    a, offs_m, offs_d, slots, size_x, size_z, D, stride_gm, stride_zn, stride_t,
    zero_row: tl.constexpr, MUTUAL: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return g_i = unscale f_i sum over slots of G + the positives' part: (BLOCK_M, BLOCK_D)."""
    g = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    if G_ptr is not None:
        for slot in range(slots):
            slot_ptr = G_ptr + tl.cast(slot, tl.int64) * size_x * stride_gm
            g += load_rows(slot_ptr, offs_m, stride_gm, size_x, offs_d, D)
    if F_ptr is not None:
        g *= load_vector(F_ptr, offs_m, size_x, 1.0, ACC)[:, None]
    if UNSCALE_ptr is not None:
        g *= tl.load(UNSCALE_ptr)
    if Z_ptr is not None:
        g += positive_part(
            Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, a, offs_m, offs_d, size_x, size_z, D,
            stride_zn, stride_t, zero_row, MUTUAL, ACC, BLOCK_E,
        )  # fmt: skip
    return g


@triton.jit
def finish_kernel(
    G_ptr, F_ptr, X_ptr, A_ptr, Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, UNSCALE_ptr, DX_ptr,
    slots, size_x, size_z, D, stride_gm, stride_xm, stride_zn, stride_t,
    zero_row: tl.constexpr, MUTUAL: tl.constexpr, PROJECT: tl.constexpr, EMULATE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write dx_i = g_i - a_i^2 (g_i . x_i) x_i, or g_i without PROJECT; only D components of any row are read."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    a = live(load_vector(A_ptr, offs_m, size_x, 1.0, ACC), zero_row)
    radial = tl.zeros((BLOCK_M,), ACC)
    if PROJECT:
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            g = finished_rows(
                G_ptr, F_ptr, Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, UNSCALE_ptr, a, offs_m,
                offs_d, slots, size_x, size_z, D, stride_gm, stride_zn, stride_t, zero_row, MUTUAL, ACC, BLOCK_M,
                BLOCK_D, BLOCK_E,
            )  # fmt: skip
            x = load_rows(X_ptr, offs_m, stride_xm, size_x, offs_d, D).to(ACC)
            radial += tl.sum(g * x, 1)
        radial = (radial * a) * a
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        g = finished_rows(
            G_ptr, F_ptr, Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, UNSCALE_ptr, a, offs_m, offs_d,
            slots, size_x, size_z, D, stride_gm, stride_zn, stride_t, zero_row, MUTUAL, ACC, BLOCK_M, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        if PROJECT:
            g -= radial[:, None] * load_rows(X_ptr, offs_m, stride_xm, size_x, offs_d, D).to(ACC)
        ptrs = DX_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(
            ptrs, cast(g, DX_ptr.dtype.element_ty, EMULATE), mask=(offs_m[:, None] < size_x) & (offs_d[None, :] < D)
        )
