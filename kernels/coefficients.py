"""Blocks of coefficients and of exponentials, written into a workspace for library products.

The workspace is as wide and as high as whole tiles, so that nothing is masked when it is written. Where the pairs that
are no negatives are on a diagonal alone, or there are none, two launches make one block: PEEL "off" is of the whole
tiles that do not meet the diagonal, and "on" of the others, with columns that end within a tile; "" is of all tiles.
"""

import triton
import triton.language as tl

from .gradient import coefficients, direction
from .statistics import store_state
from .tile import FLOOR, cast, live, load_vector, meets_diagonal, negatives, raw_dots


@triton.jit
def tile_start(
    row_start, row_end, col_start, col_end, DIAGONAL: tl.constexpr, PEEL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return this program's blocks of rows and columns, their first row and column, and whether the tile is made."""
    row_blocks = tl.cdiv(row_end - row_start, BLOCK_M)
    pid_m = tl.program_id(0) % row_blocks
    pid_n = tl.program_id(0) // row_blocks
    start_m = row_start + pid_m * BLOCK_M
    across = tl.cdiv(col_end - col_start, BLOCK_N)
    # tiles of a row block that may meet the diagonal; then the last one
    most = (BLOCK_M + BLOCK_N - 1) // BLOCK_N + 1 if DIAGONAL else 0
    last = pid_n == most
    if PEEL == "on":
        pid_n = tl.where(last, across - 1, pid_n + tl.maximum(start_m - col_start, 0) // BLOCK_N)
    start_n = col_start + pid_n * BLOCK_N
    meets = meets_diagonal(start_m, start_n, BLOCK_M, BLOCK_N) & DIAGONAL
    ragged = start_n + BLOCK_N > col_end
    made = pid_n < across
    if PEEL == "on":
        made = made & (meets ^ last) & (meets | ragged)
    elif PEEL == "off":
        made = made & ~(meets | ragged)
    return pid_m, pid_n, start_m, start_n, made


@triton.jit(do_not_specialize=["row_start", "row_end"])  # columns must be known to be aligned
def exponentials_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, SY_ptr, TARGET_ptr, XI_ptr, YI_ptr, guide, C_ptr, ROWS_ptr,
    row_start, row_end, col_start, col_end, D, stride_xm, stride_yn, stride_cm,
    zero_row: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, PEEL: tl.constexpr, GUIDE: tl.constexpr,
    BLOCK_G: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write b_j 2^(z_ij sx_i), to be multiplied by a factor of the row, and 0 for pairs that are no negatives.

    z is that of kernels/gradient.py. States with m = 0 of the rows over each block of columns go to slots of ROWS. A
    zero row counts in these only. Without MEAN the third vector of a state is 0.
    """
    pid_m, pid_n, start_m, start_n, made = tile_start(
        row_start, row_end, col_start, col_end, DIAGONAL, PEEL, BLOCK_M, BLOCK_N
    )
    if not made:
        return
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    a = load_vector(A_ptr, offs_m, row_end, 1.0, ACC) * load_vector(SX_ptr, offs_m, row_end, 1.0, ACC)
    b = load_vector(B_ptr, offs_n, col_end, 1.0, ACC)
    d = raw_dots(
        None, X_ptr, Y_ptr, start_m, start_n, stride_xm, stride_yn, row_end, col_end, D, ACC, DOT, TMA, BLOCK_M,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    s = (d * b[None, :]) * a[:, None]
    if PEEL != "off":
        keep = negatives(
            offs_m, offs_n, row_end, col_end, TARGET_ptr, XI_ptr, YI_ptr, guide, TARGET, DIAGONAL, GUIDE, BLOCK_G, ACC
        )
        s = tl.where(keep, s, FLOOR)
    p = tl.exp2(s)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    x = tl.zeros((BLOCK_M,), ACC)
    if MEAN:
        x = tl.sum(p * s, 1)
    store_state(ROWS_ptr, pid_n, rows, row_end - row_start, tl.zeros((BLOCK_M,), ACC), tl.sum(p, 1), x)
    write_tile(C_ptr, p * live(b, zero_row)[None, :], rows, pid_n * BLOCK_N, stride_cm, DOT, BLOCK_N)


@triton.jit
def write_tile(C_ptr, c, rows, start_n, stride_cm, DOT: tl.constexpr, BLOCK_N: tl.constexpr):
    ptrs = C_ptr + rows.to(tl.int64)[:, None] * stride_cm + (start_n + tl.arange(0, BLOCK_N))[None, :]
    tl.store(ptrs, cast(c, C_ptr.dtype.element_ty, DOT == "upcast"))


@triton.jit(do_not_specialize=["row_start", "row_end"])
def coefficients_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, NX_ptr, UX_ptr, SY_ptr, NY_ptr, UY_ptr, TARGET_ptr, XI_ptr, YI_ptr, guide,
    C_ptr,
    row_start, row_end, col_start, col_end, D, stride_xm, stride_yn, stride_cm,
    zero_row: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, PEEL: tl.constexpr, GUIDE: tl.constexpr,
    BLOCK_G: tl.constexpr, UNSHIFTED: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the block C[row_start:row_end, col_start:col_end] into a workspace, in the workspace's dtype."""
    pid_m, pid_n, start_m, start_n, made = tile_start(
        row_start, row_end, col_start, col_end, DIAGONAL, PEEL, BLOCK_M, BLOCK_N
    )
    if not made:
        return
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    a = live(load_vector(A_ptr, offs_m, row_end, 1.0, ACC), zero_row)
    b = live(load_vector(B_ptr, offs_n, col_end, 1.0, ACC), zero_row)
    rx, nx, wx = direction(SX_ptr, NX_ptr, UX_ptr, a, offs_m, row_end, ACC)
    ry, ny, wy = direction(SY_ptr, NY_ptr, UY_ptr, b, offs_n, col_end, ACC)
    d = raw_dots(
        None, X_ptr, Y_ptr, start_m, start_n, stride_xm, stride_yn, row_end, col_end, D, ACC, DOT, TMA, BLOCK_M,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    c = coefficients(
        d, a, rx, nx, wx, b, ry, ny, wy, UX_ptr is not None, UY_ptr is not None, UNSHIFTED, GUIDE != ""
    )  # fmt: skip
    if PEEL != "off":
        keep = negatives(
            offs_m, offs_n, row_end, col_end, TARGET_ptr, XI_ptr, YI_ptr, guide, TARGET, DIAGONAL, GUIDE, BLOCK_G, ACC
        )
        c = tl.where(keep, c, 0.0)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    write_tile(C_ptr, c, rows, pid_n * BLOCK_N, stride_cm, DOT, BLOCK_N)
