"""Gradients through the negatives: the coefficients C, and their products with the raw rows in registers.

C_ij = a_i b_j (ux_i 2^(z_ij sx_i + yc_j - nx_i) + uy_j 2^(z_ij sy_j + xc_i - ny_j)),  z_ij = a_i b_j (x_i . y_j)

with sx = log2(e) / t, nx = m, ux = u r / t of the rows (m, r: `maximum` and `scale` of `RowStatistics`) and likewise of
the columns; either direction may be absent (no UX or no UY), and C is 0 for pairs that are not negatives. yc and xc are
the biases of what is scored, in base 2, and may be absent too.
"""

import triton
import triton.language as tl

from .tile import cast, dot, live, load_tile, load_vector, negatives


@triton.jit
def direction(S_ptr, N_ptr, U_ptr, inverse, offs, size, ACC: tl.constexpr):
    """Return (a s, n, a u) of the rows of one direction, a being their inverse norms as gradients take them."""
    s = load_vector(S_ptr, offs, size, 0.0, ACC)
    n = load_vector(N_ptr, offs, size, 0.0, ACC)
    u = load_vector(U_ptr, offs, size, 0.0, ACC)
    return inverse * s, n, inverse * u


@triton.jit
def exponential(d, r, n, other, c, CLAMP: tl.constexpr = False):
    """Return one direction's exponentials: r and n are that direction's, `other` the other side's inverse norms, and c
    its biases or None.

    CLAMP: a probability may come out above 1, of a pair that another tile's rounding took for a false negative.
    """
    p = (d * other) * r - n
    if c is not None:
        p += c
    if CLAMP:
        p = tl.where(p > 0.0, 0.0, p)  # a NaN stays
    return tl.exp2(p)


@triton.jit
def slope(d, r, n, w, other, c, CLAMP: tl.constexpr = False):
    """Return one direction's part of C but for the other side's inverse norms, w being its weights and the rest as in
    `exponential`."""
    e = exponential(d, r, n, other, c, CLAMP)
    return e * w  # e first: a product of vectors alone would be made before d, and kept meanwhile


@triton.jit
def term(d, r, n, w, other, c, CLAMP: tl.constexpr = False):
    """Return one direction's part of C."""
    return slope(d, r, n, w, other, c, CLAMP) * other


@triton.jit
def both_directions(e, a, wx, b, wy):
    """Return C of both directions from their one exponential, 2^z_ij s."""
    return (e * wx[:, None]) * b[None, :] + (e * wy[None, :]) * a[:, None]


@triton.jit
def coefficients(
    d, a, rx, nx, wx, b, ry, ny, wy, xc, yc,
    HAS_X: tl.constexpr, HAS_Y: tl.constexpr, UNSHIFTED: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Return C inside, but for pairs that are no negatives; outside it may be NaN, where 2^-n overflows.

    xc, yc: biases, (BLOCK_M, 1) and (1, BLOCK_N), or None. UNSHIFTED: every n is 0, and one exponential serves both
    directions, without biases.
    """
    if HAS_X and HAS_Y and UNSHIFTED:
        c = both_directions(tl.exp2((d * b[None, :]) * rx[:, None]), a, wx, b, wy)
    elif HAS_X:
        c = term(d, rx[:, None], nx[:, None], wx[:, None], b[None, :], yc, CLAMP)
        if HAS_Y:
            c += term(d, ry[None, :], ny[None, :], wy[None, :], a[:, None], xc, CLAMP)
    else:
        c = term(d, ry[None, :], ny[None, :], wy[None, :], a[:, None], xc, CLAMP)
    return c


@triton.jit(do_not_specialize=["shift"])
def gradient_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, NX_ptr, UX_ptr, SY_ptr, NY_ptr, UY_ptr, TARGET_ptr, XI_ptr, YI_ptr, G_ptr,
    size_x, size_y, shift, D, stride_xm, stride_yn, split,
    zero_row: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, IDS: tl.constexpr, UNSHIFTED: tl.constexpr,
    ACCUMULATE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute g_i (+)= sum_j C_ij y_j over `split` columns in slot program_id(1) of G (slots, N, D). BLOCK_D >= D."""
    pid_n = tl.program_id(1)
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    a = live(load_vector(A_ptr, offs_m, size_x, 1.0, ACC), zero_row)
    rx, nx, wx = direction(SX_ptr, NX_ptr, UX_ptr, a, offs_m, size_x, ACC)
    x = load_tile(X_ptr, start_m, stride_xm, size_x, 0, D, BLOCK_M, BLOCK_D, TMA)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for start_n in range(pid_n * split, tl.minimum((pid_n + 1) * split, size_y), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        y = load_tile(Y_ptr, start_n, stride_yn, size_y, 0, D, BLOCK_N, BLOCK_D, TMA)
        d = dot(x, tl.trans(y), tl.zeros((BLOCK_M, BLOCK_N), ACC), DOT)
        b = live(load_vector(B_ptr, offs_n, size_y, 1.0, ACC), zero_row)
        ry, ny, wy = direction(SY_ptr, NY_ptr, UY_ptr, b, offs_n, size_y, ACC)
        c = coefficients(
            d, a, rx, nx, wx, b, ry, ny, wy, None, None, UX_ptr is not None, UY_ptr is not None, UNSHIFTED, False
        )  # fmt: skip
        keep = negatives(
            offs_m, offs_n, size_x, size_y, shift, TARGET_ptr, XI_ptr, YI_ptr, None, TARGET, DIAGONAL, IDS, "", 0, ACC
        )
        c = tl.where(keep, c, 0.0)
        acc = dot(cast(c, y.dtype, DOT == "upcast"), y, acc, DOT)
    ptrs = G_ptr + (pid_n.to(tl.int64) * size_x + offs_m)[:, None] * D + offs_d[None, :]
    inside = (offs_m[:, None] < size_x) & (offs_d[None, :] < D)
    if ACCUMULATE:
        acc += tl.load(ptrs, mask=inside, other=0.0)
    tl.store(ptrs, acc, mask=inside)
