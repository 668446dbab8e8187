"""`cached` in two processes: one reduction a step, whatever the numbers of chunks, and no rank left waiting."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.encoders import WIDTH, D, Encoder, assert_gradients, by_hand, gradients, softmax_loss
from support.processes import WORLD, in_two_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_infonce import Distributed, FusedInfoNCELoss, cached
from fused_infonce.compat.grad_cache import GradCache
from fused_infonce.wrappers import processes

ROWS = (40, 72)  # 3 and 5 chunks of 16
CHUNK = 16

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


class Model(Encoder):
    """An encoder with a scale, a buffer, and a layer that only some ranks use."""

    def __init__(self, extra=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.extra = nn.Linear(WIDTH, D, dtype=torch.float64) if extra else None
        self.uses_extra = extra
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, rows):
        embedding = super().forward(rows)
        return embedding + self.extra(rows) if self.uses_extra else embedding


class Whole(nn.Module):
    """A model whose forward returns the loss, as a LightningModule does under DDP."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, query, key):
        return step(self.tower, query, key, scale=self.tower.scale.exp())


def data(rank, seed=0):
    generator = torch.Generator().manual_seed(10 * seed + rank)
    return torch.randn(2, ROWS[rank], WIDTH, dtype=torch.float64, generator=generator)


def same(make, *args, **options):
    """A model with the same parameters on every rank, which have drawn other numbers before."""
    torch.manual_seed(0)
    return make(*args, **options)


def step(model, query, key, **options):
    torch.manual_seed(1)
    return cached(softmax_loss, (model, query), (model, key), chunk_size=CHUNK, **options)


def own_gradients(model, query, key, **arguments):
    """The gradients of this rank without caching."""
    value = by_hand(softmax_loss, (model, query), (model, key), chunk_size=CHUNK, **arguments)
    return gradients(value, list(model.parameters()))


def mean(tensors):
    """The mean of tensors over the ranks."""
    for x in tensors:
        dist.all_reduce(x)
    return [x / WORLD for x in tensors]


