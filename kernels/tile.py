"""The functions that kernels share: loads, dot products, logits of a pair of tiles, and which are negatives.

`x` and `y` are the two sides of a tile pass, in either role: queries against keys or keys against queries.
"""

import triton
import triton.language as tl

# The logit of what is no negative. Finite: its 2^-inf = 0 times itself is 0, where a logit of -inf gives NaN.
FLOOR = tl.constexpr(-(2.0**127))
# Exponentials are written times its inverse, and factors that turn them into coefficients are times it. So both are as
# far from the least number as they can be: unshifted exponentials of a million columns, averaged over a million rows.
RAISE = tl.constexpr(2.0**20)


@triton.jit
def load_vector(ptr, offs, size, default: tl.constexpr, ACC: tl.constexpr):
    """Return `ptr[offs]`, or `default` everywhere where there is no vector; 0 outside of a size, if one is given."""
    if ptr is None:
        values = tl.full(offs.shape, default, ACC)
    elif size is None:
        values = tl.load(ptr + offs).to(ACC)
    else:
        values = tl.load(ptr + offs, mask=offs < size, other=0.0).to(ACC)
    return values


@triton.jit
def with_biases(s, C_ptr, offs, size, AXIS: tl.constexpr, ACC: tl.constexpr):
    """Return logits, summed along AXIS, with the biases of what is scored, at `offs` of it; as they are without C."""
    if C_ptr is not None:
        s += tl.expand_dims(load_vector(C_ptr, offs, size, 0.0, ACC), 1 - AXIS)
    return s


@triton.jit
def live(inverse, zero_row: tl.constexpr):
    """Return inverse norms as gradients take them: 0 for a row that counts as zero, `zero_row` or more. NaN stays."""
    return tl.where(inverse >= zero_row, 0.0, inverse)


@triton.jit
def load_rows(ptr, offs, stride, size, offs_d, D):
    """Load (len(offs), len(offs_d)) of a matrix whose last dimension is contiguous; 0 outside."""
    ptrs = ptr + offs.to(tl.int64)[:, None] * stride + offs_d[None, :]
    return tl.load(ptrs, mask=(offs[:, None] < size) & (offs_d[None, :] < D), other=0.0)


@triton.jit
def load_tile(
    ptr, start, stride, size, start_d, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr = True,
):  # fmt: skip
    """Load rows from `start` and columns from `start_d` of a matrix: (BLOCK_M, BLOCK_D).

    A column outside is 0; so is a row outside if MASKED, else it is the last row. TMA: `ptr` is a descriptor of blocks
    of this shape, and what is outside is outside of the matrix, not past `size`.
    """
    offs_m, offs_d = start + tl.arange(0, BLOCK_M), start_d + tl.arange(0, BLOCK_D)
    if TMA:
        tile = ptr.load([start, start_d])
    elif MASKED:
        tile = load_rows(ptr, offs_m, stride, size, offs_d, D)
    else:
        ptrs = ptr + tl.minimum(offs_m, size - 1).to(tl.int64)[:, None] * stride + offs_d[None, :]
        tile = tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    return tile


