"""Processes over gloo: they find what simulated ranks do, in groups of some of them and in meshes too."""

from __future__ import annotations

import gc
import multiprocessing
import random
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.calls_over_ranks import CASES
from support.processes import in_processes
from support.ranks import Outcome, apart, drawn, far, gathered, joined, outcome, same
from torch.distributed.device_mesh import init_device_mesh

from fused_infonce import ClipLoss, FusedInfoNCELoss, MatryoshkaLoss, MoCoLoss, functional, info_nce
from fused_infonce.distributed import Distributed, communicator
from fused_infonce.temperature import fit

NAMES = ("info_nce symmetric with negatives", "info_nce several targets, all", "siglip_loss weights", "nt_xent",
         "sup_con labels", "multiple_negatives in all directions", "distilled_info_nce symmetric",
         "moco_loss biases")  # fmt: skip
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


def of_processes(
    name: str, seed: int, distributed: Any, group: Any = None, times: int = 1, backend: str = "torch"
) -> None:
    """Fail unless the calls of a group's processes are that of one process on all rows; their rows are uneven."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    draw = random.Random(seed)
    torch.manual_seed(seed)  # all processes draw all rows
    case = CASES[name].with_temperature(draw.choice(("shared", "number")))
    counts = [draw.choice([0, 2, 3, 5]) for _ in range(world - 1)] + [4]
    parts = drawn(case, counts)
    reduction = draw.choice(["mean", "sum"])
    want = outcome(case, joined(case, parts), None, reduction=reduction)
    own = outcome(case, parts[rank], None, reduction=reduction, distributed=distributed, backend=backend)
    found: list[Any] = [None] * world
    dist.all_gather_object(found, tuple(own), group=group)
    factor = 1 if getattr(distributed, "parameter_gradients", "mean") == "sum" else world
    got = gathered(case, [Outcome(*each) for each in found], reduction, factor)
    assert far(got.value, want.value) <= 1e-12, f"{name} {counts}"
    errors = apart(got.gradients, want.gradients)
    assert max(errors.values()) <= 1e-10, f"{name} {counts} {errors}"
    for _ in range(times - 1):
        again = outcome(case, parts[rank], None, reduction=reduction, distributed=distributed, backend=backend)
        assert same(again.value, own.value)
        assert all(same(again.gradients[k], x) for k, x in own.gradients.items()), name


def equal_one(rank: int) -> None:
    for seed, name in enumerate(NAMES):
        of_processes(name, seed, Distributed(parameter_gradients="sum") if seed % 3 == 2 else True)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_processes_equal_one(tmp_path: Path, world: int) -> None:
    in_processes(equal_one, tmp_path, world, strict=True)


def equal_one_in_kernels(rank: int) -> None:
    import support.interpreter  # noqa: F401

    for seed, name in enumerate(("info_nce symmetric with negatives", "siglip_loss weights", "sup_con labels")):
        of_processes(name, seed, True, backend="triton")
    query, key = torch.randn(2, 2, 9, 6, dtype=torch.float64)  # all processes draw all rows
    key += query
    want = fit(query.flatten(0, 1), key.flatten(0, 1), bounds=(0.1, 1.0), symmetric=True)
    got = fit(query[rank], key[rank], bounds=(0.1, 1.0), symmetric=True, backend="triton", distributed=True)
    assert got.converged
    assert abs(got.temperature / want.temperature - 1) <= 1e-9


@pytest.mark.interpreter  # which threads cannot share, so that ranks are processes
def test_kernels_of_processes_equal_one(tmp_path: Path) -> None:
    in_processes(equal_one_in_kernels, tmp_path, 2, strict=True)


def in_groups(rank: int) -> None:
    equal_one(rank)
    of_processes("info_nce symmetric with negatives", 3, True, times=50)
    last = dist.new_group([2, 3])
    if rank in (2, 3):
        for given in (last, Distributed(last), Distributed(last, parameter_gradients="sum")):
            of_processes("clip_loss biases", 1, given, last)
    else:
        for given in (last, Distributed(last)):  # PyTorch gives other processes a number in place of the group
            loss = FusedInfoNCELoss(distributed=given)
            with pytest.raises(ValueError, match="process group that this process is not in"):
                loss(torch.randn(2, 3), torch.randn(2, 3))
    mesh = init_device_mesh("cpu", (4,))
    of_processes("sup_con labels", 1, mesh)
    of_processes("sup_con labels", 2, Distributed(mesh))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    of_processes("clip_loss", 1, square["shard"], square["shard"].get_group())
    with pytest.raises(ValueError, match="a DeviceMesh must have one dimension, got 2"):
        ClipLoss(distributed=square)(torch.randn(2, 3), torch.randn(2, 3), 10.0)


def test_groups_of_some_processes_and_meshes(tmp_path: Path) -> None:
    in_processes(in_groups, tmp_path, 4, strict=True)


def modules(rank: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    for make in (
        lambda given: FusedInfoNCELoss(0.2, symmetric=True, learnable_temperature=True, distributed=given),
        lambda given: MatryoshkaLoss(FusedInfoNCELoss(0.2, learnable_temperature=True, distributed=given), [6, 3]),
    ):
        alone, shared = make(False), make(True)
        whole = [x.flatten(0, 1).requires_grad_() for x in (query, key)]
        own = [x[rank].clone().requires_grad_() for x in (query, key)]
        want, got = alone(*whole), shared(*own)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        want.backward()
        got.backward()
        for x, y in zip(own, whole, strict=True):
            torch.testing.assert_close(x.grad / 2, y.grad[5 * rank : 5 * rank + 5], rtol=1e-10, atol=1e-12)
        for one, other in zip(shared.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)  # the scale is float32

    torch.manual_seed(rank)  # from which a queue of its own would differ
    loss = MoCoLoss(6, queue_size=7, distributed=True)
    for step in range(3):
        count = step + 2 * rank  # uneven, and none at first on one of them
        value = loss(torch.randn(count, 6, requires_grad=True), torch.randn(count, 6))
        found: list[Any] = [None] * 2
        dist.all_gather_object(found, (value.detach(), loss.queue, loss.queue_ptr))
        assert all(map(torch.equal, *found))
    assert loss.queue_ptr.item() == (2 + 4 + 6) % 7


def test_modules_and_a_queue_of_all_processes(tmp_path: Path) -> None:
    in_processes(modules, tmp_path, 2, strict=True)


def beside_a_gpu(rank: int) -> None:
    """As over NCCL, whose group carries nothing of a CPU."""
    dist.get_backend_config = lambda group=None: "cuda:other"
    gather, groups = communicator._gather, []

    def watched(*args: Any, group: Any, **options: Any) -> Any:
        groups.append(group)
        return gather(*args, group=group, **options)

    communicator._gather = watched
    t = torch.tensor([0.5], requires_grad=True)
    loss = functional.info_nce(*torch.randn(2, 4, 8), temperature=t, distributed=Distributed(check="none"))
    groups.clear()
    loss.backward()
    assert t.grad is not None
    assert len(groups) == 1
    assert groups[0] is not dist.group.WORLD


def test_a_temperature_of_the_cpu_travels_between_hosts(tmp_path: Path) -> None:
    in_processes(beside_a_gpu, tmp_path)


def ended(rank: int) -> None:
    query, key = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    value = info_nce(query, key, distributed=True)
    group = weakref.ref(dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    assert group() is None
    with pytest.raises(RuntimeError, match="has been destroyed"):
        value.backward()


def test_a_process_group_that_is_destroyed_ends(tmp_path: Path) -> None:
    """A process that went on with its connections open would be waited for."""
    in_processes(ended, tmp_path, leave=True)


def without_end(rank: int) -> None:
    time.sleep(60 if rank else 0)


def test_processes_that_do_not_end_are_killed(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="without_end: 2 processes did not end within 1 seconds"):
        in_processes(without_end, tmp_path, 2, limit=1)
    assert time.monotonic() - start < 30
    assert not [x for x in multiprocessing.active_children() if x.is_alive()]
