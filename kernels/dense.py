"""Few scores, held all at once: their dot products and the states of their tiles, then losses and coefficients.

No program waits for another: the kernel of the scores leaves the states of each tile, (m, l, x) as in
kernels/statistics.py, and every program of the coefficients merges those of its own rows and columns. WORK has a
vector at each of the places below: a, b, s = log2(e) / t, pos, v = dL/dpos, w loss, sum_j s_ij dL/ds_ij, and one
number; after these lie the states of rows, a slot for each block of columns, and then those of columns.
"""

import triton
import triton.language as tl

from .finish import finish_kernel
from .gradient import coefficients
from .rows import divided, side_kernel
from .sigmoid import log_one_plus
from .statistics import STATE_SLOTS, add_tile, finished_state, load_states, store_state
from .tile import FLOOR, cast, dot, live, load_rows, load_vector, negatives

A, B, S, POS, V, LOSS_OF_ROW, LOGITS, UNSCALE = (tl.constexpr(k) for k in range(8))
VECTORS = tl.constexpr(8)
# read a value at a time, so that their alignment need not be looked at
VECTORS_OF_CALLERS = (
    "TARGET_ptr", "XI_ptr", "YI_ptr", "TEMPERATURE_ptr", "WEIGHT_ptr", "OFFSET_ptr", "LOSS_ptr", "DT_ptr"
)  # fmt: skip


@triton.jit
def row_loss(x, log2e: tl.constexpr, LOSS: tl.constexpr, ACC: tl.constexpr):
    """Return a loss of backends/row_losses.py and its slope at x = neg - pos."""
    if LOSS == "decoupled":
        there = x != float("-inf")
        value = tl.where(there, x, 0.0)
        slope = there.to(ACC)
    else:
        e = tl.exp2(-tl.abs(x) * log2e)
        value = tl.maximum(x, 0.0) + log_one_plus(e)
        slope = tl.where(x > 0.0, 1.0, e) / (1.0 + e)
    return value, slope


@triton.jit
def merged_state(S_ptr, slots, offs, size, SLOTS: tl.constexpr):
    """Return the state of rows from that of each slot, all of them loaded at once: SLOTS is at least `slots`."""
    slot = tl.arange(0, SLOTS)
    m, l, x = load_states(S_ptr, slot, offs, size, (slot < slots)[:, None] & (offs < size)[None, :])
    top = tl.max(m, 0)
    scale = tl.exp2(m - top[None, :])
    return top, tl.sum(l * scale, 0), tl.sum(x * scale, 0)


