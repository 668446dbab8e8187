"""`torch.compile(fullgraph=True)` records a loss over processes whole, where hosts have nothing to tell each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.processes import in_two_processes
from torch import Tensor

from fused_infonce import Distributed, FusedInfoNCELoss, NTXentLoss, SigLipLoss

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


def compiled(rank: int) -> None:
    torch.manual_seed(rank)
    silent = Distributed(check="none")
    for loss in (
        FusedInfoNCELoss(0.1, distributed=silent, learnable_temperature=True),
        FusedInfoNCELoss(0.1, symmetric=True, distributed=silent),
        NTXentLoss(0.1, distributed=silent),
        SigLipLoss(distributed=silent, learnable_temperature=True, learnable_bias=True, normalize=True),
    ):
        torch._dynamo.reset()
        inputs = [torch.randn(8, 16, requires_grad=True) for _ in range(2)]
        wanted = [*inputs, *loss.parameters()]

        def step(*rows: Tensor, loss: torch.nn.Module = loss) -> Tensor:
            return loss(*rows)

        found = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            value = function(*inputs)
            found.append((value, *torch.autograd.grad(value, wanted)))
        for eager, recorded in zip(*found, strict=True):
            torch.testing.assert_close(recorded, eager, rtol=1e-5, atol=1e-6)


def test_a_loss_over_two_processes_compiles_whole(tmp_path: Path) -> None:
    in_two_processes(compiled, tmp_path)
