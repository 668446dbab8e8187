"""Simulated ranks: threads of one process that exchange tensors through its memory, to test and to count with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .communicator import Pending

T = TypeVar("T")


class Loopback:
    """W ranks in one process. `run` calls a function once a rank, each in a thread of its own.

    Args:
        world: W.
        timeout: the seconds that a rank waits for the others before it raises a TimeoutError.
        delay: the seconds that a collective of tensors takes after the last rank has begun it, on the ranks' clocks.
            A rank's `clock` is simulated: it stands still but for what a rank waits, and what its work adds to it.
    """

    def __init__(self, world: int, timeout: float = 60.0, delay: float = 0.0):
        self.world, self.timeout, self.delay = world, timeout, delay
        self.ranks = [LoopbackCommunicator(self, rank) for rank in range(world)]
        self._posted: dict[int, dict[int, tuple[Any, float]]] = {}  # by the collective's number, then by rank
        self._taken: dict[int, int] = {}  # by how many ranks
        self._changed = threading.Condition()

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
            raise TimeoutError(f"a simulated rank of {self.world} did not end within {2 * self.timeout} seconds")
        return found

    def post(self, rank: int, number: int, value: Any) -> None:
        """Pass a rank's part of its collective of this number."""
        with self._changed:
            self._posted.setdefault(number, {})[rank] = value, self.ranks[rank].clock
            self._changed.notify_all()

    def take(self, rank: int, number: int, delay: float) -> list[Any]:
        """Return the parts of all ranks once every rank has passed its own, with the rank's clock after the delay."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._posted[number]) == self.world, self.timeout):
                missing = [rank for rank in range(self.world) if rank not in self._posted[number]]
                raise TimeoutError(f"simulated ranks {missing} did not come within {self.timeout} seconds")
            parts = self._posted[number]
            self._taken[number] = self._taken.get(number, 0) + 1
            if self._taken[number] == self.world:
                del self._posted[number], self._taken[number]
        begun = max(when for _, when in parts.values())
        self.ranks[rank].clock = max(self.ranks[rank].clock, begun + delay)
        return [parts[other][0] for other in range(self.world)]


class LoopbackCommunicator:
    """A simulated rank. `received` counts the bytes that a real one would have received, by the collective's name,
    `begun` the collectives of tensors, and `clock` simulated seconds."""

    def __init__(self, loopback: Loopback, rank: int):
        self.loopback, self.rank, self.world = loopback, rank, loopback.world
        self.received: dict[str, int] = {}
        self.begun = 0
        self.clock = 0.0
        self._number = 0

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Pending:
        taken = self._begin(x.clone())

        def rows() -> Tensor:
            parts = taken()
            self._count("all_gather", parts)
            return torch.cat(parts)

        return rows

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Pending:
        taken, own = self._begin(x.clone()), self._own(counts)

        def total() -> Tensor:
            parts = [part[own] for part in taken()]
            self._count("reduce_scatter", parts)
            found = parts[0].clone()
            for part in parts[1:]:
                found += part
            return found

        return total

    def all_to_all(self, x: Tensor, counts: Sequence[int]) -> Pending:
        taken, own = self._begin(x.clone()), self._own(counts)

        def every() -> Tensor:
            parts = [part[own] for part in taken()]
            self._count("all_to_all", parts)
            return torch.stack(parts)

        return every

    def all_gather_host(self, message: Tensor) -> Tensor:
        return torch.stack(self._begin(message, host=True)())

    def _begin(self, value: Any, host: bool = False) -> Callable[[], list[Any]]:
        number, self._number = self._number, self._number + 1
        self.begun += not host
        self.loopback.post(self.rank, number, value)
        return lambda: self.loopback.take(self.rank, number, 0.0 if host else self.loopback.delay)

    def _own(self, counts: Sequence[int]) -> slice:
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def _count(self, name: str, parts: Sequence[Tensor]) -> None:
        """Count what came from the other ranks."""
        bytes = sum(part.nbytes for rank, part in enumerate(parts) if rank != self.rank)
        self.received[name] = self.received.get(name, 0) + bytes
