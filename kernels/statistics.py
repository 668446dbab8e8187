"""Softmax statistics of rows, and of columns from the same dot products.

A state is (m, l, x) in base 2: the maximum logit, sum 2^(s - m) and sum 2^(s - m) v, where v are the logits without
their biases. States of parts of a row lie
in slots of a (slots, STATE_SLOTS, size) buffer and are merged in a fixed order, so a result never depends on timing.
"""

import triton
import triton.language as tl

from .tile import FLOOR, load_tile, load_vector, negatives, raw_dots, with_biases

STATE_SLOTS = tl.constexpr(3)  # vectors of a state


@triton.jit
def update(m, l, x, s, v, AXIS: tl.constexpr):
    """Return the states after also seeing the logits s along AXIS, v without biases; those that do not count are FLOOR,
    and their biases change nothing."""
    new = tl.maximum(m, tl.max(s, AXIS))
    shift = tl.where(new == FLOOR, 0.0, new)
    p = tl.exp2(s - tl.expand_dims(shift, AXIS))
    scale = tl.exp2(m - shift)
    return new, l * scale + tl.sum(p, AXIS), x * scale + tl.sum(p * v, AXIS)


@triton.jit
def load_states(S_ptr, slot, offs, size, inside):
    """Return the states in a block of slots, (len(slot), len(offs)) each; those not inside are empty."""
    ptrs = S_ptr + slot.to(tl.int64)[:, None] * STATE_SLOTS * size + offs[None, :]
    m = tl.load(ptrs, mask=inside, other=FLOOR)
    l = tl.load(ptrs + size, mask=inside, other=0.0)
    x = tl.load(ptrs + size * 2, mask=inside, other=0.0)
    return m, l, x


@triton.jit
def store_state(S_ptr, slot, offs, size, m, l, x):
    ptrs = S_ptr + tl.cast(slot, tl.int64) * STATE_SLOTS * size + offs
    inside = offs < size
    tl.store(ptrs, m, mask=inside)
    tl.store(ptrs + size, l, mask=inside)
    tl.store(ptrs + size * 2, x, mask=inside)


@triton.jit
def sums_of_rows(p, TURNED: tl.constexpr):
    """Return the sums of rows; TURNED: in parts, (rows, columns / 16, 8), that each thread adds up alone.

    On sm_90 columns of a transposed product are of one warp by 16s, and i and i + 8 of these of one thread.
    """
    if TURNED:
        sums = tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // 16, 2, 8)), 2)
    else:
        sums = tl.sum(p, 1)
    return sums


