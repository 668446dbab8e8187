"""The quantities that each row has by itself, or from its softmax: everything of a side that is not a tile."""

import triton
import triton.language as tl

from .tile import RAISE, cast, live, load_rows, load_vector


@triton.jit
def divided(x, y):
    """Return `x / y` to the nearest: a GPU's own quotient of float32 is off by up to 2 units, in all rows alike."""
    if x.dtype == tl.float32:
        quotient = tl.div_rn(x, y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def root(x):
    """Return the square root to the nearest."""
    if x.dtype == tl.float32:
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def inverse_norm(square, eps: tl.constexpr, at_eps: tl.constexpr):
    """Return 1 / max(norm, eps), which is `at_eps` for norms up to eps. NaN stays NaN; a norm that overflows is NaN."""
    norm = root(square)
    norm += norm - norm
    small = norm <= eps
    one = tl.full(norm.shape, 1.0, norm.dtype)
    return tl.where(small, at_eps, divided(one, tl.where(small, one, norm)))


@triton.jit
def side_kernel(
    X_ptr, PADDED_ptr, A_ptr, TEMPERATURE_ptr, S_ptr, U_ptr, R_ptr, W_ptr, Y_ptr, PADDED_Y_ptr, B_ptr, TARGET_ptr,
    POS_ptr,
    size_x, size_y, D, width, stride_xm, stride_yn, stride_t,
    eps: tl.constexpr, at_eps: tl.constexpr, log2e: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a_i = 1 / max(|x_i|, eps), and of these what is asked for:

    PADDED   x_i and zeros, `width` components
    S        s_i = log2(e) / t_i
    W        w_i = u_i r_i / t_i
    POS      pos_i = a_i b_y (x_i . y_y) / t_i with y the row's target: 0 for -1, NaN where it is out of range
    B        with NORMALIZE: b_y = 1 / max(|y_y|, eps), of keys that are targets
    PADDED_Y with POS: y_y and zeros, of keys that are targets

    Without NORMALIZE a and b are given, or 1. Where t is not positive and finite all that is made of it is NaN.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < size_x
    square = tl.zeros((BLOCK_M,), ACC)
    dots = tl.zeros((BLOCK_M,), ACC)
    square_y = tl.zeros((BLOCK_M,), ACC)
    target = offs_m.to(tl.int64)
    if TARGET_ptr is not None:
        target = tl.load(TARGET_ptr + offs_m, mask=inside, other=-1)
    valid = (target >= 0) & (target < size_y)
    row = tl.where(valid, target, size_y)
    if NORMALIZE or (POS_ptr is not None) or (PADDED_ptr is not None):
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            part = load_rows(X_ptr, offs_m, stride_xm, size_x, offs_d, D)
            if PADDED_ptr is not None:
                ptrs = PADDED_ptr + offs_m.to(tl.int64)[:, None] * width + offs_d[None, :]
                tl.store(ptrs, part, mask=inside[:, None] & (offs_d < width)[None, :])
            x = part.to(ACC)
            square += tl.sum(x * x, 1)
            if POS_ptr is not None:
                part = load_rows(Y_ptr, row, stride_yn, size_y, offs_d, D)
                if PADDED_Y_ptr is not None:
                    ptrs = PADDED_Y_ptr + row[:, None] * width + offs_d[None, :]
                    tl.store(ptrs, part, mask=(inside & valid)[:, None] & (offs_d < width)[None, :])
                y = part.to(ACC)
                dots += tl.sum(x * y, 1)
                square_y += tl.sum(y * y, 1)
    if NORMALIZE:
        a = inverse_norm(square, eps, at_eps)
        tl.store(A_ptr + offs_m, a, mask=inside)
    else:
        a = load_vector(A_ptr, offs_m, size_x, 1.0, ACC)
    if TEMPERATURE_ptr is not None:
        t = tl.load(TEMPERATURE_ptr + offs_m * stride_t, mask=inside, other=1.0)
        t = tl.where((t > 0.0) & (t < float("inf")), t, float("nan"))
        if S_ptr is not None:
            tl.store(S_ptr + offs_m, divided(tl.full(t.shape, log2e, ACC), t), mask=inside)
        if W_ptr is not None:
            u = tl.load(U_ptr + offs_m, mask=inside, other=0.0)
            tl.store(W_ptr + offs_m, u / t * tl.load(R_ptr + offs_m, mask=inside, other=0.0), mask=inside)
        if POS_ptr is not None:
            if NORMALIZE:
                b = inverse_norm(square_y, eps, at_eps)
                if B_ptr is not None:
                    tl.store(B_ptr + row, b, mask=inside & valid)
            else:
                b = load_vector(B_ptr, row, size_y, 1.0, ACC)
            pos = divided(dots * a * b, t)
            pos += pos - pos  # an infinite logit is never legitimate: NaN
            pos = tl.where(valid, pos, tl.where(target == -1, 0.0, float("nan")))
            tl.store(POS_ptr + offs_m, pos, mask=inside)


@triton.jit
def scale_kernel(
    X_ptr, A_ptr, U_ptr, N_ptr, M_ptr, R_ptr, TEMPERATURE_ptr, F_ptr, OUT_ptr,
    size_x, D, stride_xm, stride_t,
    zero_row: tl.constexpr, EMULATE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write f_i = RAISE a_i u_i 2^(n_i - m_i) r_i / t_i, which turns exponentials of logits less n_i into coefficients,
    and the rows f_i x_i; without N of logits as they are."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < size_x
    t = tl.load(TEMPERATURE_ptr + offs_m * stride_t, mask=inside, other=1.0)
    u = tl.load(U_ptr + offs_m, mask=inside, other=0.0)
    m = tl.load(M_ptr + offs_m, mask=inside, other=0.0)
    r = tl.load(R_ptr + offs_m, mask=inside, other=0.0)
    if N_ptr is not None:  # m and r are 0 of a row of no logits, whatever its n
        m = tl.where(r == 0.0, 0.0, m - tl.load(N_ptr + offs_m, mask=inside, other=0.0))
    e = tl.exp2(-m) * r
    f = u / t * (e * RAISE) * live(load_vector(A_ptr, offs_m, size_x, 1.0, ACC), zero_row)
    tl.store(F_ptr + offs_m, f, mask=inside)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        x = load_rows(X_ptr, offs_m, stride_xm, size_x, offs_d, D).to(ACC)
        ptrs = OUT_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
        scaled = cast(f[:, None] * x, OUT_ptr.dtype.element_ty, EMULATE)
        tl.store(ptrs, scaled, mask=inside[:, None] & (offs_d[None, :] < D))
