"""Retrieval metrics from ranks, of which ties leave two bounds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks


class Bounds(NamedTuple):
    """A metric with every negative that is tied with its positive ranked before it, and with all of them after it."""

    pessimistic: float
    optimistic: float

    def __float__(self) -> float:
        return self.pessimistic


class Ranks(NamedTuple):
    """How many negatives of each row score above its positive, and how many are tied with it: (N,) int64.

    The rank is `1 + above` if no tie counts, and `1 + above + ties` if all do.
    """

    above: Tensor
    ties: Tensor

    def both(self) -> tuple[Tensor, Tensor]:
        """Return the pessimistic and the optimistic ranks, (N,) int64, from 1."""
        first = 1 + self.above
        return first + self.ties, first

    def recall(self, k: int) -> Bounds:
        """Return the share of rows whose positive is among the first k."""
        checks.whole("k", k, 1)
        return Bounds(*((rank <= k).double().mean().item() for rank in self.both()))

    def mrr(self, k: int | None = None) -> Bounds:
        """Return the mean of 1 / rank, or with k of 1 / rank or 0 where the positive is not among the first k."""
        if k is not None:
            checks.whole("k", k, 1)
        shares = [1 / rank.double() for rank in self.both()]
        if k is not None:
            shares = [share.where(rank <= k, 0) for share, rank in zip(shares, self.both(), strict=True)]
        return Bounds(*(share.mean().item() for share in shares))

    def median_rank(self) -> Bounds:
        """Return the median rank, the mean of the two in the middle where rows are even in number."""
        ordered = [torch.sort(rank).values.double() for rank in self.both()]
        return Bounds(*((x[(len(x) - 1) // 2] + x[len(x) // 2]).item() / 2 for x in ordered))
