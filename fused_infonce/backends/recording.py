"""What calls note aside of their results while a context asks for it: their plans, or what their rows were made of."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import Problem


class Notes:
    """Lists of notes, one for each thread that is in the context `taken`."""

    def __init__(self) -> None:
        self.by_thread: dict[int, list[Any]] = {}

    @contextmanager
    def taken(self) -> Iterator[list[Any]]:
        """A context in which this thread's notes go to the list that it returns."""
        thread, notes = threading.get_ident(), list[Any]()
        outer = self.by_thread.get(thread)
        self.by_thread[thread] = notes
        try:
            yield notes
        finally:
            del self.by_thread[thread]
            if outer is not None:
                self.by_thread[thread] = outer

    @property
    def wanted(self) -> bool:
        """Whether this thread's notes go anywhere now."""
        return bool(self.by_thread) and not torch.compiler.is_compiling() and threading.get_ident() in self.by_thread

    @property
    def here(self) -> list[Any]:
        """The list of this thread."""
        return self.by_thread[threading.get_ident()]


class Recorded(NamedTuple):
    """What the rows of a loss's last call were made of, detached: (N,) each, or where both directions of N pairs are
    scored (2 N,), the queries against the keys and after them the keys against the queries.

    pos: the positive's logit; of several positives the first one's; 0 in a row without a target
    neg: log sum_j exp(s_ij) over the row's negatives j; -inf where there are none
    mean: sum_j exp(s_ij - neg_i) s_ij, their mean logit, without biases: exp(neg - mean) is the effective number of
        negatives where there are none. NaN in a row that had no gradient: its weight was 0, or its loss below the
        smallest numbers
    temperature: that of the row
    keys: how many keys a row was scored against, among them its positive and those that ids leave out
    counted: bool, whether the loss counts the row: not one whose target is `ignore_index`, nor one of weight 0. The
        others are there to keep the order, and are no part of what `diagnose_step` and the callbacks say
    """

    pos: Tensor
    neg: Tensor
    mean: Tensor
    temperature: Tensor
    keys: int
    counted: Tensor

    def effective_negatives(self) -> Tensor:
        """Return exp(neg - mean); NaN in a row that does not count or has no negatives, as where the mean is NaN."""
        known = self.counted & (self.neg > -torch.inf)
        return torch.exp(self.neg - self.mean).masked_fill(~known, torch.nan)


Parts = Sequence[Sequence[Tensor]]  # pos, neg and mean of the rows and, where asked for, of the columns
recordings = Notes()


def record(problem: Problem, parts: Parts, keys: Sequence[int] = ()) -> None:
    """Note the rows and columns of a problem; keys: how many each direction is scored against, where not its own."""
    temperature = problem.temperature.values.detach().clone()  # an optimizer may step the user's tensor in place
    used = problem.keys if problem.in_batch else problem.keys[1:]
    keys = keys or (sum(each.columns() for each in used), problem.query.rows.shape[0])
    for i, (part, count) in enumerate(zip(parts, keys[: len(parts)], strict=True)):
        pos, neg, mean = (x.detach() for x in part)
        target = None if i > 0 or problem.every_row_counts else problem.target  # a column is a row's target
        counted = torch.ones_like(neg, dtype=torch.bool) if target is None else target >= 0
        recordings.here.append(Recorded(pos, neg, mean, temperature.expand(len(neg)), count, counted))


def unrecorded() -> AbstractContextManager[Any]:
    """Return a context in which no rows are noted: of statistics that are weights of a loss, and not its softmax."""
    return recordings.taken() if recordings.wanted else nullcontext()


def record_positives(pos: Tensor) -> None:
    """Note other logits of the positives for the rows that were noted last."""
    if recordings.wanted:
        recordings.here[-1] = recordings.here[-1]._replace(pos=pos.detach())


def record_weight(weight: Tensor, directions: int) -> None:
    """Note that rows of weight 0 do not count, in the rows of so many directions that were noted last."""
    if recordings.wanted:
        notes = recordings.here
        notes[-directions:] = [part._replace(counted=part.counted & (weight != 0)) for part in notes[-directions:]]


def record_together() -> None:
    """Note that all rows noted so far are parts of the same ones, the first of which have the positives."""
    if not recordings.wanted:
        return
    first, *_ = notes = recordings.here
    negs = torch.stack([part.neg for part in notes])
    neg = torch.logsumexp(negs, 0)
    share = torch.exp(negs - neg).masked_fill(neg == -torch.inf, 0)
    mean = (share * torch.stack([part.mean for part in notes])).sum(0)
    notes[:] = [first._replace(neg=neg, mean=mean, keys=sum(part.keys for part in notes))]


def recorded(notes: Sequence[Recorded]) -> Recorded:
    """Return what was noted as one, a softmax after another."""
    if len(notes) == 1:
        return notes[0]
    pos, neg, mean, t, keys, counted = zip(*notes, strict=True)
    return Recorded(torch.cat(pos), torch.cat(neg), torch.cat(mean), torch.cat(t), max(keys), torch.cat(counted))