def collectives(function):
    """How often each collective of gloo ran, those of DistributedDataParallel's own reducer included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    return result, Counter(x.name.removeprefix("c10d::") for x in profile.events() if x.name.startswith("c10d::"))


REDUCED_ONCE = {"allreduce_": 2}  # which parameters have gradients on any rank, and the gradients


def replicated(rank):
    for find in (False, True):
        model = same(Model, extra=True)
        model.uses_extra = rank == 1
        plain, parallel = copy.deepcopy(model), DistributedDataParallel(model, find_unused_parameters=find)
        query, key = data(rank)
        wanted = mean(own_gradients(plain, query, key, scale=plain.scale.exp()))
        # The scale's gradient comes after the towers', which its exponential before them makes sure of.
        value, during = collectives(lambda: step(parallel, query, key, scale=model.scale.exp()))  # noqa: B023
        assert not during
        _, during = collectives(value.backward)
        assert during == REDUCED_ONCE
        assert_gradients(list(model.parameters()), wanted)

    # another tower that is frozen, and one parameter that nobody uses
    model.zero_grad()
    model.uses_extra = plain.uses_extra = False
    frozen = same(Encoder).requires_grad_(False)
    torch.manual_seed(1)
    cached(softmax_loss, (partial(parallel), query), (frozen, key), chunk_size=CHUNK).backward()
    wanted = by_hand(softmax_loss, (plain, query), (frozen, key), chunk_size=CHUNK)
    assert_gradients(list(model.parameters()), mean(gradients(wanted, list(plain.parameters()))))
    assert model.extra.weight.grad is None
    assert model.scale.grad is None

    # local gradients when asked for
    model.zero_grad()
    step(parallel, query, key, sync="none").backward()
    assert_gradients(list(model.parameters()), own_gradients(plain, query, key))

    # the drop-in for GradCache, whose own way is one reduction too
    model.zero_grad()
    torch.manual_seed(1)
    cache = GradCache([parallel] * 2, CHUNK, softmax_loss)
    _, during = collectives(lambda: cache(query, key, no_sync_except_last=True))
    assert during == REDUCED_ONCE
    assert_gradients(list(model.parameters()), mean(own_gradients(plain, query, key)))

    # two calls before one backward
    model.zero_grad()
    value = step(parallel, query, key) + step(parallel, query, key)
    _, during = collectives(value.backward)
    assert during == REDUCED_ONCE
    assert_gradients(list(model.parameters()), [2 * x for x in mean(own_gradients(plain, query, key))])


def accumulated(rank):
    """Gradients after each of three steps, the first of them in no_sync(), are those that DDP has by itself."""
    models = [same(Encoder, dropout=0.0) for _ in range(2)]
    ours, theirs = (DistributedDataParallel(x) for x in models)
    for turn in range(3):
        query, key = data(rank, turn)
        with ours.no_sync() if turn == 0 else torch.enable_grad():
            value = step(ours, query, key)
        value.backward()  # outside: what counts is where the forward was, as in DDP
        with theirs.no_sync() if turn == 0 else torch.enable_grad():
            softmax_loss(*theirs(torch.cat([query, key])).split(len(query))).backward()
        assert_gradients(list(models[0].parameters()), [x.grad for x in models[1].parameters()])
    assert ours.require_backward_grad_sync


def inside_a_forward(rank):
    for find in (False, True):
        tower = same(Model)
        plain, parallel = copy.deepcopy(tower), DistributedDataParallel(Whole(tower), find_unused_parameters=find)
        query, key = data(rank)
        own = own_gradients(plain, query, key, scale=plain.scale.exp())
        wanted = mean([x.clone() for x in own])
        for _ in range(2):
            tower.zero_grad()
            _, during = collectives(lambda: parallel(query, key).backward())  # noqa: B023
            assert during == {**REDUCED_ONCE, "broadcast_": 1}  # of the buffer, as ever
            assert_gradients(list(tower.parameters()), wanted)
            assert parallel.require_backward_grad_sync
        tower.zero_grad()
        with parallel.no_sync():
            parallel(query, key).backward()
        assert_gradients(list(tower.parameters()), own)
        assert "_post_forward" not in vars(parallel)


class Logged(Whole):
    """A model that returns a loss of its own beside a cached one that it shows."""

    def forward(self, query, key):
        value = super().forward(query, key)
        return {"loss": self.tower(query).square().mean(), "shown": value.detach()}


class Sometimes(Whole):
    """A model that breaks after a cached loss, or that has none."""

    def forward(self, query, key):
        if key is not None:
            super().forward(query, key)
            raise ValueError("broken")
        return self.tower(query).square().mean()


def beside_another_loss(rank):
    """DistributedDataParallel's gradients are averaged too where a forward does not return the cached loss."""
    query, key = data(rank)
    for make in (Logged, Sometimes):
        tower = same(Model)
        tower.dropout = 0.0
        plain, parallel = copy.deepcopy(tower), DistributedDataParallel(make(tower), find_unused_parameters=True)
        wanted = mean(gradients(plain(query).square().mean(), list(plain.parameters())))
        if make is Logged:
            parallel(query, key)["loss"].backward()
        else:
            with pytest.raises(ValueError, match="broken"):
                parallel(query, key)
            parallel(query, None).backward()
        assert_gradients(list(tower.parameters()), wanted)
        assert not {"_pre_forward", "_post_forward"} & set(vars(parallel))


def of_all_rows(rank):
    """A loss of the rows of all ranks gives the gradients, its temperature's too, of one process with all of them."""
    model = same(Encoder, dropout=0.0)
    plain, parallel = copy.deepcopy(model), DistributedDataParallel(model)
    for exchange in ("gather", "stream"):
        loss, alone = (FusedInfoNCELoss(0.2, symmetric=True, learnable_temperature=True) for _ in range(2))
        loss.distributed = Distributed(exchange=exchange)
        query, key = data(rank)
        model.zero_grad()
        value = cached(loss, (parallel, query), (parallel, key), chunk_size=CHUNK)
        value.backward()
        rows = torch.cat([data(0), data(1)], 1)
        wanted = alone(*(plain(x) for x in rows))
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=0)  # the temperature is float32
        parameters = [*plain.parameters(), *alone.parameters()]
        assert_gradients([*model.parameters(), *loss.parameters()], gradients(wanted, parameters), 1e-6)