@triton.jit
def add_tile(
    m, l, x, x_tile, start_m, start_n, a, sx, outside,
    X_ptr, Y_ptr, B_ptr, SY_ptr, XC_ptr, YC_ptr, TARGET_ptr, XI_ptr, YI_ptr, guide, COLUMNS_ptr, slot,
    size_x, size_y, shift, D, stride_xm, stride_yn,
    WHOLE: tl.constexpr, TARGET: tl.constexpr, DIAGONAL: tl.constexpr, IDS: tl.constexpr, GUIDE: tl.constexpr,
    BLOCK_G: tl.constexpr, UNSHIFTED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """Return the rows' states after one more tile, and its dot products; write the states of its columns into a slot.

    A row outside is not stored, and needs no mask; for columns its logits get `outside`, FLOOR, which is 0 of others.
    WHOLE: whether all columns are inside, and negatives. UNSHIFTED: one exponential serves both directions. TURNED: see
    `sums_of_rows`; it is for UNSHIFTED alone.
    """
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    b = load_vector(B_ptr, offs_n, None if WHOLE else size_y, 1.0, ACC)
    d = raw_dots(
        x_tile, X_ptr, Y_ptr, start_m, start_n, stride_xm, stride_yn, size_x, size_y, D, ACC, DOT, TMA, BLOCK_M,
        BLOCK_N, BLOCK_D, False, TURNED,
    )  # fmt: skip
    s = (d * b[None, :]) * (a * sx)[:, None]
    if COLUMNS_ptr is not None:
        s += outside[:, None]
    if not WHOLE:
        keep = negatives(
            offs_m, offs_n, size_x, size_y, shift, TARGET_ptr, XI_ptr, YI_ptr, guide, TARGET, DIAGONAL, IDS, GUIDE,
            BLOCK_G, ACC,
        )  # fmt: skip
        s = tl.where(keep, s, FLOOR)
    if UNSHIFTED:
        p = tl.exp2(s)
        l += sums_of_rows(p, TURNED)
        if MEAN:
            x += sums_of_rows(p * s, TURNED)
    else:
        m, l, x = update(m, l, x, with_biases(s, YC_ptr, offs_n, size_y, 1, ACC), s, 1)
    if COLUMNS_ptr is not None:
        none, zero = tl.full((BLOCK_N,), FLOOR, ACC), tl.zeros((BLOCK_N,), ACC)
        if UNSHIFTED:
            cm, cl, cx = zero, tl.sum(p, 0), zero
            if MEAN:
                cx = tl.sum(p * s, 0)
        else:
            sy = load_vector(SY_ptr, offs_n, size_y, 1.0, ACC)
            t = (d * a[:, None]) * (b * sy)[None, :] + outside[:, None]
            if not WHOLE:
                t = tl.where(keep, t, FLOOR)
            cm, cl, cx = update(none, zero, zero, with_biases(t, XC_ptr, offs_m, size_x, 0, ACC), t, 0)
        store_state(COLUMNS_ptr, slot, offs_n, size_y, cm, cl, cx)
    return m, l, x, d


@triton.jit
def span(first, size: tl.constexpr, BLOCK: tl.constexpr, start, end):
    """Return the first of the blocks from start to end that meets one of `size` places from `first` on, and the one
    after the last."""
    near, beyond = first // BLOCK, tl.cdiv(first + size, BLOCK)
    return tl.minimum(tl.maximum(near, start), end), tl.minimum(tl.maximum(beyond, start), end)


@triton.jit(do_not_specialize=["row_start", "shift", "split", "slot"])  # a split of 1 would take more registers
def statistics_kernel(
    X_ptr, Y_ptr, A_ptr, B_ptr, SX_ptr, SY_ptr, XC_ptr, YC_ptr, TARGET_ptr, XI_ptr, YI_ptr, guide, ROWS_ptr,
    COLUMNS_ptr,
    row_start, size_x, size_y, shift, D, stride_xm, stride_yn, split, slot,
    TARGET: tl.constexpr, DIAGONAL: tl.constexpr, IDS: tl.constexpr, HALF: tl.constexpr, PEEL: tl.constexpr,
    GUIDE: tl.constexpr, BLOCK_G: tl.constexpr, UNSHIFTED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, HOIST: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Write states of BLOCK_M rows over `split` blocks of columns into row slot `slot + program_id(1)`, and of these
    columns over these rows into column slot 1 + program_id(0).

    s_ij = a_i b_j (x_i . y_j) sx_i + yc_j for rows, with sy_j and xc_i for columns; sx = log2(e) / t, and biases are in
    base 2. UNSHIFTED: every exponential fits, every maximum is 0, both directions have one temperature, and nothing has
    a bias. Without MEAN the third vector of such states is 0. PEEL "off" is of whole tiles that do not meet a diagonal
    of pairs that are left out, "on" of the others, with the last columns; "" of all. HALF: x and y are the same rows,
    and columns before a block's own rows are left
    out, being those of earlier blocks' states; what is written of columns up to the last of its own does not count.
    TURNED: threads add up parts of the rows' sums through all tiles, so that a tile waits only for its columns'.
    """
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)
    start_m = row_start + pid_m * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    a = load_vector(A_ptr, offs_m, size_x, 1.0, ACC)
    sx = load_vector(SX_ptr, offs_m, size_x, 1.0, ACC)
    if HOIST:
        x_tile = load_tile(X_ptr, start_m, stride_xm, size_x, 0, D, BLOCK_M, BLOCK_D, TMA, False)
    else:
        x_tile = None
        if PEEL == "off":  # others, which are few or have more in their registers, may spill then
            tl.assume(D > 0)  # so that a tile does not ask whether its loop over D runs, and has its zeros once
    m = tl.full((BLOCK_M,), 0.0 if UNSHIFTED else FLOOR, ACC)
    l = tl.zeros((BLOCK_M, BLOCK_N // 16, 8) if TURNED else (BLOCK_M,), ACC)
    x = tl.zeros((BLOCK_M, BLOCK_N // 16, 8) if TURNED and MEAN else (BLOCK_M,), ACC)
    outside = tl.where(offs_m < size_x, 0.0, FLOOR).to(ACC)
    whole, count = size_y // BLOCK_N, tl.cdiv(size_y, BLOCK_N)
    start, end = pid_n * split, tl.minimum((pid_n + 1) * split, count)
    if HALF:
        start = tl.maximum(start, start_m // BLOCK_N)
    if PEEL != "":
        end = tl.minimum(end, whole)
    near, beyond, met, after = start, start, start, start  # blocks near to beyond, met to after meet a diagonal
    if PEEL != "" and DIAGONAL:
        near, beyond = span(start_m, BLOCK_M, BLOCK_N, start, end)
        if shift is not None:
            met, after = span(start_m + shift, BLOCK_M, BLOCK_N, start, end)
    first, second = beyond - near, after - met
    blocks = end - start - first - second
    if PEEL == "on":
        blocks = first + second + (count - whole)
    for k in range(0, blocks):
        if PEEL == "on":
            block = tl.where(k < first, near + k, tl.where(k < first + second, met - first, whole - first - second) + k)
        else:
            block = start + k
            block += tl.where(block >= near, first, 0)
            block += tl.where(block >= met, second, 0)
        m, l, x, _ = add_tile(
            m, l, x, x_tile, start_m, block * BLOCK_N, a, sx, outside, X_ptr, Y_ptr, B_ptr, SY_ptr, XC_ptr, YC_ptr,
            TARGET_ptr, XI_ptr, YI_ptr, guide, COLUMNS_ptr, pid_m + 1, size_x, size_y, shift, D, stride_xm, stride_yn,
            PEEL == "off", TARGET, DIAGONAL, IDS, GUIDE, BLOCK_G, UNSHIFTED, MEAN, ACC, DOT, TMA, BLOCK_M, BLOCK_N,
            BLOCK_D, TURNED,
        )  # fmt: skip
    if TURNED:
        l = tl.sum(tl.sum(l, 2), 1)
        if MEAN:
            x = tl.sum(tl.sum(x, 2), 1)
    store_state(ROWS_ptr, slot + pid_n, offs_m, size_x, m, l, x)


@triton.jit
def finished_state(m, l, x, ln2: tl.constexpr):
    """Return the statistics of a state: neg = ln sum e^s, mean = sum e^(s - neg) s, and m and r of `merge_kernel`."""
    empty = l == 0.0
    total = tl.where(empty, 1.0, l)
    mean = x / total * ln2
    neg = tl.where(empty, float("-inf"), m + tl.log2(total)) * ln2
    neg = tl.where(mean == mean, neg, float("nan"))
    r = tl.where(mean == mean, tl.where(empty, 0.0, 1.0 / total), float("nan"))
    return neg, mean, tl.where(empty, 0.0, m), r


@triton.jit(do_not_specialize=["first", "slots", "own", "start"])
def merge_kernel(
    S_ptr, NEG_ptr, MEAN_ptr, MAXIMUM_ptr, SCALE_ptr,
    first, slots, own, start, size,
    ln2: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Merge slots first, first + 1, ... into slot 0, or with NEG into statistics.

    neg = ln sum e^s, mean = sum e^(s - neg) s: -inf and 0 where there were no logits. MAXIMUM and SCALE are m and r
    with e^(s - neg) = 2^(s log2(e) - m) r, and 0 there. HALF: slot k of 1 to `own` is of the columns of block
    start + k - 1 of HALF rows, and only what is behind these rows counts; 0: every slot counts.
    """
    offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.full((BLOCK_M,), FLOOR, ACC)
    l = tl.zeros((BLOCK_M,), ACC)
    x = tl.zeros((BLOCK_M,), ACC)
    for near in range(first, slots, BLOCK_S):
        slot = near + tl.arange(0, BLOCK_S)
        inside = (slot < slots)[:, None] & (offs < size)[None, :]
        if HALF:
            inside = inside & (
                ((slot < 1) | (slot > own))[:, None] | ((offs // HALF)[None, :] >= (start + slot)[:, None])
            )
        m_slot, l_slot, x_slot = load_states(S_ptr, slot, offs, size, inside)
        new = tl.maximum(m, tl.max(m_slot, 0))
        scale = tl.exp2(m - new)
        scale_slot = tl.exp2(m_slot - new[None, :])
        l = l * scale + tl.sum(l_slot * scale_slot, 0)
        x = x * scale + tl.sum(x_slot * scale_slot, 0)
        m = new
    if NEG_ptr is None:
        store_state(S_ptr, 0, offs, size, m, l, x)
    else:
        neg, mean, m, r = finished_state(m, l, x, ln2)
        tl.store(NEG_ptr + offs, neg, mask=offs < size)
        tl.store(MEAN_ptr + offs, mean, mask=offs < size)
        tl.store(MAXIMUM_ptr + offs, m, mask=offs < size)
        tl.store(SCALE_ptr + offs, r, mask=offs < size)
