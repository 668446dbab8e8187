"""Trainings of several processes end where that of one does, and those of other libraries' forms do not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.processes import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_infonce import FusedInfoNCELoss

STEPS, WIDTH, D, RATE, CLIPPED = 20, 6, 4, 0.05, 3.0
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


def parts() -> tuple[nn.Module, FusedInfoNCELoss]:
    """Return an encoder and a loss with a learnable scale, the same in all processes."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, D))
    return encoder, FusedInfoNCELoss(0.2, symmetric=True, learnable_temperature=True)


def batch(step: int, counts: list[int], rank: int | None) -> tuple[Tensor, Tensor]:
    """Return a step's pairs: those of one rank, which has counts[rank] of them, or all."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randn(sum(counts), WIDTH, generator=generator)
    second = first + 0.5 * torch.randn(first.shape, generator=generator)
    if rank is None:
        return first, second
    return first.split(counts)[rank], second.split(counts)[rank]


def pairs(encoder: nn.Module, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the embeddings of pairs, of one call of the encoder as DDP needs it."""
    first, second = encoder(torch.cat(rows)).chunk(2)
    return first, second


def trained(
    encoder: nn.Module, loss: Callable[..., Tensor], learned: list[nn.Parameter], counts: list[int], rank: int | None,
    steps: int = STEPS,
) -> list[float]:  # fmt: skip
    """Train, with gradients of the encoder and of `learned` clipped; return the encoder's norms before clipping."""
    optimizer = torch.optim.SGD([*encoder.parameters(), *learned], lr=RATE)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(*pairs(encoder, batch(step, counts, rank))).backward()
        norm: Any = nn.utils.clip_grad_norm_(encoder.parameters(), CLIPPED)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        nn.utils.clip_grad_norm_(learned, CLIPPED)
        optimizer.step()
    return norms


def state(encoder: nn.Module, learned: list[nn.Parameter]) -> list[Tensor]:
    """Return the parameters as one process holds them."""
    found: list[Any] = [*encoder.parameters(), *learned]
    return [(x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone() for x in found]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(one, other, strict=True))


def of_one_process(counts: list[int]) -> tuple[list[Tensor], list[float]]:
    encoder, loss = parts()
    norms = trained(encoder, loss, list(loss.parameters()), counts, None)
    return state(encoder, list(loss.parameters())), norms


def ours(rank: int) -> None:
    world = dist.get_world_size()
    counts = [3, 5, 4, 6][:world]
    want, norms = of_one_process(counts)
    assert min(norms) < CLIPPED < max(norms)  # some gradients are clipped, and some are not
    start = state(*parts_and_scale())
    assert distance(start, want) > 0.1

    encoder, loss = parts()
    loss.distributed = True
    trained(DistributedDataParallel(encoder), loss, list(loss.parameters()), counts, rank)
    assert distance(state(encoder, list(loss.parameters())), want) <= 1e-5

    encoder, loss = parts()  # the scale is averaged by DDP as well
    loss.distributed = True
    trained(DistributedDataParallel(encoder), DistributedDataParallel(loss), list(loss.parameters()), counts, rank)
    assert distance(state(encoder, list(loss.parameters())), want) <= 1e-5

    from torch.distributed.fsdp import fully_shard

    encoder, loss = parts()
    loss.distributed = True
    for layer in (encoder[0], encoder[2], encoder):
        fully_shard(layer)
    trained(encoder, loss, list(loss.parameters()), counts, rank)
    assert distance(state(encoder, list(loss.parameters())), want) <= 1e-5


def parts_and_scale() -> tuple[nn.Module, list[nn.Parameter]]:
    encoder, loss = parts()
    return encoder, list(loss.parameters())


class WithGradient(torch.autograd.Function):
    """All ranks' rows, whose gradients are added over the ranks: `torch.distributed.nn.functional.all_gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.cat(without_gradient(x))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        upstream = upstream.clone()
        dist.all_reduce(upstream)
        return upstream.chunk(dist.get_world_size())[dist.get_rank()]


def without_gradient(x: Tensor) -> list[Tensor]:
    found = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.detach())
    return found


def own_put_back(x: Tensor) -> Tensor:
    found = without_gradient(x)
    found[dist.get_rank()] = x
    return torch.cat(found)


def dense(first: Tensor, second: Tensor, scale: Tensor, start: int = 0) -> Tensor:
    """Return the cross-entropy of rows against all others', of which row i's own is `start + i`."""
    return F.cross_entropy(scale * first @ second.T, torch.arange(start, start + len(first)))


# Each returns a rank's loss from its unit rows and the scale, as the library has it.
def open_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Everyone's rows without their gradient but for one's own, and the loss of all rows."""
    a, b = own_put_back(a), own_put_back(b)
    return (dense(a, b, scale) + dense(b, a, scale)) / 2


