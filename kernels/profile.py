"""Sums of rows on a ladder of temperatures, and how many of their products are above and tied with a threshold.

With x_j = d_j - m, of the products d_j and their maximum m, and e_k = exp(beta_k x), the sums are those of e_k, e_k x
and e_k x^2. Inverse temperatures are in ratio sqrt(2), so that e_{k+2} = e_k^2: two exponentials serve all.
"""

import triton
import triton.language as tl

from .tile import FLOOR, load_vector, negatives, raw_dots


@triton.jit
def add_rungs(l, x, y, z, keep, BETA_ptr, RUNGS: tl.constexpr, LANES: tl.constexpr):
    """Return the sums (BLOCK_M, LANES) after also seeing z <= 0 of a tile, where `keep`."""
    lanes = tl.arange(0, LANES)
    for half in tl.static_range(2):
        if half < RUNGS:
            e = tl.where(keep, tl.exp2(z * tl.load(BETA_ptr + half)), 0.0)
            for step in range((RUNGS - half + 1) // 2):  # not unrolled: eight times the code
                here = lanes[None, :] == 2 * step + half
                l += tl.where(here, tl.sum(e, 1)[:, None], 0.0)
                x += tl.where(here, tl.sum(e * z, 1)[:, None], 0.0)
                y += tl.where(here, tl.sum(e * z * z, 1)[:, None], 0.0)
                e = e * e
    return l, x, y


@triton.jit(do_not_specialize=["shift"])
def profile_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, C_ptr, TARGET_ptr, XI_ptr, YI_ptr, guide, BETA_ptr, LOW_ptr, HIGH_ptr, STATES_ptr,
    COUNTS_ptr,
    size_x, size_y, shift, D, stride_xm, stride_yn, split,
    TARGET: tl.constexpr, DIAGONAL: tl.constexpr, IDS: tl.constexpr, GUIDE: tl.constexpr, BLOCK_G: tl.constexpr,
    RUNGS: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the maximum and the sums of BLOCK_M rows over `split` blocks of columns into slot program_id(1), (slots,
    1 + 3 RUNGS, size_x), and how many products are above `high`, or from `low` to it, into (slots, 2, size_x).

    d_ij = a_i b_j (x_i . y_j). BETA: log2(e) times the inverse temperatures. A bias of C other than 0 leaves its column
    out; a product that is NaN is above.
    """
    offs_m, lanes = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, LANES)
    slot = tl.program_id(1)
    a = load_vector(A_ptr, offs_m, size_x, 1.0, ACC)
    low, high = load_vector(LOW_ptr, offs_m, size_x, 0.0, ACC), load_vector(HIGH_ptr, offs_m, size_x, 0.0, ACC)
    beta = tl.load(BETA_ptr + lanes, mask=lanes < RUNGS, other=0.0)
    m = tl.full((BLOCK_M,), FLOOR, ACC)
    l, x = tl.zeros((BLOCK_M, LANES), ACC), tl.zeros((BLOCK_M, LANES), ACC)
    y = tl.zeros((BLOCK_M, LANES), ACC)
    above, ties = tl.zeros((BLOCK_M,), tl.int32), tl.zeros((BLOCK_M,), tl.int32)
    start, end = slot * split, tl.minimum((slot + 1) * split, tl.cdiv(size_y, BLOCK_N))
    for block in range(start, end):
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        d = raw_dots(
            None, X_ptr, Y_ptr, tl.program_id(0) * BLOCK_M, block * BLOCK_N, stride_xm, stride_yn, size_x, size_y, D,
            ACC, DOT, TMA, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        d = (d * load_vector(B_ptr, offs_n, size_y, 1.0, ACC)[None, :]) * a[:, None]
        keep = negatives(
            offs_m, offs_n, size_x, size_y, shift, TARGET_ptr, XI_ptr, YI_ptr, guide, TARGET, DIAGONAL, IDS, GUIDE,
            BLOCK_G, ACC,
        )  # fmt: skip
        if C_ptr is not None:
            keep = keep & (load_vector(C_ptr, offs_n, size_y, 0.0, ACC) == 0.0)[None, :]
        under = d <= high[:, None]
        above += tl.sum((keep & ~under).to(tl.int32), 1)
        ties += tl.sum((keep & under & (d >= low[:, None])).to(tl.int32), 1)
        d = tl.where(keep, d, FLOOR)
        new = tl.maximum(m, tl.max(d, 1))
        move = tl.where(m == FLOOR, 0.0, m - new)[:, None]
        scale = tl.exp2(move * beta[None, :])
        y = (y + move * (2 * x + move * l)) * scale
        x = (x + move * l) * scale
        l = l * scale
        m = new
        z = tl.where(keep, d - tl.where(m == FLOOR, 0.0, m)[:, None], 0.0)
        l, x, y = add_rungs(l, x, y, z, keep, BETA_ptr, RUNGS, LANES)
    inside = offs_m < size_x
    ptrs = STATES_ptr + tl.cast(slot, tl.int64) * (1 + 3 * RUNGS) * size_x + offs_m
    tl.store(ptrs, m, mask=inside)
    many, places = inside[:, None] & (lanes < RUNGS)[None, :], ptrs[:, None] + (1 + lanes)[None, :] * size_x
    tl.store(places, l, mask=many)
    tl.store(places + RUNGS * size_x, x, mask=many)
    tl.store(places + 2 * RUNGS * size_x, y, mask=many)
    counts = COUNTS_ptr + tl.cast(slot, tl.int64) * 2 * size_x + offs_m
    tl.store(counts, above, mask=inside)
    tl.store(counts + size_x, ties, mask=inside)
