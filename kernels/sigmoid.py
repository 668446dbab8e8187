"""The loss and the slope of a pair that is classified by itself."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log_one_plus(e):
    """Return log(1 + e) of e in [0, 1] with full relative accuracy, where the logarithm of a rounded 1 + e has none.

    With r = e / (2 + e), at most 1/3, it is 2 atanh(r) = 2 (r + r^3 / 3 + r^5 / 5 + ...).
    """
    TERMS: tl.constexpr = 17 if e.dtype == tl.float64 else 8
    r = e / (2.0 + e)
    square = r * r
    series = tl.full(e.shape, 1.0 / (2 * TERMS - 1), e.dtype)
    for k in tl.static_range(TERMS - 1, 0, -1):
        series = series * square + 1.0 / (2 * k - 1)
    return (r + r) * series


@triton.jit
def softplus_and_sigmoid(z):
    """Return log(1 + e^x) and 1 / (1 + e^-x) of x = z ln 2, the logit of a negative: its loss, and the loss's slope."""
    e = tl.exp2(-tl.abs(z))
    above = z > 0.0
    softplus = tl.where(above, z, 0.0) * LN2 + log_one_plus(e)
    return softplus, tl.where(above, 1.0, e) / (1.0 + e)