def open_clip_local(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """`local_loss` without `gather_with_grad`: one's own rows against everyone's, which have no gradient."""
    start = len(a) * dist.get_rank()
    every_a, every_b = torch.cat(without_gradient(a)), torch.cat(without_gradient(b))
    return (dense(a, every_b, scale, start) + dense(b, every_a, scale, start)) / 2


def tevatron(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The loss of all rows, of which one's own have a gradient, times the number of ranks."""
    return open_clip(a, b, scale) * dist.get_world_size()


def pylate(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """One's own rows against everyone's with their gradients, times the number of ranks."""
    start = len(a) * dist.get_rank()
    every_a, every_b = WithGradient.apply(a), WithGradient.apply(b)
    local = (dense(a, every_b, scale, start) + dense(b, every_a, scale, start)) / 2
    return local * dist.get_world_size()


# The factors of the gradients of the encoder and of the scale, in W; None: they are no multiple of the true ones.
PEERS: dict[Callable[..., Tensor], tuple[int | None, int]] = {
    open_clip: (-1, 0), open_clip_local: (None, 0), tevatron: (0, 1), pylate: (1, 1)
}  # fmt: skip


def theirs(rank: int) -> None:
    world, counts = dist.get_world_size(), [4] * dist.get_world_size()
    want, _ = of_one_process(counts)
    encoder, loss = parts()
    loss(*pairs(encoder, batch(0, counts, None))).backward()
    true, true_scale = (torch.cat([p.grad.flatten() for p in x.parameters()]) for x in (encoder, loss))
    for peer, (of_encoder, of_scale) in PEERS.items():
        encoder, loss = parts()
        (scale,) = loss.parameters()  # a logarithm

        def of_peer(a: Tensor, b: Tensor, peer: Any = peer, scale: Tensor = scale) -> Tensor:
            return peer(F.normalize(a), F.normalize(b), scale.exp())

        both = nn.ModuleList([DistributedDataParallel(encoder), DistributedDataParallel(Called(of_peer, loss))])
        both[1](*pairs(both[0], batch(0, counts, rank))).backward()
        got, got_scale = (torch.cat([p.grad.flatten() for p in x.parameters()]) for x in (encoder, loss))
        torch.testing.assert_close(got_scale, true_scale * world**of_scale, rtol=1e-4, atol=1e-6, msg=peer.__name__)
        if of_encoder is None:
            assert F.cosine_similarity(got, true, dim=0) < 0.99
        else:
            torch.testing.assert_close(got, true * world**of_encoder, rtol=1e-4, atol=1e-6, msg=peer.__name__)
        encoder.zero_grad()
        loss.zero_grad()
        trained(both[0], both[1], [scale], counts, rank)
        assert distance(state(encoder, [scale]), want) > 1e-3, peer.__name__


class Called(nn.Module):
    """A function with the parameters of a module, for DDP to average."""

    def __init__(self, function: Callable[..., Tensor], of: nn.Module):
        super().__init__()
        self.function, self.of = function, of

    def forward(self, *rows: Tensor) -> Tensor:
        return self.function(*rows)


def test_a_training_of_processes_is_that_of_one_and_no_other_librarys_is(tmp_path: Path) -> None:
    in_processes(ours, tmp_path, 4, strict=True)
    in_processes(theirs, tmp_path, 4, strict=True)


def ways(rank: int) -> None:
    world = dist.get_world_size()
    counts = [3, 5]
    encoder, loss = parts()
    for step in range(3):
        loss(*pairs(encoder, batch(step, counts, None))).backward()
    want = [p.grad for p in (*encoder.parameters(), *loss.parameters())]

    encoder, loss = parts()  # three batches accumulated, of which the last is averaged
    loss.distributed = True
    parallel = DistributedDataParallel(encoder)
    for step in range(3):
        with nullcontext() if step == 2 else parallel.no_sync():
            loss(*pairs(parallel, batch(step, counts, rank))).backward()
    for p, gradient in zip((*encoder.parameters(), *loss.parameters()), want, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6)

    encoder, loss = parts()  # a scaled loss, whose gradients are unscaled before they are clipped
    loss.distributed = True
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    parallel = DistributedDataParallel(encoder)
    optimizer = torch.optim.SGD([*encoder.parameters(), *loss.parameters()], lr=RATE)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss(*pairs(parallel, batch(step, counts, rank)))).backward()
        scaler.unscale_(optimizer)
        for module in (encoder, loss):
            nn.utils.clip_grad_norm_(module.parameters(), CLIPPED)
        scaler.step(optimizer)
        scaler.update()
    alone, of_alone = parts()
    trained(alone, of_alone, list(of_alone.parameters()), counts, None, steps=3)
    assert distance(state(encoder, list(loss.parameters())), state(alone, list(of_alone.parameters()))) <= 1e-5

    (encoder, loss), (alone, of_alone) = parts(), parts()
    loss.distributed = True
    parallel = DistributedDataParallel(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*pairs(parallel, batch(0, counts, rank)))
        true = of_alone(*pairs(alone, batch(0, counts, None)))
    value.backward()
    true.backward()
    found = [torch.zeros_like(value) for _ in range(world)]
    dist.all_gather(found, value.detach())
    assert all(torch.equal(x, found[0]) for x in found)
    torch.testing.assert_close(value, true, rtol=1e-5, atol=0)
    for p, q in zip(
        (*encoder.parameters(), *loss.parameters()), (*alone.parameters(), *of_alone.parameters()), strict=True
    ):
        error = (p.grad - q.grad).norm() / q.grad.norm()
        # the loss gives the scale its gradient in float32; the encoder's products round those of each rank to bfloat16
        assert error <= (1e-5 if p.numel() == 1 else 5e-3)


def test_accumulation_a_scaled_loss_and_autocast(tmp_path: Path) -> None:
    in_processes(ways, tmp_path, 2, strict=True)
