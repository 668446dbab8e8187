"""Multiple negatives ranking with every score of every direction in memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import log_sum, per_row, reduce, unit_rows


def multiple_negatives(
    query: Tensor, documents: Sequence[Tensor] | Tensor, temperature: Any = 0.05, *,
    directions: Collection[str] = ("query_to_doc",), partition: str = "joint", hardness: str | None = None,
    hardness_strength: float = 0.0, offset: int = 0, all_queries: Tensor | None = None, normalize: bool = True,
    key_bias: Tensor | None = None, positive_bias: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Return the loss of queries against the positives (the first column of documents) and the hard negatives."""
    documents = list(documents)
    every = query if all_queries is None else all_queries
    n, m = len(query), len(documents[0])
    if normalize:
        query, every, *documents = map(unit_rows, (query, every, *documents))
    t = per_row(temperature, query, n)[:, None]
    mine, everything = documents[0][offset : offset + n], torch.cat(documents)
    column = torch.arange(m, device=query.device).repeat(len(documents))
    own = column == torch.arange(offset, offset + n, device=query.device)[:, None]
    hard = (torch.arange(len(column), device=query.device) >= m).expand_as(own)
    positive = own & ~hard
    penalised = torch.zeros_like(own)
    if hardness in ("in_batch_negatives", "all_negatives"):
        penalised |= ~own
    if hardness in ("hard_negatives", "all_negatives"):
        penalised |= own & hard

    cosine = query @ everything.T
    pos = torch.where(positive, cosine, 0).sum(1) / t[:, 0]
    bias = cosine.new_zeros(len(column)) if key_bias is None else key_bias.flatten()
    raw = pos
    if positive_bias:
        pos = pos + bias[offset : offset + n]
    without_positive = {  # each direction's logits; the positive is in query_to_doc once, and in doc_to_query once
        "query_to_doc": (cosine / t + bias + hardness_strength * cosine.detach() * penalised).masked_fill(
            positive, -torch.inf
        ),
        "query_to_query": (query @ every.T / t).masked_fill(own[:, :m], -torch.inf) if len(every) == m else None,
        "doc_to_query": (mine @ every.T / t).masked_fill(own[:, :m], -torch.inf) if len(every) == m else None,
        "doc_to_doc": (mine @ everything.T / t + bias).masked_fill(own, -torch.inf),
    }
    chosen = [without_positive[name] for name in directions]
    if partition == "joint":
        copies = torch.stack([pos, raw], dim=1) if "doc_to_query" in directions else pos[:, None]
        rows = against(torch.cat(chosen, dim=1), pos, copies.logsumexp(1))
    else:
        each = [raw if name == "doc_to_query" else pos for name in directions]
        rows = torch.stack([against(logits, p, p) for logits, p in zip(chosen, each, strict=True)]).mean(0)
    return reduce(rows, reduction)


def against(negatives: Tensor, pos: Tensor, positives: Tensor) -> Tensor:
    """Return log((exp(positives) + sum of the negatives' exponentials) / exp(pos)), exact however small it is."""
    return (positives - pos) - F.logsigmoid(positives - log_sum(negatives))
