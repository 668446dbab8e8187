"""The rows of queries and columns of documents, and the statistics of each direction in which they are compared."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import contrast
from ..backends import Options
from ..backends.contract import KeySet, Problem, RowStatistics, Temperature
from ..backends.precision import all_wide, without_autocast
from .across import all_rows
from .biases import Biases, of_columns
from .rows import dots, finite, unit


@dataclass(frozen=True, eq=False)
class Ranking:
    """The rows and options of a call of `multiple_negatives`, and the problem of each direction."""

    query: Tensor
    documents: list[Tensor]
    every: Tensor  # the queries of all documents
    offset: int
    t: Temperature
    directions: frozenset[str]
    hardness: str | None
    hardness_strength: float
    normalize: bool
    biases: Biases  # those of columns of hard negatives one after another

    @property
    def strength(self) -> float:
        none = self.hardness is None or (self.hardness == "hard_negatives" and len(self.documents) == 1)
        return 0.0 if none else self.hardness_strength

    @property
    def apart(self) -> bool:
        """Return whether a query's own hard negatives are treated unlike the hard negatives of other queries."""
        return self.strength > 0 and self.hardness != "all_negatives" and len(self.documents) > 1

    @property
    def weighted(self) -> bool:
        """Return whether the documents of other queries have a hardness."""
        return self.strength > 0 and self.hardness != "hard_negatives"

    @property
    def local(self) -> bool:
        """Return whether document i belongs to query i."""
        return len(self.query) == len(self.documents[0]) and self.every is self.query

    @property
    def columns(self) -> bool:
        """Return whether doc_to_query comes from the products of query_to_doc."""
        return self.local and "doc_to_query" in self.directions and not self.weighted

    @property
    def flags(self) -> tuple[Any, ...]:
        return sorted(self.directions), self.hardness, self.hardness_strength, self.normalize

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + len(self.query))

    @property
    def index(self) -> Tensor:
        """The number of each document's sample, (M,)."""
        return torch.arange(len(self.documents[0]), device=self.query.device)

    @property
    def target(self) -> Tensor | None:
        return None if self.local else self.index[self.own]

    def hard(self, others: bool) -> tuple[tuple[KeySet, ...], Tensor | None]:
        """Return the hard negatives of all queries, and the ids that with `others` leave each query's own out."""
        hard = self.documents[1:]
        if not hard:
            return (), None
        with without_autocast(self.query.device.type):  # autocast refuses rows of another 16-bit dtype than its own
            rows = torch.cat(hard) if len(hard) > 1 else hard[0]
        keys = KeySet(rows, bias=self.biases.negative)
        if not others:
            return (keys,), None
        return (keys._replace(ids=self.index.repeat(len(hard))),), self.index[self.own]

    @property
    def first(self) -> Problem:
        """The problem of the queries against the documents."""
        hard, ids = self.hard(others=self.apart)
        offset = self.biases.offset
        if self.columns and offset is not None:
            offset = torch.stack([offset, torch.zeros_like(offset)])
        return Problem(
            KeySet(self.query, ids), (KeySet(self.documents[0], bias=self.biases.key), *hard), self.t, self.target,
            offset=offset, columns=self.columns, normalize=self.normalize, bias_bound=self.biases.bound,
        )  # fmt: skip

    def widened(self) -> tuple[Ranking, AbstractContextManager[Any]]:
        """Return the call over rows whose 16-bit gradients are added in float32 and rounded once, and the context.

        Where a single problem has all gradients of its rows, the call itself is returned.
        """
        if not self.apart and len(self.directions) <= 1 + self.columns:
            return self, nullcontext()
        (query, every, *documents), context = all_wide([self.query, self.every, *self.documents])
        return replace(self, query=query, every=every, documents=documents), context

    def check_own(self) -> None:
        """Check that the documents are this rank's own."""
        if self.offset or self.every is not self.query:
            raise ValueError("offset and all_queries are of gathered documents: distributed=True gathers them itself")
        if len(self.documents[0]) != len(self.query):
            raise ValueError(f"documents must have {len(self.query)} rows as query has, got {len(self.documents[0])}")

    def of_all(
        self, options: Options, key_bias: Tensor | None, positive_bias: bool
    ) -> tuple[Ranking, AbstractContextManager[Any]]:
        """Return this rank's call over the documents and queries of all ranks, and the context of its products."""
        queries = KeySet(self.query)
        if key_bias is not None:
            key_bias = key_bias.to(self.t.dtype)  # in which gradients are added
        columns = [KeySet(x, bias=None if key_bias is None else key_bias[i]) for i, x in enumerate(self.documents)]
        (query, every, *sets), context = all_rows([queries, queries, *columns], self.t, options, repr(self.flags))
        biases = self.biases
        start = options.call.start(options.call.keys)
        documents, own = [x.rows for x in sets], slice(start, start + len(query.rows))
        if key_bias is not None:
            gathered = torch.stack([x.bias for x in sets if x.bias is not None])
            biases = of_columns(gathered, positive_bias, query.rows, documents, own)
        ranking = replace(
            self, query=query.rows, every=every.rows, documents=documents, offset=start, biases=biases
        )  # fmt: skip
        return ranking, context

    def scores(self, options: Options) -> tuple[Tensor, list[Tensor]]:
        """Return the (N,) logits of the positives, and for each direction the logsumexp of its negatives."""
        positives, mine, t = self.documents[0], self.documents[0][self.own], self.t
        rows, columns = _weighted(self.first, options, self.strength) if self.weighted else contrast.statistics(
            self.first, options
        )  # fmt: skip
        negs = [rows.neg]

        def against(x: Tensor, y: KeySet, ids: Tensor | None = None, *hard: KeySet, itself: bool = False) -> Tensor:
            problem = Problem(
                KeySet(x, ids), (y, *hard), t, self.target, normalize=self.normalize, self_similar=itself,
                bias_bound=self.biases.bound,
            )  # fmt: skip
            return contrast.statistics(problem, options).rows.neg

        if "query_to_query" in self.directions:
            negs.append(against(self.query, KeySet(self.every), itself=self.local))
        if columns is not None:
            negs.append(columns.neg)
        elif "doc_to_query" in self.directions:
            negs.append(against(mine, KeySet(self.every)))
        if "doc_to_doc" in self.directions:
            hard, ids = self.hard(others=True)
            keys = KeySet(positives, bias=self.biases.key)
            itself = self.local and len(hard) == 0 and keys.bias is None
            negs.append(against(positives if itself else mine, keys, ids, *hard, itself=itself))
        return rows.pos, negs

    def own_negatives(self) -> Tensor:
        """Compute the (N,) logsumexp over a query's own hard negatives, O(N H D)."""
        t = self.t.values
        bonus = self.strength if self.hardness == "hard_negatives" else 0.0
        q = unit(self.query, self.normalize, t.dtype)
        mates = [unit(x[self.own], self.normalize, t.dtype) for x in self.documents[1:]]
        cosine = torch.stack([dots(q, mate) for mate in mates], dim=1)
        return torch.logsumexp(cosine / t[:, None] + bonus * cosine.detach(), dim=1)


def _weighted(problem: Problem, options: Options, strength: float) -> tuple[RowStatistics, None]:
    """Return statistics where every negative's logit has `strength` times its cosine added, which gets no gradient.

    These are the logits at the temperature r t, r = 1 / (1 + strength t); their gradient is that at t, r times theirs.
    """
    cooler = problem.temperature.cooler(strength)
    r = (cooler.values / problem.temperature.values).detach()
    rows = contrast.statistics(replace(problem, temperature=cooler), options).rows
    neg = finite(rows.neg)
    return rows._replace(pos=r * rows.pos, neg=rows.neg.detach() + r * (neg - neg.detach())), None
