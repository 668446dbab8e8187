"""What is timed, each as a function of fresh inputs. Add a peer here, and every benchmark has it.

A loss takes (query, key) and returns a scalar at temperature `TEMPERATURE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_infonce import info_nce

TEMPERATURE = 0.05
FLOOR_ROWS = 1024

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One line of a benchmark: N queries against M keys of width D."""

    direction: str  # "one" or "symmetric"
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


def dense(query: Tensor, key: Tensor) -> Tensor:
    """As people write it: normalise, one matmul, cross-entropy on the logits."""
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def dense_symmetric(query: Tensor, key: Tensor) -> Tensor:
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / TEMPERATURE
    labels = torch.arange(len(query), device=query.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def losses(case: Case) -> dict[str, Loss]:
    """The contestants of a case; every one computes the same loss."""
    if case.direction == "symmetric":
        return {
            "fused_infonce": lambda q, k: info_nce(q, k, temperature=TEMPERATURE, symmetric=True),
            "dense": dense_symmetric,
        }
    contestants: dict[str, Loss] = {
        "fused_infonce": lambda q, k: info_nce(q, k, temperature=TEMPERATURE),
        "dense": dense,
    }
    try:
        import info_nce as info_nce_pytorch
    except ImportError:
        return contestants
    contestants["info-nce-pytorch"] = lambda q, k: info_nce_pytorch.info_nce(q, k, temperature=TEMPERATURE)
    return contestants


def floor(case: Case) -> Callable[[Tensor, Tensor], None]:
    """The matmuls that no algorithm can do without, bare: scores, and with a backward the two gradients."""

    def run(query: Tensor, key: Tensor) -> None:
        query, key = query.detach(), key.detach()
        rows = FLOOR_ROWS if query.device.type == "cpu" else max(FLOOR_ROWS, 2**28 // (2 * len(key)))
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        for start in range(0, len(query), rows):
            chunk = query[start : start + rows]
            scores = chunk @ key.T
            if case.mode == "fwd_bwd":
                torch.mm(scores, key, out=grad_query[start : start + rows])
                grad_key.addmm_(scores.T, chunk)

    return run