@triton.jit
def cast(x, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Return `x` rounded to the nearest `dtype`; EMULATE: where that of float32 to bfloat16 would truncate."""
    if EMULATE and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, DOT: tl.constexpr):
    """Return `acc + a @ b`. DOT: "ieee" or "tf32" of float32 operands; "upcast" in the accumulator's dtype."""
    if DOT == "upcast":
        acc = tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        acc = tl.dot(a, b, acc, input_precision=DOT, out_dtype=acc.dtype)
    return acc


@triton.jit
def add_product(x, y, acc, DOT: tl.constexpr, TURNED: tl.constexpr):
    """Return `acc + x @ y^T`, or TURNED `acc + y @ x^T`."""
    if TURNED:
        acc = dot(y, tl.trans(x), acc, DOT)
    else:
        acc = dot(x, tl.trans(y), acc, DOT)
    return acc


@triton.jit
def raw_dots(
    x,
    X_ptr, Y_ptr,
    start_m, start_n, stride_xm, stride_yn, size_x, size_y, D,
    ACC: tl.constexpr, DOT: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, APART: tl.constexpr = False, TURNED: tl.constexpr = False,
):  # fmt: skip
    """Return d_ij = x_i . y_j, (BLOCK_M, BLOCK_N), of any value outside, such as NaN.

    `x` holds whole rows where they fit a tile, else None. APART: warps of their own load the tiles, through descriptors
    that are made here, since the compiler takes none of the host's for them. TURNED: the product is y x^T, and its
    transpose is returned, in which threads of a warp share columns rather than rows.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_M) if TURNED else (BLOCK_M, BLOCK_N), ACC)
    if x is not None:
        y = load_tile(Y_ptr, start_n, stride_yn, size_y, 0, D, BLOCK_N, BLOCK_D, TMA, False)
        acc = add_product(x, y, acc, DOT, TURNED)
    else:
        if APART:
            X_ptr = tl.make_tensor_descriptor(X_ptr, [size_x, D], [stride_xm, 1], [BLOCK_M, BLOCK_D])
            Y_ptr = tl.make_tensor_descriptor(Y_ptr, [size_y, D], [stride_yn, 1], [BLOCK_N, BLOCK_D])
        for start_d in tl.range(0, D, BLOCK_D, warp_specialize=APART):
            x_part = load_tile(X_ptr, start_m, stride_xm, size_x, start_d, D, BLOCK_M, BLOCK_D, TMA or APART, False)
            y_part = load_tile(Y_ptr, start_n, stride_yn, size_y, start_d, D, BLOCK_N, BLOCK_D, TMA or APART, False)
            acc = add_product(x_part, y_part, acc, DOT, TURNED)
    return tl.trans(acc) if TURNED else acc


@triton.jit
def meets_diagonal(start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return whether a tile holds a pair (i, i)."""
    return (start_m < start_n + BLOCK_N) & (start_n < start_m + BLOCK_M)


@triton.jit
def negatives(
    offs_m, offs_n, size_x, size_y, shift,
    TARGET_ptr, XI_ptr, YI_ptr, guide,
    TARGET: tl.constexpr, DIAGONAL: tl.constexpr, IDS: tl.constexpr, GUIDE: tl.constexpr, BLOCK_G: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return which pairs are negatives, of columns inside: (BLOCK_M, BLOCK_N).

    TARGET: 0 there are no targets, 1 y_{T[i]} is x_i's, 2 x_{T[j]} is y_j's. DIAGONAL: x_i and y_i are no negatives.
    IDS: how many ids a row has; pairs of which one agrees are no negatives.
    shift: nor are x_i and y_j with |i - j| = shift; or None. GUIDE: how the guide's rows are multiplied, as DOT of
    `dot`, or "" without one; `guide` is (GX, GY, inverse norms of both, ceilings of x, row length, strides).
    """
    keep = (offs_m[:, None] >= 0) & (offs_n[None, :] < size_y)
    if DIAGONAL:
        keep = keep & (offs_m[:, None] != offs_n[None, :])
    if shift is not None:
        keep = keep & (tl.abs(offs_m[:, None] - offs_n[None, :]) != shift)
    if TARGET != 0:
        if TARGET == 1:
            target = tl.load(TARGET_ptr + offs_m, mask=offs_m < size_x, other=-1)
            keep = keep & (target[:, None] != offs_n[None, :])
        else:
            target = tl.load(TARGET_ptr + offs_n, mask=offs_n < size_y, other=-1)
            keep = keep & (offs_m[:, None] != target[None, :])
    if XI_ptr is not None:
        for k in tl.static_range(IDS):
            x_ids = tl.load(XI_ptr + offs_m * IDS + k, mask=offs_m < size_x, other=0)
            y_ids = tl.load(YI_ptr + offs_n * IDS + k, mask=offs_n < size_y, other=0)
            keep = keep & (x_ids[:, None] != y_ids[None, :])
    if GUIDE != "":
        GX_ptr, GY_ptr, GA_ptr, GB_ptr, CEILING_ptr, D, stride_gx, stride_gy = guide
        g = tl.zeros(keep.shape, ACC)
        for start_d in range(0, D, BLOCK_G):
            offs_d = start_d + tl.arange(0, BLOCK_G)
            x = load_rows(GX_ptr, offs_m, stride_gx, size_x, offs_d, D)
            y = load_rows(GY_ptr, offs_n, stride_gy, size_y, offs_d, D)
            g = dot(x, tl.trans(y), g, GUIDE)
        a = load_vector(GA_ptr, offs_m, size_x, 1.0, ACC)
        b = load_vector(GB_ptr, offs_n, size_y, 1.0, ACC)
        ceiling = load_vector(CEILING_ptr, offs_m, size_x, 0.0, ACC)
        keep = keep & ~(g * (a[:, None] * b[None, :]) > ceiling[:, None])
    return keep