def scaled(rank):
    """An overflow on one rank is one on all, so that all skip the step."""
    model = same(Encoder, torch.float32)
    parallel, before = DistributedDataParallel(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    query, key = data(rank).float()
    for factor in (float("inf") if rank == 0 else 1.0, 1.0):
        now = copy.deepcopy(model.state_dict())
        assert all(torch.equal(x, before[name]) for name, x in now.items())  # the first step is skipped
        optimizer.zero_grad()
        scaler.scale(factor * step(parallel, query, key)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    assert not torch.equal(model.up.weight, before["up.weight"])
    for x, wanted in zip(model.parameters(), mean([x.detach().clone() for x in model.parameters()]), strict=True):
        assert torch.equal(x, wanted)


def in_16_bits(rank):
    """Sums are made in float32, where those of float16 do not overflow."""
    model = same(Encoder, torch.float16)
    parallel = DistributedDataParallel(model)
    for x in model.parameters():
        x.grad = torch.full_like(x, 40000.0 + 2048.0 * rank)
    processes.average(parallel)
    assert all((x.grad == 41024.0).all() for x in model.parameters())


def one_rank_differs(rank):
    """All ranks raise, so that none waits for the other."""
    model = same(Encoder)
    parallel = DistributedDataParallel(model)
    query, key = data(rank)
    value = step(parallel, query, key)
    if rank == 1:
        key[20] += 1
    said = r"tower 2, chunk 2 \(rows 16 to 31\)" if rank == 1 else "on another rank a replay failed"
    with pytest.raises(RuntimeError, match=said):
        value.backward()
    value = step(parallel, query, key)
    broken = model.register_forward_pre_hook(lambda *_: 1 // (1 - rank) and None)
    error = ZeroDivisionError if rank == 1 else RuntimeError
    with pytest.raises(error, match="by zero" if rank == 1 else said):
        value.backward()
    broken.remove()
    model.zero_grad()
    step(parallel, query, key).backward()  # and training could go on
    assert model.up.weight.grad.any()


def sharded(rank):
    from torch.distributed.fsdp import fully_shard

    model = same(Encoder)
    plain = copy.deepcopy(model)
    fully_shard(model.up)
    fully_shard(model)
    parameters = list(model.parameters())

    def assert_mean(wanted):
        whole = [torch.zeros_like(x.full_tensor()) for x in parameters]
        for x, y in zip(whole, parameters, strict=True):
            x.grad = y.grad.full_tensor()
        assert_gradients(whole, wanted)

    owned = []
    for turn in range(2):
        query, key = data(rank, turn)
        owned.append(own_gradients(plain, query, key))
        model.zero_grad()
        value, during = collectives(lambda: step(model, query, key))  # noqa: B023
        assert during["allreduce_"] == 2  # the number of chunks of either tower
        assert not during["_reduce_scatter_base_"]
        _, during = collectives(value.backward)
        assert during["_reduce_scatter_base_"] == 2  # one for each group of parameters
        assert not during["allreduce_"]
        assert_mean(mean([x.clone() for x in owned[turn]]))

    # accumulation without communication, as FSDP2 has it, and by `sync`
    wanted = mean([x + y for x, y in zip(*owned, strict=True)])
    for option in ("none", "mean"):
        model.zero_grad()
        model.set_requires_gradient_sync(option == "none")
        _, during = collectives(lambda: step(model, *data(rank, 0), sync=option).backward())  # noqa: B023
        assert not during["_reduce_scatter_base_"]
        assert all(x.grad is None for x in parameters)
        model.set_requires_gradient_sync(True)
        step(model, *data(rank, 1)).backward()
        assert_mean(wanted)

    # a frozen sharded tower, and a rank without rows
    frozen = same(Encoder).requires_grad_(False)
    still = copy.deepcopy(frozen)
    fully_shard(frozen)
    model.zero_grad()
    torch.manual_seed(1)
    value = cached(softmax_loss, (model, query), (frozen, key), chunk_size=CHUNK)
    value.backward()
    by = by_hand(softmax_loss, (plain, query), (still, key), chunk_size=CHUNK)
    assert_mean(mean(gradients(by, list(plain.parameters()))))
    model.zero_grad()
    torch.manual_seed(1)
    rows = query[: 40 * rank]
    cached(lambda x: x.square().sum(), (model, rows), chunk_size=CHUNK).backward()
    by = by_hand(lambda x: x.square().sum(), (plain, rows), chunk_size=CHUNK)
    assert_mean(mean(gradients(by, list(plain.parameters()))))


def worker(rank):
    for check in (
        replicated,
        accumulated,
        inside_a_forward,
        beside_another_loss,
        of_all_rows,
        scaled,
        in_16_bits,
        one_rank_differs,
        sharded,
    ):
        print(rank, check.__name__, flush=True)
        check(rank)


def test_in_two_processes(tmp_path: Path) -> None:
    in_two_processes(worker, tmp_path)
