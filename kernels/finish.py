"""The last pass over a gradient: the positives in full precision, the projection, one rounding."""

import triton
import triton.language as tl

from .tile import cast, live, load_rows, load_vector


@triton.jit
def pair_weight(V_ptr, TEMPERATURE_ptr, stride_t, rows, valid):
    """Return v_i / t_i of queries, or v_i without temperatures; 0 where not valid."""
    v = tl.load(V_ptr + rows, mask=valid, other=0.0)
    if TEMPERATURE_ptr is not None:
        v = v / tl.load(TEMPERATURE_ptr + rows * stride_t, mask=valid, other=1.0)
    return v


@triton.jit
def sum_of_queries(
    Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, ORDER_ptr,
    first, end, offs_d, size_z, uses, D, stride_zn, stride_t,
    zero_row: tl.constexpr, ACC: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return the sums over e in [first_i, end_i) of v / t b z of query ORDER[e], (len(first), len(offs_d)).

    uses: ORDER and v are of so many uses of keys by each query, one query's after another's; or None: of queries.
    """
    total = tl.zeros((first.shape[0], offs_d.shape[0]), ACC)
    for start in range(0, tl.max(end - first, 0), BLOCK_E):
        offs_e = first[:, None] + start + tl.arange(0, BLOCK_E)[None, :]
        valid = offs_e < end[:, None]
        query = tl.load(ORDER_ptr + offs_e, mask=valid, other=0)
        w = pair_weight(V_ptr, TEMPERATURE_ptr, stride_t, query, valid)
        if uses is not None:
            query = query // uses
        w = w * live(load_vector(B_ptr, query, size_z, 1.0, ACC), zero_row)
        ptrs = (Z_ptr + query * stride_zn)[:, :, None] + offs_d[None, None, :]
        z = tl.load(ptrs, mask=valid[:, :, None] & (offs_d < D)[None, None, :], other=0.0)
        total += tl.sum(w[:, :, None] * z.to(ACC), 1)
    return total


@triton.jit
def parts_kernel(
    Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, ORDER_ptr, SORTED_ptr, STARTS_ptr, PARTS_ptr,
    size_x, size_z, uses, D, stride_zn, stride_t,
    zero_row: tl.constexpr, PART: tl.constexpr, ACC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write sums of v / t b z over up to PART queries of one key each, for keys of at least PART queries.

    The k-th part of key j is in slot STARTS[j] // (PART / 2) + k: no two keys share one. The key that a slot may belong
    to is the target of the last of the PART / 2 sorted queries that lie there.
    """
    slot, half = tl.program_id(0), PART // 2
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    key = tl.load(SORTED_ptr + (slot + 1) * half - 1)
    inside = (key >= 0) & (key < size_x)
    start = tl.load(STARTS_ptr + key, mask=inside, other=0)
    end = tl.load(STARTS_ptr + key + 1, mask=inside, other=0)
    first = start + (slot - start // half) * PART
    if (end - start >= PART) & (first < end):
        lane = tl.zeros((1,), tl.int64)
        total = sum_of_queries(
            Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, ORDER_ptr, lane + first, lane + tl.minimum(first + PART, end), offs_d,
            size_z, uses, D, stride_zn, stride_t, zero_row, ACC, BLOCK_E,
        )  # fmt: skip
        ptrs = PARTS_ptr + (lane + slot)[:, None] * D + offs_d[None, :]
        tl.store(ptrs, total, mask=(offs_d < D)[None, :])


@triton.jit
def sum_of_parts(
    PARTS_ptr, first, end, offs_d, D, stride_pn, ACC: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Return the sums over slots [first_i, end_i) of PARTS, (len(first), len(offs_d))."""
    total = tl.zeros((first.shape[0], offs_d.shape[0]), ACC)
    for start in range(0, tl.max(end - first, 0), BLOCK_P):
        slot = first[:, None] + start + tl.arange(0, BLOCK_P)[None, :]
        ptrs = (PARTS_ptr + slot * stride_pn)[:, :, None] + offs_d[None, None, :]
        inside = (slot < end[:, None])[:, :, None] & (offs_d < D)[None, None, :]
        total += tl.sum(tl.load(ptrs, mask=inside, other=0.0), 1)
    return total


@triton.jit
def positive_part(
    Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, PARTS_ptr,
    a, offs_m, offs_d, size_x, size_z, uses, D, stride_pn, stride_zn, stride_t,
    zero_row: tl.constexpr, MUTUAL: tl.constexpr, PART: tl.constexpr, ACC: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Return the sum of w z over the partners of each row: (BLOCK_M, BLOCK_D), w = v / t of the pair's query times a b.

    Without STARTS, row i has one partner z_{T[i]} (z_i without T) and i is the query; MUTUAL: so is the partner. With
    STARTS, the partners of row i are the queries z_o, o in T[STARTS[i] : STARTS[i + 1]], or with `uses` those of which
    o are uses, summed in an order that does not depend on other rows: PART or more from the sums of `parts_kernel`.
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
        many = end - start >= PART
        part = sum_of_queries(
            Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, start, tl.where(many, start, end), offs_d, size_z, uses,
            D, stride_zn, stride_t, zero_row, ACC, BLOCK_E,
        )  # fmt: skip
        if PARTS_ptr is not None:
            slot = start // (PART // 2)
            parts = tl.where(many, tl.cdiv(end - start, PART), 0)
            part += sum_of_parts(PARTS_ptr, slot, slot + parts, offs_d, D, stride_pn, ACC, BLOCK_P)
        part *= a[:, None]
    return part


@triton.jit
def finished_rows(
    G_ptr, F_ptr, Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, PARTS_ptr, UNSCALE_ptr,
    a, offs_m, offs_d, slots, size_x, size_z, uses, D, stride_gm, stride_pn, stride_zn, stride_t,
    zero_row: tl.constexpr, MUTUAL: tl.constexpr, PART: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
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
            Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, PARTS_ptr, a, offs_m, offs_d, size_x, size_z,
            uses, D, stride_pn, stride_zn, stride_t, zero_row, MUTUAL, PART, ACC, BLOCK_E, BLOCK_P,
        )  # fmt: skip
    return g


@triton.jit
def finish_kernel(
    G_ptr, F_ptr, X_ptr, A_ptr, Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, PARTS_ptr, UNSCALE_ptr,
    DX_ptr,
    slots, size_x, size_z, uses, D, stride_gm, stride_pn, stride_xm, stride_zn, stride_t,
    zero_row: tl.constexpr, MUTUAL: tl.constexpr, PART: tl.constexpr, PROJECT: tl.constexpr, WHOLE: tl.constexpr,
    EMULATE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write dx_i = g_i - a_i^2 (g_i . x_i) x_i, or g_i without PROJECT; only D components of any row are read.

    WHOLE: a block holds whole rows.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    a = live(load_vector(A_ptr, offs_m, size_x, 1.0, ACC), zero_row)
    radial = tl.zeros((BLOCK_M,), ACC)
    if PROJECT and not WHOLE:
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            g = finished_rows(
                G_ptr, F_ptr, Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, PARTS_ptr, UNSCALE_ptr,
                a, offs_m, offs_d, slots, size_x, size_z, uses, D, stride_gm, stride_pn, stride_zn, stride_t,
                zero_row, MUTUAL, PART, ACC, BLOCK_M, BLOCK_D, BLOCK_E, BLOCK_P,
            )  # fmt: skip
            x = load_rows(X_ptr, offs_m, stride_xm, size_x, offs_d, D).to(ACC)
            radial += tl.sum(g * x, 1)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        g = finished_rows(
            G_ptr, F_ptr, Z_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, STARTS_ptr, PARTS_ptr, UNSCALE_ptr,
            a, offs_m, offs_d, slots, size_x, size_z, uses, D, stride_gm, stride_pn, stride_zn, stride_t,
            zero_row, MUTUAL, PART, ACC, BLOCK_M, BLOCK_D, BLOCK_E, BLOCK_P,
        )  # fmt: skip
        if PROJECT:
            x = load_rows(X_ptr, offs_m, stride_xm, size_x, offs_d, D).to(ACC)
            if WHOLE:
                radial = tl.sum(g * x, 1)
            g -= ((radial * a) * a)[:, None] * x
        ptrs = DX_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(
            ptrs, cast(g, DX_ptr.dtype.element_ty, EMULATE), mask=(offs_m[:, None] < size_x) & (offs_d[None, :] < D)
        )
