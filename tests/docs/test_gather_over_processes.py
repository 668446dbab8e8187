"""The README's `gather`: two processes have the loss of the whole batch, and DDP's gradients are its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from support.documentation import blocks
from support.processes import WORLD, in_two_processes

from fused_infonce import FusedInfoNCELoss

N, D, WIDTH = 6, 5, 4


def parts() -> tuple[torch.nn.Module, FusedInfoNCELoss, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    encoder = torch.nn.Linear(WIDTH, D, dtype=torch.float64)
    loss = FusedInfoNCELoss(temperature=0.2, symmetric=True, learnable_temperature=True)
    query, key = torch.randn(2, WORLD * N, WIDTH, dtype=torch.float64)
    return encoder, loss, query, key


def gather_of_two_processes(rank: int) -> None:
    (code,) = (block for block in blocks("README.md") if "def gather" in block)
    names: dict[str, Any] = {"torch": torch}
    exec(code, names)
    gather = names["gather"]

    encoder, loss, query, key = parts()
    whole = loss(encoder(query), encoder(key))
    wanted = torch.autograd.grad(whole, [*encoder.parameters(), *loss.parameters()])

    parallel = torch.nn.parallel.DistributedDataParallel(encoder)
    own = slice(rank * N, (rank + 1) * N)
    features = parallel(torch.cat([query[own], key[own]]))
    value = loss(gather(features[:N]), gather(features[N:]))
    value.backward()
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    for parameter, gradient in zip([*encoder.parameters(), *loss.parameters()], wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)  # the scale is float32


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_the_gathered_loss_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    in_two_processes(gather_of_two_processes, tmp_path)
