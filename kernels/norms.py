"""Inverse norms of rows."""

import triton
import triton.language as tl

from .tile import load_rows


@triton.jit
def inverse_norm(square, eps: tl.constexpr, at_eps: tl.constexpr):
    """1 / max(norm, eps); `at_eps` is its value for norms up to eps. NaN stays NaN."""
    norm = tl.sqrt(square)
    small = norm <= eps
    return tl.where(small, at_eps, 1.0 / tl.where(small, 1.0, norm))


@triton.jit
def inverse_norms_kernel(
    X_ptr,
    A_ptr,
    size_x,
    D,
    stride_xm,
    eps: tl.constexpr,
    at_eps: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """a_i = 1 / max(|x_i|, eps)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    square = tl.zeros((BLOCK_M,), ACC)
    for start_d in range(0, D, BLOCK_D):
        x = load_rows(X_ptr, offs_m, stride_xm, size_x, start_d + tl.arange(0, BLOCK_D), D).to(ACC)
        square += tl.sum(x * x, 1)
    tl.store(A_ptr + offs_m, inverse_norm(square, eps, at_eps), mask=offs_m < size_x)
