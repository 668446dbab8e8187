"""Blocks of coefficients, of exponentials and of sigmoids, written into a workspace for library products.

The workspace is as wide and as high as whole tiles, so that nothing is masked when it is written. Where the pairs that
are no negatives are on diagonals alone, or there are none, two launches make one block: PEEL "off" is of the whole
tiles that do not meet one, and "on" of the others, with columns that end within a tile; "" is of all tiles at once.
Programs of APART leave out no tile, since the compiler takes no branch around their loop, and "on" then writes its own
a second time.
"""

import triton
import triton.language as tl

from .gradient import both_directions, coefficients, direction, exponential
from .sigmoid import LOG2E, softplus_and_sigmoid
from .statistics import store_state
from .tile import FLOOR, RAISE, cast, live, load_vector, meets_diagonal, negatives, raw_dots, with_biases

NO_NEGATIVE = tl.constexpr(-(2**15))  # what `encoded` scores have in place of FLOOR


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
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, SY_ptr, NX_ptr, NY_ptr, XC_ptr, YC_ptr, TARGET_ptr, XI_ptr, YI_ptr, guide,
    C_ptr, ROWS_ptr, COLUMNS_ptr, UX_ptr, BIAS_ptr,
    row_start, row_end, col_start, col_end, shift, D, stride_xm, stride_yn, stride_cm,
    zero_row: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, IDS: tl.constexpr, PEEL: tl.constexpr,
    GUIDE: tl.constexpr, BLOCK_G: tl.constexpr, MEAN: tl.constexpr, CODES: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Write b_j 2^(z_ij sx_i) / RAISE, to be multiplied by a factor of the row, and 0 for pairs that are no negatives.

    z is that of kernels/gradient.py. States with m = 0 of the rows over each block of columns go to slots of ROWS. A
    zero row counts in these only. Without MEAN the third vector of a state is 0.

    With NX: of z_ij sx_i + yc_j - nx_i in place of z_ij sx_i, with the biases yc if there are any.

    With CODES, an integer that stands for a cosine of 1: the scores z_ij sx_i themselves are written, see `encoded`,
    where what turns exponentials into coefficients is of their row and their column, or where a sum over rows is to be
    made of exponentials that nothing has rounded. With COLUMNS: states of the columns over each block of rows go to
    slots of it, with NY and xc likewise.

    With BIAS: with the logit z_ij sx_i + bias log2(e) of a pair its sigmoid is in place of the exponential, and the
    coefficient ux_i a_i b_j sigmoid_ij is written, or nothing without C; the first vector of a state is then the sum of
    softplus.
    """
    pid_m, pid_n, start_m, start_n, made = tile_start(
        row_start, row_end, col_start, col_end, shift, DIAGONAL, PEEL, BLOCK_M, BLOCK_N
    )
    if not APART and not made:
        return
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    a = load_vector(A_ptr, offs_m, row_end, 1.0, ACC) * load_vector(SX_ptr, offs_m, row_end, 1.0, ACC)
    b = load_vector(B_ptr, offs_n, col_end, 1.0, ACC)
    d = raw_dots(
        None, X_ptr, Y_ptr, start_m, start_n, stride_xm, stride_yn, row_end, col_end, D, ACC, DOT, TMA, BLOCK_M,
        BLOCK_N, BLOCK_D, APART,
    )  # fmt: skip
    s = (d * b[None, :]) * a[:, None]
    if COLUMNS_ptr is not None:
        s += tl.where(offs_m < row_end, 0.0, FLOOR)[:, None]
    if PEEL != "off":
        keep = negatives(
            offs_m, offs_n, row_end, col_end, shift, TARGET_ptr, XI_ptr, YI_ptr, guide, TARGET, DIAGONAL, IDS, GUIDE,
            BLOCK_G, ACC,
        )  # fmt: skip
        s = tl.where(keep, s, FLOOR)
    if BIAS_ptr is None:
        p = tl.exp2(shifted(s, NX_ptr, offs_m, row_end, YC_ptr, offs_n, col_end, 1, ACC))
    else:
        softplus, p = softplus_and_sigmoid(s + tl.load(BIAS_ptr) * LOG2E)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    x = tl.zeros((BLOCK_M,), ACC)
    if MEAN:
        x = tl.sum(p * s, 1)
    if BIAS_ptr is None:
        store_state(ROWS_ptr, pid_n, rows, row_end - row_start, tl.zeros((BLOCK_M,), ACC), tl.sum(p, 1), x)
    else:
        store_state(ROWS_ptr, pid_n, rows, row_end - row_start, tl.sum(softplus, 1), tl.sum(p, 1), x)
    if BIAS_ptr is not None:
        if C_ptr is not None:
            w = live(load_vector(A_ptr, offs_m, row_end, 1.0, ACC), zero_row)
            w *= load_vector(UX_ptr, offs_m, row_end, 1.0, ACC)
            c = (p * w[:, None]) * live(b, zero_row)[None, :]
            write_tile(C_ptr, c, rows, pid_n * BLOCK_N, stride_cm, DOT, BLOCK_N)
    elif not CODES:
        c = p * (live(b, zero_row) * (1 / RAISE))[None, :]
        write_tile(C_ptr, c, rows, pid_n * BLOCK_N, stride_cm, DOT, BLOCK_N)
    else:
        if COLUMNS_ptr is not None:
            none = tl.zeros((BLOCK_N,), ACC)
            if NY_ptr is not None:
                p = tl.exp2(shifted(s, NY_ptr, offs_n, col_end, XC_ptr, offs_m, row_end, 0, ACC))
            x = none
            if MEAN:
                x = tl.sum(p * s, 0)
            store_state(COLUMNS_ptr, pid_m, offs_n, col_end, none, tl.sum(p, 0), x)
        c = encoded(s, SX_ptr, offs_m, row_end, CODES, C_ptr.dtype.element_ty, ACC)
        if PEEL != "off" and C_ptr.dtype.element_ty == tl.int16:
            c = tl.where(keep, c, NO_NEGATIVE)
        write_tile(C_ptr, c, rows, pid_n * BLOCK_N, stride_cm, DOT, BLOCK_N)


@triton.jit
def shifted(s, N_ptr, offs, size, C_ptr, scored, size_scored, AXIS: tl.constexpr, ACC: tl.constexpr):
    """Return logits, summed along AXIS, with the biases of what is scored, less N at `offs`; as they are without N."""
    if N_ptr is not None:
        s = with_biases(s, C_ptr, scored, size_scored, AXIS, ACC)
        s -= tl.expand_dims(load_vector(N_ptr, offs, size, 0.0, ACC), AXIS)
    return s


@triton.jit
def encoded(s, S_ptr, offs, size, CODES: tl.constexpr, dtype: tl.constexpr, ACC: tl.constexpr):
    """Return scores as `dtype` holds them: as they are, or as the integers next to CODES times their cosine s_ij / s_i,
    of at most 15 bits, whose step is the same at all temperatures.

    The last bits of a float32 of 3 2^22 and a small number are that number, rounded to the nearest integer.
    """
    if dtype == tl.int16:
        code = CODES / load_vector(S_ptr, tl.minimum(offs, size - 1), None, 1.0, ACC)
        s = (s * code[:, None] + 12582912.0).to(tl.int32, bitcast=True).to(tl.int16)
    return s


@triton.jit
def write_tile(C_ptr, c, rows, start_n, stride_cm, DOT: tl.constexpr, BLOCK_N: tl.constexpr):
    ptrs = C_ptr + rows.to(tl.int64)[:, None] * stride_cm + (start_n + tl.arange(0, BLOCK_N))[None, :]
    tl.store(ptrs, cast(c, C_ptr.dtype.element_ty, DOT == "upcast"))


@triton.jit(do_not_specialize=["row_start", "row_end", "shift"])
def coefficients_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, NX_ptr, UX_ptr, SY_ptr, NY_ptr, UY_ptr, XC_ptr, YC_ptr, GX_ptr, GY_ptr,
    TARGET_ptr, XI_ptr, YI_ptr, guide, C_ptr, DX_ptr, DY_ptr,
    row_start, row_end, col_start, col_end, shift, D, stride_xm, stride_yn, stride_cm,
    zero_row: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, IDS: tl.constexpr, PEEL: tl.constexpr,
    GUIDE: tl.constexpr, BLOCK_G: tl.constexpr, UNSHIFTED: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Write the block C[row_start:row_end, col_start:col_end] into a workspace, in the workspace's dtype.

    DY: with gx = u r, sums of gx_i 2^(z_ij sx_i + yc_j - nx_i) over each block of rows go to slots of it, which are the
    gradients of the biases yc. DX: likewise with gy over each block of columns, those of xc.
    """
    pid_m, pid_n, start_m, start_n, made = tile_start(
        row_start, row_end, col_start, col_end, shift, DIAGONAL, PEEL, BLOCK_M, BLOCK_N
    )
    if not APART and not made:
        return
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    a = live(load_vector(A_ptr, offs_m, row_end, 1.0, ACC), zero_row)
    b = live(load_vector(B_ptr, offs_n, col_end, 1.0, ACC), zero_row)
    ry, ny, wy = direction(SY_ptr, NY_ptr, UY_ptr, b, offs_n, col_end, ACC)
    d = raw_dots(
        None, X_ptr, Y_ptr, start_m, start_n, stride_xm, stride_yn, row_end, col_end, D, ACC, DOT, TMA, BLOCK_M,
        BLOCK_N, BLOCK_D, APART,
    )  # fmt: skip
    rx, nx, wx = direction(SX_ptr, NX_ptr, UX_ptr, a, offs_m, row_end, ACC)
    xc, yc = None, None
    if XC_ptr is not None:
        xc = load_vector(XC_ptr, offs_m, row_end, 0.0, ACC)[:, None]
    if YC_ptr is not None:
        yc = load_vector(YC_ptr, offs_n, col_end, 0.0, ACC)[None, :]
    c = coefficients(
        d, a, rx, nx, wx, b, ry, ny, wy, xc, yc, UX_ptr is not None, UY_ptr is not None, UNSHIFTED, GUIDE != ""
    )  # fmt: skip
    inside = (offs_m < row_end)[:, None]
    if PEEL != "off":
        keep = negatives(
            offs_m, offs_n, row_end, col_end, shift, TARGET_ptr, XI_ptr, YI_ptr, guide, TARGET, DIAGONAL, IDS, GUIDE,
            BLOCK_G, ACC,
        )  # fmt: skip
        c = tl.where(keep, c, 0.0)
        inside = inside & keep
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    write_tile(C_ptr, c, rows, pid_n * BLOCK_N, stride_cm, DOT, BLOCK_N)
    if DY_ptr is not None:
        g = load_vector(GX_ptr, offs_m, row_end, 0.0, ACC)[:, None]
        e = tl.where(inside, exponential(d, rx[:, None], nx[:, None], b[None, :], yc) * g, 0.0)
        store_sums(DY_ptr, pid_m, offs_n, col_start, col_end, tl.sum(e, 0))
    if DX_ptr is not None:
        g = load_vector(GY_ptr, offs_n, col_end, 0.0, ACC)[None, :]
        e = tl.where(inside, exponential(d, ry[None, :], ny[None, :], a[:, None], xc) * g, 0.0)
        store_sums(DX_ptr, pid_n, offs_m, row_start, row_end, tl.sum(e, 1))


