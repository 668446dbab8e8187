"""The oracle of multiple negatives ranking: dense, as `reference`, with one matrix of scores a direction."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.reference import reduce, unit_rows


def multiple_negatives(
    query: Tensor,
    documents: Sequence[Tensor],
    temperature: Tensor,
    directions: Collection[str],
    partition: str,
    hardness: str | None,
    strength: float,
    offset: int,
    all_queries: Tensor | None,
    normalize: bool,
    reduction: str,
) -> Tensor:
    """Arguments as `functional.multiple_negatives` has checked them, the temperature (1,) or (N,)."""
    every, columns = query if all_queries is None else all_queries, torch.cat(list(documents))
    if normalize:
        query, every, columns = unit_rows(query), unit_rows(every), unit_rows(columns)
    n, m = len(query), len(documents[0])
    t = temperature.to(query.device, query.dtype).reshape(-1, 1)
    sample = torch.arange(m, device=query.device)
    itself = sample[offset : offset + n, None] == sample  # (N, M)
    own = itself.repeat(1, len(documents))  # (N, M H)
    positive = own & (torch.arange(len(columns), device=query.device) < m)
    mine = columns[offset : offset + n]

    cosine = query @ columns.T
    harder = {"in_batch_negatives": ~own, "hard_negatives": own & ~positive, "all_negatives": ~positive}
    added = torch.zeros_like(cosine) if hardness is None else strength * cosine.detach() * harder[hardness]
    pos = (cosine * positive).sum(1) / t[:, 0]
    scores = [(cosine / t + added).masked_fill(positive, -torch.inf)]  # without the positive
    if "query_to_query" in directions:
        scores.append((query @ every.T / t).masked_fill(itself, -torch.inf))
    if "doc_to_query" in directions:
        scores.append((mine @ every.T / t).masked_fill(itself, -torch.inf))
    if "doc_to_doc" in directions:
        scores.append((mine @ columns.T / t).masked_fill(own, -torch.inf))
    if partition == "per_direction":
        rows = torch.stack([_against(x, pos, 1) for x in scores]).mean(0)
    else:
        rows = _against(torch.cat(scores, dim=1), pos, 1 + ("doc_to_query" in directions))
    return reduce(rows, torch.tensor(n), reduction)


def _against(scores: Tensor, pos: Tensor, copies: int) -> Tensor:
    """log( (copies exp(pos_i) + sum_j exp(s_ij)) / exp(pos_i) )."""
    log_k = math.log(copies)
    return log_k - F.logsigmoid(log_k + pos - torch.logsumexp(scores, dim=1))
