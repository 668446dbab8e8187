"""Which plan runs for these shapes, and why: arithmetic on sizes only, no tensors."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

MIB = 2**20
DEFAULT_LIMIT = {"cpu": 64 * MIB}  # a block that a few caches can hold; other devices: OTHER_LIMIT
OTHER_LIMIT = 256 * MIB
LIMIT_VARIABLE = "FUSED_INFONCE_WORKSPACE_LIMIT"
ROWS = 1024  # rows of a chunk in PyTorch: enough for a library GEMM to run at its full rate
ONEPASS_ROWS = 256  # with fewer rows a chunk, adding into the key gradients costs more than recomputing the scores
CPU_BLOCK = 2**21  # scores: 8 MiB in fp32, so that the elementwise passes stay in the last-level cache
DENSE = 2**18  # scores up to which a call costs more than its arithmetic
DENSE_SELF = 2**22  # of self-similarity, where blocks on the diagonal waste half of their scores: 2048 rows
TRIANGULAR_ROWS = 512  # side of a block of a symmetric score matrix: a smaller one wastes less on the diagonal
TRIANGULAR_SIDE = 4096  # of a block on a GPU: an estimate, not yet measured
STREAMING_DIM = 256  # above it the register accumulator starves the tensor cores: an estimate, not yet measured
STREAMING_ROWS = 4096  # below it too few programs to fill a GPU: an estimate, not yet measured
PRODUCT_SHARE = 4  # this part of the limit is for library products, which cannot add to float32 in place
GPU_ONEPASS_ROWS = 1024  # with fewer rows in a chunk library products lose their rate: an estimate, not yet measured
GPU_ONEPASS_DIM = 128  # below it streaming moves fewer bytes: an estimate, not yet measured
# exp of this, over a million columns and rows, and its inverse, stay normal numbers of that many bytes (and bfloat16)
LOGIT_ROOM = {4: 90 * math.log(2), 8: 900 * math.log(2)}
WORKSPACE_ROWS = 4096  # rows of a coefficient block on a GPU: an estimate, not yet measured


@dataclass(frozen=True)
class Plan:
    """How one call is computed.

    name: "forward" (statistics only), "onepass" (loss and gradients in the forward), "dense" (the same for few scores,
        all held at once), or where the backward recomputes the scores, "workspace" (blocks of coefficients and library
        GEMMs), "streaming" (accumulators in registers) or "triangular" (as workspace, with half of a symmetric matrix)
    rows, cols: the block of the N x M plane that is worked on at a time
    limit: bytes that may be allocated beyond inputs, gradients and their accumulators
    flops: of forward and backward, as a multiple of N M D; three bare matmuls are 6
    gradients: whether any input needs one
    bounded: whether exp of every logit is known to fit the accumulator
    """

    name: str
    rows: int
    cols: int
    limit: int
    flops: float
    reason: str
    backend: str = ""
    gradients: bool = True
    bounded: bool = False

    @property
    def one_pass(self) -> bool:
        """Whether the loss and its gradients are made together."""
        return self.name in ("onepass", "dense")

    def __str__(self) -> str:
        return (
            f"{self.name} on the {self.backend} backend, because {self.reason}: {self.flops:g} N M D FLOPs in all, "
            f"blocks of {self.rows} x {self.cols}, at most {self.limit / MIB:.0f} MiB of workspace"
        )


def default_limit(device: str) -> int:
    """Bytes, from the environment if it says so."""
    setting = os.environ.get(LIMIT_VARIABLE)
    if setting is None:
        return DEFAULT_LIMIT.get(device, OTHER_LIMIT)
    if not setting.isdecimal() or int(setting) == 0:
        raise ValueError(f"{LIMIT_VARIABLE} must be a positive number of bytes, got {setting!r}")
    return int(setting)


def choose(
    *,
    backend: str,
    device: str,
    limit: int,
    acc_itemsize: int,
    gradients: bool,
    logit_bound: float,
    **sizes: Any,
) -> Plan:
    """The plan of one call; `sizes` as `_triton` and `_torch` take them.

    n, m, d: rows, columns over all segments, width; itemsize, acc_itemsize: bytes of an input and of a logit
    gradients: whether any input needs one; columns: whether the other direction is asked for too
    self_similar: whether the keys are the queries
    reduced: whether the loss is a weighted sum of row losses known in closed form
    per_row: whether rows have temperatures of their own
    plain: whether there is nothing but normalised queries and keys: no ids, targets (but in self-similarity), negatives
    logit_bound: what no logit exceeds, or inf
    """
    bounded = logit_bound <= LOGIT_ROOM[acc_itemsize]
    plans = _triton if backend == "triton" else _torch
    plan = plans(device=device, limit=limit, acc_itemsize=acc_itemsize, gradients=gradients, bounded=bounded, **sizes)
    return replace(plan, backend=backend, gradients=gradients, bounded=bounded)


def _triton(
    *,
    n: int,
    m: int,
    d: int,
    itemsize: int,
    gradients: bool,
    columns: bool,
    self_similar: bool,
    reduced: bool,
    bounded: bool,
    limit: int,
    **_: Any,
) -> Plan:
    empty = n == 0 or m == 0
    n, m = max(n, 1), max(m, 1)
    room = limit - limit // PRODUCT_SHARE
    cols = min(m, max(room // (itemsize * min(n, WORKSPACE_ROWS)), 1))
    rows = min(n, max(room // (itemsize * cols), 1))
    if not gradients:
        return Plan("forward", rows, cols, limit, 2, "no input needs a gradient")
    chunk = _even(n, room // (itemsize * m + 3 * 4 * -(-m // 64)))  # a row's exponentials, and its states over blocks
    fits = bounded and chunk >= min(n, GPU_ONEPASS_ROWS)
    if self_similar and d > STREAMING_DIM:
        side = min(TRIANGULAR_SIDE, max(math.isqrt(room // itemsize), 1))
        return Plan("triangular", side, side, limit, 5, "half of a symmetric coefficient matrix will do")
    if self_similar:
        return Plan("streaming", rows, cols, limit, 6, "one pass serves both sides of a symmetric score matrix")
    if reduced and not columns and not empty and fits and d >= GPU_ONEPASS_DIM:
        return Plan("onepass", chunk, m, limit, 6, "a chunk of rows sees every column at once, and exp(logit) fits")
    if d <= STREAMING_DIM and min(n, m) >= STREAMING_ROWS:
        return Plan("streaming", rows, cols, limit, 10, f"D <= {STREAMING_DIM} and both sides fill the device")
    return Plan("workspace", rows, cols, limit, 8, f"D > {STREAMING_DIM} or too few rows to fill the device")


def _even(n: int, most: int) -> int:
    """A chunk size of at most `most` rows that splits n rows evenly, in whole tiles of 128 where it holds one."""
    most = most if most < 128 else most // 128 * 128
    if most >= n or most < 1:
        return min(n, most)
    chunk = -(-n // -(-n // most))
    return chunk if chunk < 128 else min(most, -(-chunk // 128) * 128)


def _torch(
    *,
    device: str,
    n: int,
    m: int,
    acc_itemsize: int,
    gradients: bool,
    columns: bool,
    self_similar: bool,
    reduced: bool,
    per_row: bool,
    plain: bool,
    bounded: bool,
    limit: int,
    **_: Any,
) -> Plan:
    few = min(DENSE_SELF if self_similar else DENSE, limit // (2 * acc_itemsize))
    small = device == "cpu" and n > 1 + self_similar and n * m <= few
    if small and reduced and plain and bounded and not per_row:
        flops = (4 if self_similar else 6) if gradients else 2
        return Plan("dense", n, m, limit, flops, "so few scores cost less than the calls that would divide them")
    if self_similar:
        side = min(TRIANGULAR_ROWS, max(math.isqrt(limit // (4 * acc_itemsize)), 1))
        return Plan("triangular", side, side, limit, 4 if gradients else 1, "half of a symmetric score matrix will do")
    empty = n == 0 or m == 0
    n, m = max(n, 1), max(m, 1)
    block = CPU_BLOCK if device == "cpu" else n * m
    chunk = limit // (acc_itemsize * m)  # rows whose scores against every column fit the limit
    if gradients and reduced and not columns and not empty and chunk >= min(n, ONEPASS_ROWS):
        rows = min(n, chunk, ROWS)
        return Plan("onepass", rows, min(m, block // rows), limit, 6, "a chunk of rows sees every column at once")
    # with both directions a block's scores become coefficients in a block of their own, an eighth of the limit
    if gradients and reduced and columns and bounded and not per_row and n <= chunk - chunk // 8 and not empty:
        cols = min(m, max(min(block, limit // (8 * acc_itemsize)) // n, 1))
        return Plan("onepass", n, cols, limit, 6, "all scores fit the limit, so both directions are seen at once")
    rows = min(n, ROWS, max(limit // (4 * acc_itemsize), 1))
    cols = min(m, max(block // rows, 1), max(limit // (4 * acc_itemsize * rows), 1))
    if not gradients:
        return Plan("forward", rows, cols, limit, 2, "no input needs a gradient")
    why = (
        "both directions are asked for"
        if columns
        else "a chunk of rows exceeds the limit"
        if reduced
        else "the upstream gradient comes late"
    )
    return Plan("workspace", rows, cols, limit, 8, why)
