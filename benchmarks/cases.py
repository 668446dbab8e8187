"""Cases of the benchmarks: sizes, dtype, direction and pass of one comparison, and the fresh inputs of a round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OURS = "fused_infonce"
DENSE = "dense"
COMPILED = "dense compiled"  # which takes longer to compile than to measure: for two cases of suites/gpu.py
FLOOR = "floor"  # bare matmuls
UNBIASED = "without a bias"
AGAIN = f"{FLOOR}, at the end"  # of a case: its ratio to the floor is the drift of the machine
REPLAYED = ", replayed"  # after a contestant's name: its pass, captured as a graph
TEMPERATURE = 0.05
SCALE, BIAS = 10.0, -10.0  # of SigLIP's loss, which starts there


@dataclass(frozen=True)
class Case:
    """A comparison: N queries against M keys of width D; "self" has N rows in each of two views."""

    # "one", "symmetric", "self", "rows" (one, whose rows are reduced by the caller), "biased" and "biased symmetric"
    # (with a bias a key), or "sigmoid" (pairs by themselves)
    direction: str
    n: int
    m: int
    d: int
    dtype: str
    mode: str  # "fwd" or "fwd_bwd"

    @property
    def loss(self) -> str:
        """The name of the loss in the records."""
        return {"self": "nt_xent", "sigmoid": "siglip"}.get(self.direction, "info_nce")

    @property
    def rows(self) -> int:
        """The number of rows of the score matrix."""
        return 2 * self.n if self.direction == "self" else self.n

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """Fresh queries and keys, which require gradients where there is a backward."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)
        query, key = (torch.randn(rows, self.d, device=device, generator=generator) for rows in (self.n, self.m))
        grad = self.mode == "fwd_bwd"
        return query.to(dtype).requires_grad_(grad), key.to(dtype).requires_grad_(grad)

    def __str__(self) -> str:
        return f"{self.direction}-{self.n}x{self.m}x{self.d}-{self.dtype}-{self.mode}"


def square(rows: int, d: int, dtype: str = "bfloat16", direction: str = "one", mode: str = "fwd_bwd") -> Case:
    """The case of `rows` rows in all, as many on either side."""
    n = rows // 2 if direction == "self" else rows
    return Case(direction, n, n, d, dtype, mode)
