"""Simulated ranks: threads of one process that exchange tensors through its memory, to test and to count with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Loopback:
    """W ranks in one process. `run` calls a function once a rank, each in a thread of its own."""

    def __init__(self, world: int, timeout: float = 60.0):
        self.world, self.timeout = world, timeout
        self.ranks = [LoopbackCommunicator(self, rank) for rank in range(world)]
        self._meeting = threading.Barrier(world, timeout=timeout)
        self._slots: list[Any] = [None] * world

    def run(self, work: Callable[[LoopbackCommunicator], T]) -> list[T | BaseException]:
        """Return what `work` returns for every rank, or the error that it raised."""
        found: list[Any] = [None] * self.world

        def one(rank: int) -> None:
            try:
                found[rank] = work(self.ranks[rank])
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * self.timeout)
        if any(thread.is_alive() for thread in threads):
            self._meeting.abort()
            raise TimeoutError(f"a simulated rank of {self.world} did not end within {2 * self.timeout} seconds")
        return found

    def exchange(self, rank: int, value: T) -> list[T]:
        """Return the values of all ranks once every rank has passed its own."""
        self._slots[rank] = value
        self._meeting.wait()
        found = list(self._slots)
        self._meeting.wait()
        return found


class LoopbackCommunicator:
    """A simulated rank. `received` counts the bytes that a real one would have received, by the collective's name."""

    def __init__(self, loopback: Loopback, rank: int):
        self.loopback, self.rank, self.world = loopback, rank, loopback.world
        self.received: dict[str, int] = {}

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        parts = self.loopback.exchange(self.rank, x.detach())
        assert [len(part) for part in parts] == list(counts)
        self._count("all_gather", sum(part.nbytes for i, part in enumerate(parts) if i != self.rank))
        return torch.cat(parts)

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        start = sum(counts[: self.rank])
        own = slice(start, start + counts[self.rank])
        parts = [part[own] for part in self.loopback.exchange(self.rank, x.detach())]
        self._count("reduce_scatter", sum(part.nbytes for i, part in enumerate(parts) if i != self.rank))
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        self.loopback.exchange(self.rank, None)  # until all have read it, nobody may write to what they passed
        return total

    def all_to_all(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        start = sum(counts[: self.rank])
        own = slice(start, start + counts[self.rank])
        parts = [part[own].clone() for part in self.loopback.exchange(self.rank, x.detach())]
        self._count("all_to_all", sum(part.nbytes for i, part in enumerate(parts) if i != self.rank))
        self.loopback.exchange(self.rank, None)
        return torch.stack(parts)

    def all_gather_host(self, message: Tensor) -> Tensor:
        return torch.stack(self.loopback.exchange(self.rank, message))

    def _count(self, name: str, bytes: int) -> None:
        self.received[name] = self.received.get(name, 0) + bytes
