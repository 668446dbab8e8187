"""Logits of the targets."""

import triton
import triton.language as tl

from .tile import load_rows, load_vector


@triton.jit
def positives_kernel(
    Q_ptr,
    K_ptr,
    A_ptr,
    B_ptr,
    TEMPERATURE_ptr,
    T_ptr,
    POS_ptr,
    size_q,
    size_k,
    D,
    stride_qm,
    stride_kn,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pos_i = a_i b_y (q_i . k_y) / t_i with y the row's target: 0 for -1, NaN where it is out of range."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < size_q
    if T_ptr is None:
        target = offs_m.to(tl.int64)
    else:
        target = tl.load(T_ptr + offs_m, mask=inside, other=-1)
    valid = (target >= 0) & (target < size_k)
    row = tl.where(valid, target, size_k)
    acc = tl.zeros((BLOCK_M,), ACC)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        q = load_rows(Q_ptr, offs_m, stride_qm, size_q, offs_d, D).to(ACC)
        k = load_rows(K_ptr, row, stride_kn, size_k, offs_d, D).to(ACC)
        acc += tl.sum(q * k, 1)
    a = load_vector(A_ptr, offs_m, size_q, 1.0, ACC)
    b = load_vector(B_ptr, row, size_k, 1.0, ACC)
    t = tl.load(TEMPERATURE_ptr + offs_m, mask=inside, other=1.0)
    pos = acc * a * b / t
    pos += pos - pos  # an infinite logit is never legitimate: NaN
    pos = tl.where(valid, pos, tl.where(target == -1, 0.0, float("nan")))
    tl.store(POS_ptr + offs_m, pos, mask=inside)
