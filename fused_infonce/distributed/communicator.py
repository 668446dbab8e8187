"""The collectives that a loss is made of, over a `torch.distributed` process group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

Pending = Callable[[], Tensor]  # waits for what was begun, and returns it


class Communicator(Protocol):
    """What a loss asks of the other ranks; the counts are the first dimensions of all ranks, in rank order.

    Every rank begins the same collectives in the same order, and may work before it waits for one. What it passes stays
    as it is until then.
    """

    rank: int
    world: int

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Pending:
        """Begin to gather the rows of all ranks, one rank after another."""
        ...

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Pending:
        """Begin to add over the ranks the rows that are this rank's among those of all."""
        ...

    def all_to_all(self, x: Tensor, counts: Sequence[int]) -> Pending:
        """Begin to exchange (W, n, ...), what every rank has for this rank's n rows; x holds those of all ranks."""
        ...

    def all_gather_host(self, message: Tensor) -> Tensor:
        """Return (W, B) of the bytes (B,) that every rank passes, without a device."""
        ...


class GroupCommunicator:
    """The collectives of a process group; what hosts say goes over gloo, whatever the engine of the group is."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = weakref.ref(group)  # communicators are kept by their groups, which would never end
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._host: dist.ProcessGroup | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError("the process group of this loss has been destroyed")
        return group

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Pending:
        most = max(counts)
        found = x.new_empty(self.world * most, *x.shape[1:])
        if not most:
            return lambda: found
        sent = _padded(x, most)
        work = _gather(found, sent, group=self._carrier(x), async_op=True)

        def rows() -> Tensor:
            if min(counts) == most:
                return found
            return torch.cat([part[:count] for part, count in zip(found.split(most), counts, strict=True)])

        return _after(work, rows, sent)

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Pending:
        most, own = max(counts), counts[self.rank]
        if min(counts) < most:
            x = torch.cat([_padded(part, most) for part in x.split(list(counts))])
        found = x.new_empty(most, *x.shape[1:])
        if not most:
            return lambda: found
        sent = x.contiguous()
        work = _reduce_scatter(found, sent, group=self.group, async_op=True)
        return _after(work, lambda: found[:own], sent)

    def all_to_all(self, x: Tensor, counts: Sequence[int]) -> Pending:
        own = counts[self.rank]
        found, sent = x.new_empty(self.world * own, *x.shape[1:]), x.contiguous()
        work = dist.all_to_all_single(found, sent, [own] * self.world, list(counts), group=self.group, async_op=True)
        return _after(work, lambda: found.unflatten(0, (self.world, own)), sent)

    def all_gather_host(self, message: Tensor) -> Tensor:
        found = message.new_empty(self.world * message.shape[0])
        _gather(found, message, group=self.host)
        return found.view(self.world, -1)

    def _carrier(self, x: Tensor) -> dist.ProcessGroup:
        """Return the group that can carry a tensor: a temperature may be on the CPU, beside the rows of a GPU."""
        outside = x.device.type == "cpu" and "cpu:" not in dist.get_backend_config(self.group)
        return self.host if outside else self.group

    @property
    def host(self) -> dist.ProcessGroup:
        """The group itself where it can carry tensors of a CPU, else one over gloo of the same ranks."""
        group = self.group
        if "cpu:gloo" in dist.get_backend_config(group):
            return group
        if self._host is None:
            ranks = dist.get_process_group_ranks(group)
            made = dist.new_group(ranks, backend="gloo", timeout=_timeout(group), use_local_synchronization=True)
            self._host = cast(dist.ProcessGroup, made)  # for this process is one of them
        return self._host


class RecordedCommunicator:
    """The collectives of a process group as `torch.compile` records them, for ranks that have equally many rows."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Pending:
        found = functional.all_gather_tensor(x.contiguous(), 0, self.group)
        return lambda: found.view_as(found)  # a tensor that has been waited for is the one before: see gather._cast

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Pending:
        found = functional.reduce_scatter_tensor(x.contiguous(), "sum", 0, self.group)
        return lambda: found

    def all_to_all(self, x: Tensor, counts: Sequence[int]) -> Pending:
        found = functional.all_to_all_single(x.contiguous(), None, None, self.group)
        return lambda: found.unflatten(0, (self.world, -1))

    def all_gather_host(self, message: Tensor) -> Tensor:
        raise RuntimeError("torch.compile records no messages of hosts: pass Distributed(check='none')")


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """Return how long a group's collectives wait, which a group that is made of its ranks would not know."""
    device = dist.get_backend_config(group).partition(":")[0]
    options = getattr(group._get_backend(torch.device(device)), "options", None)
    return getattr(options, "_timeout", None)


def _after(work: Any, found: Pending, *held: Tensor) -> Pending:
    """Return what waits for a collective, and holds what it sends until then."""

    def wait(held: Sequence[Tensor] = held) -> Tensor:
        work.wait()
        return found()

    return wait


def _padded(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] < rows:
        x = torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])
    return x.contiguous()


# PyTorch 2.13 renamed both, and warns of the names before.
_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
