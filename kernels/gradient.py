"""Gradients through the negatives: the coefficients C, and their products with the raw rows.

C_ij = a_i b_j (ux_i 2^(z_ij sx_i - nx_i) + uy_j 2^(z_ij sy_j - ny_j)),  z_ij = a_i b_j (x_i . y_j)

with sx = log2(e) / t, nx = m, ux = u r / t of the rows (m, r: `maximum` and `scale` of `RowStatistics`) and likewise of
the columns; either direction may be absent (no UX or no UY), and C is 0 for pairs that are not negatives.
"""

import triton
import triton.language as tl

from .statistics import store_state
from .tile import cast, dot, live, load_tile, load_vector, negatives, raw_dots


@triton.jit
def direction(S_ptr, N_ptr, U_ptr, offs, size, ACC: tl.constexpr):
    s = load_vector(S_ptr, offs, size, 0.0, ACC)
    n = load_vector(N_ptr, offs, size, 0.0, ACC)
    u = load_vector(U_ptr, offs, size, 0.0, ACC)
    return s, n, u


@triton.jit
def term(d, inverse, s, n, u, other, CLAMP: tl.constexpr = False):
    """Return one direction's part of C: the vectors are that direction's, `other` the other side's inverse norms.

    CLAMP: a probability may come out above 1, of a pair that another tile's rounding took for a false negative.
    """
    p = d * (inverse * s * other) - n
    if CLAMP:
        p = tl.where(p > 0.0, 0.0, p)  # a NaN stays
    return (inverse * u) * other * tl.exp2(p)


@triton.jit
def coefficients(d, keep, a, sx, nx, ux, b, sy, ny, uy, HAS_X: tl.constexpr, HAS_Y: tl.constexpr, CLAMP: tl.constexpr):
    if HAS_X:
        c = term(d, a[:, None], sx[:, None], nx[:, None], ux[:, None], b[None, :], CLAMP)
        if HAS_Y:
            c += term(d, b[None, :], sy[None, :], ny[None, :], uy[None, :], a[:, None], CLAMP)
    else:
        c = term(d, b[None, :], sy[None, :], ny[None, :], uy[None, :], a[:, None], CLAMP)
    return tl.where(keep, c, 0.0)