@triton.jit
def finished_rows(
    STATES_ptr, slots, WORK_ptr, TEMPERATURE_ptr, WEIGHT_ptr, OFFSET_ptr, weight, offs, size, stride_t, stride_w,
    ln2: tl.constexpr, log2e: tl.constexpr, LOSS: tl.constexpr, ACC: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Return of rows: w loss, u = dL/dneg, u (mean - pos), their maximum m, and u r / t.

    pos is without what OFFSET adds to it in the loss.
    """
    inside = offs < size
    m, l, x = merged_state(STATES_ptr, slots, offs, size, SLOTS)
    neg, mean, m, r = finished_state(m, l, x, ln2)
    pos = tl.load(WORK_ptr + POS * size + offs, mask=inside, other=0.0)
    margin = neg - pos
    if OFFSET_ptr is not None:
        margin -= tl.load(OFFSET_ptr + offs, mask=inside, other=0.0)
    value, u = row_loss(margin, log2e, LOSS, ACC)
    w = tl.full(offs.shape, weight, ACC)
    if WEIGHT_ptr is not None:
        w *= tl.load(WEIGHT_ptr + offs * stride_w, mask=inside, other=0.0)
    value = tl.where(w == 0.0, 0.0, value * w)
    u = tl.where(w == 0.0, 0.0, u * w)
    t = tl.load(TEMPERATURE_ptr + offs * stride_t, mask=inside, other=1.0)
    return value, u, u * (mean - pos), m, u * r / t


@triton.jit
def float16_scale(
    A_ptr, B_ptr, TEMPERATURE_ptr, WEIGHT_ptr, weight, size, stride_t, stride_w,
    zero_row: tl.constexpr, room: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the power of two that brings a bound on |C| to at most 2^room: in C, p <= 1 and |u| <= w."""
    BLOCK: tl.constexpr = 1024
    a, b, w = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for start in range(0, size, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < size
        a = tl.maximum(a, tl.abs(live(load_vector(A_ptr, offs, size, 1.0, ACC), zero_row)))
        b = tl.maximum(b, tl.abs(live(load_vector(B_ptr, offs, size, 1.0, ACC), zero_row)))
        w_here = tl.full((BLOCK,), weight, ACC)
        if WEIGHT_ptr is not None:
            w_here *= tl.load(WEIGHT_ptr + offs * stride_w, mask=inside, other=0.0)
        w = tl.maximum(w, w_here / tl.load(TEMPERATURE_ptr + offs * stride_t, mask=inside, other=float("inf")))
    bound = 2.0 * tl.max(a, 0) * tl.max(b, 0) * tl.max(w, 0)  # of both directions
    exponent = tl.minimum(tl.maximum(room - tl.ceil(tl.log2(bound)), -100.0), 100.0)
    return tl.where((bound > 0.0) & (bound < float("inf")), tl.exp2(exponent), 1.0)


@triton.jit(do_not_specialize_on_alignment=VECTORS_OF_CALLERS)
def dense_rows_kernel(
    X_ptr, Y_ptr, TARGET_ptr, TEMPERATURE_ptr, WORK_ptr, PADDED_X_ptr, PADDED_Y_ptr,
    size, D, width, stride_xm, stride_yn, stride_t,
    eps: tl.constexpr, at_eps: tl.constexpr, log2e: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr,
    MUTUAL: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a, b, s and pos, and rows with zeros up to `width` where there is memory for them.

    SCALED: there are a and b, given without NORMALIZE. MUTUAL: y are x, and b is a.
    """
    A_ptr, B_ptr = None, None
    if SCALED:
        A_ptr = WORK_ptr + A * size
        if not (MUTUAL and NORMALIZE):
            B_ptr = WORK_ptr + (A if MUTUAL else B) * size
    side_kernel(
        X_ptr, PADDED_X_ptr, A_ptr, TEMPERATURE_ptr, WORK_ptr + S * size, None, None, None, Y_ptr, PADDED_Y_ptr, B_ptr,
        TARGET_ptr, WORK_ptr + POS * size, size, size, D, width, stride_xm, stride_yn, stride_t, eps, at_eps, log2e,
        NORMALIZE, ACC, BLOCK_M, BLOCK_D,
    )  # fmt: skip


@triton.jit
def inverse(WORK_ptr, size, place: tl.constexpr, SCALED: tl.constexpr):
    """Return where a vector of inverse norms is; nothing without SCALED, since Triton 3.6 returns no None."""
    if SCALED:
        return WORK_ptr + place * size


@triton.jit(do_not_specialize_on_alignment=VECTORS_OF_CALLERS)
def dense_scores_kernel(
    X_ptr, Y_ptr, TARGET_ptr, XI_ptr, YI_ptr, WORK_ptr, DOTS_ptr,
    size, D, stride_xm, stride_yn, stride_dots,
    SCALED: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, IDS: tl.constexpr, COLUMNS: tl.constexpr,
    MUTUAL: tl.constexpr, UNSHIFTED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write x_i . y_j of one tile into DOTS, and the states of its rows and, with COLUMNS, of its columns."""
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    A_ptr = inverse(WORK_ptr, size, A, SCALED)
    B_ptr = inverse(WORK_ptr, size, A if MUTUAL else B, SCALED)
    S_ptr, ROWS_ptr, COLUMNS_ptr = WORK_ptr + S * size, WORK_ptr + VECTORS * size, None
    if COLUMNS:
        COLUMNS_ptr = ROWS_ptr + tl.num_programs(1) * STATE_SLOTS * size
    a = load_vector(A_ptr, offs_m, size, 1.0, ACC)
    sx = load_vector(S_ptr, offs_m, size, 1.0, ACC)
    m = tl.full((BLOCK_M,), 0.0 if UNSHIFTED else FLOOR, ACC)
    zero = tl.zeros((BLOCK_M,), ACC)
    outside = tl.where(offs_m < size, 0.0, FLOOR).to(ACC)
    m, l, x, d = add_tile(
        m, zero, zero, None, start_m, start_n, a, sx, outside, X_ptr, Y_ptr, B_ptr, S_ptr, None, None, TARGET_ptr,
        XI_ptr, YI_ptr, None, COLUMNS_ptr, pid_m, size, size, None, D, stride_xm, stride_yn, False, TARGET, DIAGONAL,
        IDS, "", 0, UNSHIFTED, MEAN, ACC, DOT, False, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store_state(ROWS_ptr, pid_n, offs_m, size, m, l, x)
    if DOTS_ptr is not None:
        ptrs, inside = tile_of(DOTS_ptr, offs_m, offs_n, stride_dots, size)
        tl.store(ptrs, d, mask=inside)


@triton.jit
def tile_of(ptr, offs_m, offs_n, stride, size):
    """Return the pointers of a tile of a square matrix, and which are inside it or in the padding of its rows.

    Were the padding left out, elements would be moved one by one.
    """
    ptrs = ptr + offs_m.to(tl.int64)[:, None] * stride + offs_n[None, :]
    return ptrs, (offs_m < size)[:, None] & (offs_n < stride)[None, :]


@triton.jit(do_not_specialize_on_alignment=VECTORS_OF_CALLERS)
def dense_coefficients_kernel(
    TARGET_ptr, XI_ptr, YI_ptr, TEMPERATURE_ptr, WEIGHT_ptr, OFFSET_ptr, WORK_ptr, DOTS_ptr, C_ptr, DOFFSET_ptr,
    size, stride_dots, stride_t, stride_w, weight, row_slots, column_slots,
    zero_row: tl.constexpr, ln2: tl.constexpr, log2e: tl.constexpr, room: tl.constexpr, LOSS: tl.constexpr,
    SCALED: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, IDS: tl.constexpr, COLUMNS: tl.constexpr,
    MUTUAL: tl.constexpr, UNSHIFTED: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, ROW_SLOTS: tl.constexpr,
    COLUMN_SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write one tile of C, that of kernels/gradient.py, and in the first tile of each block of rows, of row i

    v       dL/dpos_i
    w loss  the weighted loss of row i, and with COLUMNS of column i
    logits  sum_j s_ij dL/ds_ij, likewise

    OFFSET has what is added to pos, of rows and then of columns, and DOFFSET gets its gradient.
    MUTUAL: x and y are the same rows, and of C + C^T one product makes the gradient of both sides. `room`: C is
    multiplied by a power of two that brings it to at most 2^room, where its dtype has no more range.
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ROWS_ptr = WORK_ptr + VECTORS * size
    COLUMNS_ptr = ROWS_ptr + row_slots * STATE_SLOTS * size
    OFFSET_Y_ptr = None
    if OFFSET_ptr is not None:
        OFFSET_Y_ptr = OFFSET_ptr + size
    value, u, logits, nx, wx = finished_rows(
        ROWS_ptr, row_slots, WORK_ptr, TEMPERATURE_ptr, WEIGHT_ptr, OFFSET_ptr, weight, offs_m, size, stride_t,
        stride_w, ln2, log2e, LOSS, ACC, ROW_SLOTS,
    )  # fmt: skip
    if pid_n == 0:
        if DOFFSET_ptr is not None:
            tl.store(DOFFSET_ptr + offs_m, -u, mask=offs_m < size)
        if COLUMNS:
            column_value, column_u, column_logits, _, _ = finished_rows(
                COLUMNS_ptr, column_slots, WORK_ptr, TEMPERATURE_ptr, WEIGHT_ptr, OFFSET_Y_ptr, weight, offs_m, size,
                stride_t, stride_w, ln2, log2e, LOSS, ACC, COLUMN_SLOTS,
            )  # fmt: skip
            if DOFFSET_ptr is not None:
                tl.store(DOFFSET_ptr + size + offs_m, -column_u, mask=offs_m < size)
            value, u, logits = value + column_value, u + column_u, logits + column_logits
        tl.store(WORK_ptr + V * size + offs_m, -u, mask=offs_m < size)
        tl.store(WORK_ptr + LOSS_OF_ROW * size + offs_m, value, mask=offs_m < size)
        tl.store(WORK_ptr + LOGITS * size + offs_m, logits, mask=offs_m < size)
    if C_ptr is not None:
        ny, wy = tl.zeros((BLOCK_N,), ACC), tl.zeros((BLOCK_N,), ACC)
        if COLUMNS:
            _, _, _, ny, wy = finished_rows(
                COLUMNS_ptr, column_slots, WORK_ptr, TEMPERATURE_ptr, WEIGHT_ptr, OFFSET_Y_ptr, weight, offs_n, size,
                stride_t, stride_w, ln2, log2e, LOSS, ACC, COLUMN_SLOTS,
            )  # fmt: skip
        elif MUTUAL:
            _, _, _, ny, wy = finished_rows(
                ROWS_ptr, row_slots, WORK_ptr, TEMPERATURE_ptr, WEIGHT_ptr, OFFSET_ptr, weight, offs_n, size, stride_t,
                stride_w, ln2, log2e, LOSS, ACC, ROW_SLOTS,
            )  # fmt: skip
        A_ptr = inverse(WORK_ptr, size, A, SCALED)
        B_ptr = inverse(WORK_ptr, size, A if MUTUAL else B, SCALED)
        a = live(load_vector(A_ptr, offs_m, size, 1.0, ACC), zero_row)
        b = live(load_vector(B_ptr, offs_n, size, 1.0, ACC), zero_row)
        rx = a * load_vector(WORK_ptr + S * size, offs_m, size, 1.0, ACC)
        ry = b * load_vector(WORK_ptr + S * size, offs_n, size, 1.0, ACC)
        ptrs, inside = tile_of(DOTS_ptr, offs_m, offs_n, stride_dots, size)
        d = tl.load(ptrs, mask=inside, other=0.0)
        c = coefficients(d, a, rx, nx, a * wx, b, ry, ny, b * wy, None, None, True, COLUMNS or MUTUAL, UNSHIFTED, False)
        if room is not None:
            scale = float16_scale(
                A_ptr, B_ptr, TEMPERATURE_ptr, WEIGHT_ptr, weight, size, stride_t, stride_w, zero_row, room, ACC
            )
            c *= scale
            if (pid_m == 0) & (pid_n == 0):
                tl.store(WORK_ptr + UNSCALE * size, 1.0 / scale)
        keep = negatives(
            offs_m, offs_n, size, size, None, TARGET_ptr, XI_ptr, YI_ptr, None, TARGET, DIAGONAL, IDS, "", 0, ACC
        )
        ptrs, _ = tile_of(C_ptr, offs_m, offs_n, stride_dots, size)
        tl.store(ptrs, cast(tl.where(keep, c, 0.0), C_ptr.dtype.element_ty, DOT == "upcast"), mask=inside)


@triton.jit
def write_products(
    C_ptr, Y_ptr, G_ptr,
    size, D, width, stride_cm, stride_yn,
    TRANSPOSED: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write D components of g_i = sum_j C_ij y_j of this program's rows, of C^T if TRANSPOSED; width: those of y.

    C is 0 in the padding of its rows.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        for start_n in range(0, size, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            y = load_rows(Y_ptr, offs_n, stride_yn, size, offs_d, width)
            if TRANSPOSED:
                c = tl.trans(load_rows(C_ptr, offs_n, stride_cm, size, offs_m, stride_cm))
            else:
                c = load_rows(C_ptr, offs_m, stride_cm, size, offs_n, stride_cm)
            acc = dot(c, y, acc, DOT)
        ptrs = G_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(ptrs, acc, mask=(offs_m < size)[:, None] & (offs_d < D)[None, :])


@triton.jit
def write_sums(
    WORK_ptr, TEMPERATURE_ptr, LOSS_ptr, DT_ptr, size, stride_t, PER_ROW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write the sum of the losses and, where asked for, `temperature_gradient` of backends/row_losses.py."""
    BLOCK: tl.constexpr = 1024
    loss, logits = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for start in range(0, size, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < size
        loss += tl.load(WORK_ptr + LOSS_OF_ROW * size + offs, mask=inside, other=0.0)
        if DT_ptr is not None:
            of_row = tl.load(WORK_ptr + LOGITS * size + offs, mask=inside, other=0.0)
            if PER_ROW:
                t = tl.load(TEMPERATURE_ptr + offs * stride_t, mask=inside, other=1.0)
                tl.store(DT_ptr + offs, divided(-of_row, t), mask=inside)
            else:
                logits += of_row
    tl.store(LOSS_ptr, tl.sum(loss, 0))
    if DT_ptr is not None and not PER_ROW:
        tl.store(DT_ptr, divided(-tl.sum(logits, 0), tl.load(TEMPERATURE_ptr)))


@triton.jit(do_not_specialize_on_alignment=VECTORS_OF_CALLERS)
def dense_gradient_kernel(
    C_ptr, X_ptr, Y_ptr, TARGET_ptr, TEMPERATURE_ptr, WORK_ptr, LOSS_ptr, DT_ptr, DX_ptr, DY_ptr,
    size, D, width, stride_cm, stride_xm, stride_yn, stride_t,
    zero_row: tl.constexpr, PER_ROW: tl.constexpr, SCALED: tl.constexpr, MUTUAL: tl.constexpr, NORMALIZE: tl.constexpr,
    UNSCALED: tl.constexpr, WHOLE: tl.constexpr, EMULATE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the loss, the temperature's gradient, and those of both sides in the accumulator's dtype: of x where
    program_id(1) is 0, of y where it is 1. Only what there are pointers for is written.

    Rows of sums over C are finished where they lie, once they are whole. width: the components of x and y, D and zeros.
    """
    A_ptr = inverse(WORK_ptr, size, A, SCALED)
    B_ptr = inverse(WORK_ptr, size, A if MUTUAL else B, SCALED)
    V_ptr, UNSCALE_ptr = WORK_ptr + V * size, None
    if UNSCALED:
        UNSCALE_ptr = WORK_ptr + UNSCALE * size
    if tl.program_id(1) == 0:
        if DX_ptr is not None:
            write_products(
                C_ptr, Y_ptr, DX_ptr, size, D, width, stride_cm, stride_yn, False, ACC, DOT, BLOCK_M, BLOCK_N, BLOCK_D
            )  # fmt: skip
            tl.debug_barrier()
            finish_kernel(
                DX_ptr, None, X_ptr, A_ptr, Y_ptr, B_ptr, V_ptr, TEMPERATURE_ptr, TARGET_ptr, None, None, UNSCALE_ptr,
                DX_ptr, 1, size, size, None, D, D, 0, stride_xm, stride_yn, stride_t, zero_row, MUTUAL, 1, NORMALIZE,
                WHOLE, EMULATE, ACC, BLOCK_M, BLOCK_D, 1, 1,
            )  # fmt: skip
        if tl.program_id(0) == 0:
            write_sums(WORK_ptr, TEMPERATURE_ptr, LOSS_ptr, DT_ptr, size, stride_t, PER_ROW, ACC)
    else:
        if DY_ptr is not None:
            write_products(
                C_ptr, X_ptr, DY_ptr, size, D, width, stride_cm, stride_xm, True, ACC, DOT, BLOCK_M, BLOCK_N, BLOCK_D
            )  # fmt: skip
            tl.debug_barrier()
            finish_kernel(
                DY_ptr, None, Y_ptr, B_ptr, X_ptr, A_ptr, V_ptr, TEMPERATURE_ptr, None, None, None, UNSCALE_ptr, DY_ptr,
                1, size, size, None, D, D, 0, stride_yn, stride_xm, stride_t, zero_row, False, 1, NORMALIZE, WHOLE,
                EMULATE, ACC, BLOCK_M, BLOCK_D, 1, 1,
            )  # fmt: skip
