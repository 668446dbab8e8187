"""What is timed, each as a function of fresh inputs: ours, the peers and the floor of bare matmuls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peers
import torch
from peers import TEMPERATURE, Loss
from torch import Tensor

from fused_infonce import info_nce, nt_xent

FLOOR_ROWS = 1024
OURS = "fused_infonce"
COMPILED = "dense compiled"  # which takes longer to compile than to measure: for two cases of gpu_bench.py


@dataclass(frozen=True)
class Case:
    """One line of a benchmark: N queries against M keys of width D; "self" has N rows in each of two views."""

    direction: str  # "one", "symmetric", "self", or "rows": one, whose rows are reduced by the caller
    n: int
    m: int
    d: int
    dtype: str
    mode: str  # "fwd" or "fwd_bwd"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)
        query, key = (torch.randn(rows, self.d, device=device, generator=generator) for rows in (self.n, self.m))
        grad = self.mode == "fwd_bwd"
        return query.to(dtype).requires_grad_(grad), key.to(dtype).requires_grad_(grad)

    def __str__(self) -> str:
        return f"{self.direction}-{self.n}x{self.m}x{self.d}-{self.dtype}-{self.mode}"


def losses(case: Case, device: torch.device) -> dict[str, Loss]:
    """The contestants of a case, ours first; every one computes the same loss."""
    ours: dict[str, Loss] = {
        "one": lambda q, k: info_nce(q, k, temperature=TEMPERATURE),
        "symmetric": lambda q, k: info_nce(q, k, temperature=TEMPERATURE, symmetric=True),
        "self": lambda a, b: nt_xent(a, b, TEMPERATURE),
        "rows": lambda q, k: info_nce(q, k, temperature=TEMPERATURE, reduction="none").mean(),
    }
    return {OURS: ours[case.direction], **peers.available(case.direction, device.type)}


def floor(case: Case) -> Callable[[Tensor, Tensor], None]:
    """The matmuls that no algorithm can do without, bare: scores, and with a backward the two gradients."""

    def run(query: Tensor, key: Tensor) -> None:
        query, key = query.detach(), key.detach()
        if case.direction == "self":
            query = key = torch.cat([query, key])
        rows = FLOOR_ROWS if query.device.type == "cpu" else max(FLOOR_ROWS, 2**28 // (2 * len(key)))
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        for start in range(0, len(query), rows):
            chunk = query[start : start + rows]
            scores = chunk @ key.T
            if case.mode == "fwd_bwd":
                torch.mm(scores, key, out=grad_query[start : start + rows])
                grad_key.addmm_(scores.T, chunk)

    return run
