"""How the rows of all ranks are brought together: all at once, or in parts that are never all held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MIB = 2**20
ROOM = 16  # times the workspace limit, 1 GiB on a CPU and an eighth of a GPU: more gathered rows than that are streamed
FEWEST = 8  # parts of a stream, of which two are held: nothing hides the first and the last


@dataclass(frozen=True)
class Part:
    """One part of the columns: some rows of every rank.

    counts: how many of each rank. firsts: the first of each rank's, among its own. own: this rank's
    """

    counts: tuple[int, ...]
    firsts: tuple[int, ...]
    own: slice


@dataclass(frozen=True)
class Exchange:
    """The exchange of one call.

    name: "gather" or "stream". counts: the numbers of rows of all ranks. gathered, reduced: the bytes that this rank
    receives as rows and as gradients, beside vectors of a few numbers a row. held: the bytes of both at a time
    """

    name: str
    counts: tuple[int, ...]
    parts: tuple[Part, ...]
    gathered: int
    reduced: int
    held: int

    def __str__(self) -> str:
        return (
            f"{self.name} over {len(self.counts)} processes of {min(self.counts)} to {max(self.counts)} rows, in "
            f"{len(self.parts)} part{'s' if len(self.parts) > 1 else ''}: this one receives "
            f"{self.gathered / MIB:.1f} MiB of rows and {self.reduced / MIB:.1f} MiB of gradients, and holds "
            f"{self.held / MIB:.1f} MiB of both at a time"
        )


def exchange_of(
    name: str, counts: Sequence[int], rank: int, dim: int, itemsize: int, acc_itemsize: int, limit: int,
    gradients: bool,
) -> Exchange:  # fmt: skip
    """Return the exchange of rows of `dim` components; name: what the user asked for.

    limit: bytes of workspace, which "auto" measures gathered rows by. gradients: whether those of keys come back.
    """
    every, others = sum(counts) * dim, (sum(counts) - counts[rank]) * dim
    each = itemsize + acc_itemsize * gradients
    stream = name == "stream" or (name == "auto" and every * each > ROOM * limit)
    most = max(counts, default=0)
    number = 1
    if stream:
        number = max(min(max(FEWEST, -(-2 * every * each // (ROOM * limit))), most), 1)
    edges = [[n * index // number for n in counts] for index in range(number + 1)]
    parts = []
    for first, last in pairwise(edges):
        sizes = tuple(end - start for start, end in zip(first, last, strict=True))
        parts.append(Part(sizes, tuple(first), slice(first[rank], last[rank])))
    passes = 2 if number > 1 and gradients else 1  # a stream gathers again in the backward
    held = min(2, number) * max(sum(part.counts) for part in parts) * dim * each
    return Exchange(
        "stream" if stream else "gather", tuple(counts), tuple(parts), others * itemsize * passes,
        others * acc_itemsize * gradients, held,
    )  # fmt: skip
