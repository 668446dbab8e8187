"""Blocks of coefficients and of exponentials, written into a workspace for library products.

The workspace is as wide and as high as whole tiles, so that nothing is masked when it is written. Where the pairs that
are no negatives are on diagonals alone, or there are none, two launches make one block: PEEL "off" is of the whole
tiles that do not meet one, and "on" of the others, with columns that end within a tile; "" is of all tiles at once.
"""

import triton
import triton.language as tl

from .gradient import coefficients, direction
from .statistics import store_state
from .tile import FLOOR, cast, live, load_vector, meets_diagonal, negatives, raw_dots


@triton.jit
def tile_start(
    row_start, row_end, col_start, col_end, shift, DIAGONAL: tl.constexpr, PEEL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return this program's blocks of rows and columns, their first row and column, and whether the tile is made.

    "on" has for each row block the tiles that may meet the diagonal, with a shift those that may meet the diagonals of
    x_i and y_{i + shift} and of x_i and y_{i - shift}, and then the last one.
    """
    row_blocks = tl.cdiv(row_end - row_start, BLOCK_M)
    pid_m = tl.program_id(0) % row_blocks
    pid_n = tl.program_id(0) // row_blocks
    start_m = row_start + pid_m * BLOCK_M
    across = tl.cdiv(col_end - col_start, BLOCK_N)
    most = (BLOCK_M + BLOCK_N - 1) // BLOCK_N + 1  # tiles of a row block that may meet one diagonal
    first = start_m  # the column in which the rows begin to meet this program's diagonal
    last = pid_n == tl.num_programs(0) // row_blocks - 1
    if PEEL == "on":
        if shift is not None:
            first += tl.where(pid_n < most, 0, tl.where(pid_n < 2 * most, shift, -shift))
        pid_n = tl.where(last, across - 1, pid_n % most + tl.maximum(first - col_start, 0) // BLOCK_N)
    start_n = col_start + pid_n * BLOCK_N
    meets = meets_diagonal(start_m, start_n, BLOCK_M, BLOCK_N) & DIAGONAL
    if shift is not None:
        meets = meets | meets_diagonal(start_m + shift, start_n, BLOCK_M, BLOCK_N)
        meets = meets | meets_diagonal(start_m - shift, start_n, BLOCK_M, BLOCK_N)
    ragged = start_n + BLOCK_N > col_end
    made = pid_n < across
    if PEEL == "on":
        mine = meets_diagonal(first, start_n, BLOCK_M, BLOCK_N)
        made = made & tl.where(last, ragged & ~meets, mine)
    elif PEEL == "off":
        made = made & ~(meets | ragged)
    return pid_m, pid_n, start_m, start_n, made


@triton.jit(do_not_specialize=["row_start", "row_end", "shift"])  # columns must be known to be aligned
def exponentials_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, SY_ptr, TARGET_ptr, XI_ptr, YI_ptr, guide, C_ptr, ROWS_ptr,
    row_start, row_end, col_start, col_end, shift, D, stride_xm, stride_yn, stride_cm,
    zero_row: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, PEEL: tl.constexpr, GUIDE: tl.constexpr,
    BLOCK_G: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write b_j 2^(z_ij sx_i), to be multiplied by a factor of the row, and 0 for pairs that are no negatives.

    z is that of kernels/gradient.py. States with m = 0 of the rows over each block of columns go to slots of ROWS. A
    zero row counts in these only. Without MEAN the third vector of a state is 0.
    """
    pid_m, pid_n, start_m, start_n, made = tile_start(
        row_start, row_end, col_start, col_end, shift, DIAGONAL, PEEL, BLOCK_M, BLOCK_N
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
            offs_m, offs_n, row_end, col_end, shift, TARGET_ptr, XI_ptr, YI_ptr, guide, TARGET, DIAGONAL, GUIDE,
            BLOCK_G, ACC,
        )  # fmt: skip
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


@triton.jit(do_not_specialize=["row_start", "row_end", "shift"])
def coefficients_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, NX_ptr, UX_ptr, SY_ptr, NY_ptr, UY_ptr, TARGET_ptr, XI_ptr, YI_ptr, guide,
    C_ptr,
    row_start, row_end, col_start, col_end, shift, D, stride_xm, stride_yn, stride_cm,
    zero_row: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, PEEL: tl.constexpr, GUIDE: tl.constexpr,
    BLOCK_G: tl.constexpr, UNSHIFTED: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the block C[row_start:row_end, col_start:col_end] into a workspace, in the workspace's dtype."""
    pid_m, pid_n, start_m, start_n, made = tile_start(
        row_start, row_end, col_start, col_end, shift, DIAGONAL, PEEL, BLOCK_M, BLOCK_N
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
            offs_m, offs_n, row_end, col_end, shift, TARGET_ptr, XI_ptr, YI_ptr, guide, TARGET, DIAGONAL, GUIDE,
            BLOCK_G, ACC,
        )  # fmt: skip
        c = tl.where(keep, c, 0.0)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    write_tile(C_ptr, c, rows, pid_n * BLOCK_N, stride_cm, DOT, BLOCK_N)