@triton.jit
def gradient_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, NX_ptr, UX_ptr, SY_ptr, NY_ptr, UY_ptr, TARGET_ptr, XI_ptr, YI_ptr, G_ptr,
    size_x, size_y, D, stride_xm, stride_yn, split,
    zero_row: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, ACCUMULATE: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute g_i (+)= sum_j C_ij y_j over `split` columns in slot program_id(1) of G (slots, N, D). BLOCK_D >= D."""
    pid_n = tl.program_id(1)
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    a = live(load_vector(A_ptr, offs_m, size_x, 1.0, ACC), zero_row)
    sx, nx, ux = direction(SX_ptr, NX_ptr, UX_ptr, offs_m, size_x, ACC)
    x = load_tile(X_ptr, start_m, stride_xm, size_x, 0, D, BLOCK_M, BLOCK_D, TMA)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start_n in range(pid_n * split, tl.minimum((pid_n + 1) * split, size_y), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        y = load_tile(Y_ptr, start_n, stride_yn, size_y, 0, D, BLOCK_N, BLOCK_D, TMA)
        d = dot(x, tl.trans(y), tl.zeros((BLOCK_M, BLOCK_N), ACC), DOT)
        b = live(load_vector(B_ptr, offs_n, size_y, 1.0, ACC), zero_row)
        sy, ny, uy = direction(SY_ptr, NY_ptr, UY_ptr, offs_n, size_y, ACC)
        # A row that counts as zero has coefficients of 0, whatever its exponential.
        valid_m = (offs_m < size_x) & (a != 0.0)
        valid_n = (offs_n < size_y) & (b != 0.0)
        keep = negatives(
            valid_m, valid_n, offs_m, offs_n, size_x, size_y, TARGET_ptr, XI_ptr, YI_ptr, None, TARGET, DIAGONAL, "", 0,
            ACC,
        )  # fmt: skip
        c = coefficients(d, keep, a, sx, nx, ux, b, sy, ny, uy, UX_ptr is not None, UY_ptr is not None, False)
        acc = dot(cast(c, y.dtype, DOT == "upcast"), y, acc, DOT)
    ptrs = G_ptr + (pid_n.to(tl.int64) * size_x + offs_m)[:, None] * D + offs_d[None, :]
    inside = (offs_m[:, None] < size_x) & (offs_d[None, :] < D)
    if ACCUMULATE:
        acc += tl.load(ptrs, mask=inside, other=0.0)
    tl.store(ptrs, acc, mask=inside)


@triton.jit(do_not_specialize=["row_start", "row_end"])  # columns must be known to be aligned
def coefficients_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, NX_ptr, UX_ptr, SY_ptr, NY_ptr, UY_ptr, TARGET_ptr, XI_ptr, YI_ptr, guide,
    C_ptr, ROWS_ptr,
    row_start, row_end, col_start, col_end, D, stride_xm, stride_yn, stride_cm,
    zero_row: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, GUIDE: tl.constexpr, BLOCK_G: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the block C[row_start:row_end, col_start:col_end] into a workspace, in the workspace's dtype.

    With ROWS, before the rows' statistics are known: b_j 2^(z_ij sx_i), to be multiplied by a factor of the row, and
    states with m = 0 of the rows over each block of columns, in slots of ROWS (slots, STATE_SLOTS, rows). A zero row
    counts in the states only.
    """
    row_blocks = tl.cdiv(row_end - row_start, BLOCK_M)
    pid_m = tl.program_id(0) % row_blocks
    pid_n = tl.program_id(0) // row_blocks
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start_m = row_start + pid_m * BLOCK_M
    start_n = col_start + pid_n * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    d = raw_dots(
        None, X_ptr, Y_ptr, start_m, start_n, stride_xm, stride_yn, row_end, col_end, D, ACC, DOT, TMA, BLOCK_M,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    a = load_vector(A_ptr, offs_m, row_end, 1.0, ACC)
    b = load_vector(B_ptr, offs_n, col_end, 1.0, ACC)
    sx, nx, ux = direction(SX_ptr, NX_ptr, UX_ptr, offs_m, row_end, ACC)
    sy, ny, uy = direction(SY_ptr, NY_ptr, UY_ptr, offs_n, col_end, ACC)
    valid_m = offs_m < row_end
    valid_n = offs_n < col_end
    if ROWS_ptr is None:
        a, b = live(a, zero_row), live(b, zero_row)
        valid_m = valid_m & (a != 0.0)
        valid_n = valid_n & (b != 0.0)
    keep = negatives(
        valid_m, valid_n, offs_m, offs_n, row_end, col_end, TARGET_ptr, XI_ptr, YI_ptr, guide, TARGET, DIAGONAL, GUIDE,
        BLOCK_G, ACC,
    )  # fmt: skip
    if ROWS_ptr is None:
        c = coefficients(d, keep, a, sx, nx, ux, b, sy, ny, uy, UX_ptr is not None, UY_ptr is not None, GUIDE != "")
    else:
        s = tl.where(keep, d * ((a * sx)[:, None] * b[None, :]), 0.0)
        p = tl.where(keep, tl.exp2(s), 0.0)
        c = p * live(b, zero_row)[None, :]
        zero = tl.zeros((BLOCK_M,), ACC)
        store_state(ROWS_ptr, pid_n, rows, row_end - row_start, zero, tl.sum(p, 1), tl.sum(p * s, 1))
    ptrs = C_ptr + rows.to(tl.int64)[:, None] * stride_cm + cols[None, :]
    inside = (offs_m[:, None] < row_end) & (offs_n[None, :] < col_end)
    tl.store(ptrs, cast(c, C_ptr.dtype.element_ty, DOT == "upcast"), mask=inside)