@triton.jit
def store_sums(ptr, slot, offs, start, end, sums):
    """Store sums of what is at `offs`, between start and end, into a slot of (slots, end - start)."""
    tl.store(ptr + tl.cast(slot, tl.int64) * (end - start) + offs - start, sums, mask=offs < end)


@triton.jit
def combine_kernel(
    S_ptr, C_ptr, A_ptr, B_ptr, SX_ptr, NX_ptr, UX_ptr, RX_ptr, SY_ptr, NY_ptr, UY_ptr, RY_ptr, XC_ptr, YC_ptr, DX_ptr,
    DY_ptr,
    size_x, size_y, columns, stride_cm,
    zero_row: tl.constexpr, CODES: tl.constexpr, EMULATE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Turn scores into C_ij = a_i b_j (ux_i rx_i / tx_i + uy_j ry_j / ty_j) 2^s_ij, rounded once.

    S and C are the same memory, written up to `columns`. Without NX every maximum is 0, and 2^s_ij serves both
    directions. NX and NY are the maxima; with them and the biases xc and yc, if there are any, each direction has an
    exponential of its own, 2^(s_ij + yc_j - nx_i) or 2^(s_ij + xc_i - ny_j). Without UY there is that of rows alone.

    DY: sums of ux_i rx_i 2^(s_ij + yc_j - nx_i) over each block of rows go to slots of it, which are the gradients of
    the biases yc. DX: likewise with uy_j ry_j over each block of columns, those of xc.
    """
    across = tl.cdiv(columns, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // across, tl.program_id(0) % across
    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a = live(load_vector(A_ptr, offs_m, size_x, 1.0, ACC), zero_row)
    b = live(load_vector(B_ptr, offs_n, size_y, 1.0, ACC), zero_row)
    sx = load_vector(SX_ptr, offs_m, size_x, 1.0, ACC)
    ux = load_vector(UX_ptr, offs_m, size_x, 0.0, ACC) * load_vector(RX_ptr, offs_m, size_x, 0.0, ACC)
    wx = sx * (1 / LOG2E) * a
    if UY_ptr is not None:
        uy = load_vector(UY_ptr, offs_n, size_y, 0.0, ACC) * load_vector(RY_ptr, offs_n, size_y, 0.0, ACC)
        wy = load_vector(SY_ptr, offs_n, size_y, 1.0, ACC) * (1 / LOG2E) * b
    inside = (offs_m[:, None] < size_x) & (offs_n[None, :] < columns)
    offs = offs_m.to(tl.int64)[:, None] * stride_cm + offs_n[None, :]
    if S_ptr.dtype.element_ty == tl.int16:
        s = tl.load(S_ptr + offs, mask=inside, other=NO_NEGATIVE)
        s = tl.where(s == NO_NEGATIVE, FLOOR, s.to(ACC) * (sx * (1 / CODES))[:, None])
    else:
        s = tl.load(S_ptr + offs, mask=inside, other=FLOOR)
    if NX_ptr is None:
        c = both_directions(tl.exp2(s), a, ux * wx, b, uy * wy)
    else:
        e = tl.exp2(shifted(s, NX_ptr, offs_m, size_x, YC_ptr, offs_n, size_y, 1, ACC)) * ux[:, None]
        c = (e * wx[:, None]) * b[None, :]
        if DY_ptr is not None:
            store_sums(DY_ptr, pid_m, offs_n, 0, size_y, tl.sum(e, 0))
        if UY_ptr is not None:
            e = tl.exp2(shifted(s, NY_ptr, offs_n, size_y, XC_ptr, offs_m, size_x, 0, ACC)) * uy[None, :]
            c += (e * wy[None, :]) * a[:, None]
            if DX_ptr is not None:
                store_sums(DX_ptr, pid_n, offs_m, 0, size_x, tl.sum(e, 1))
    tl.store(C_ptr + offs, cast(c, C_ptr.dtype.element_ty, EMULATE), mask=inside)
