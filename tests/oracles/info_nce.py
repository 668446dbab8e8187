"""InfoNCE with every logit in memory, and the directions that its relatives are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import IGNORED, log_sum, per_row, reduce, unit_rows


class Direction(NamedTuple):
    """The logits of the queries against keys, or of the keys against queries."""

    pos: Tensor  # (N,) the positive's
    negatives: Tensor  # (N, K) the others', -inf where one is left out
    t: Tensor  # (N,) temperatures

    @property
    def neg(self) -> Tensor:
        return log_sum(self.negatives)

    @property
    def count(self) -> Tensor:
        """The number of negatives of each row."""
        return (self.negatives != -torch.inf).sum(1)

    @property
    def mean(self) -> Tensor:
        """The mean logit of each row, of the positive and the negatives that are not left out."""
        logits = torch.cat([self.pos[:, None], self.negatives], dim=1)
        kept = logits != -torch.inf
        return torch.where(kept, logits, 0).sum(1) / kept.sum(1)


def directions(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.1,
    negative_mode: str = "unpaired", *, symmetric: bool = False, normalize: bool = True,
    in_batch_negatives: bool | None = None, ignore_index: int = IGNORED, target: Tensor | None = None,
    query_ids: Tensor | None = None, key_ids: Tensor | None = None, negative_ids: Tensor | None = None,
    key_bias: Tensor | None = None, negative_bias: Tensor | None = None, positive_bias: bool = True,
    negative_index: Tensor | None = None, margin: float = 0.0,
) -> tuple[list[Direction], Tensor]:  # fmt: skip
    """Return one direction, or two with `symmetric`, and which rows count, (N,)."""
    n, m = len(query), len(positive_key)
    if normalize:
        query, positive_key = unit_rows(query), unit_rows(positive_key)
        negative_keys = None if negative_keys is None else unit_rows(negative_keys)
    t = per_row(temperature, query, n)
    if target is None:
        target = torch.arange(n, device=query.device)
    valid = target != ignore_index
    target = target.masked_fill(~valid, 0)

    cosine = query @ positive_key.T  # (N, M)
    pos = ((cosine.gather(1, target[:, None])[:, 0] if m else cosine.sum(1)) - margin) / t
    column_pos, of_key = pos, 0 if key_bias is None else key_bias
    if key_bias is not None and positive_bias:
        pos = pos + key_bias[target]
    row_ids = query_ids if query_ids is not None or key_ids is None else key_ids[target]
    excluded = torch.arange(m, device=query.device) == target[:, None]
    if key_ids is not None and row_ids is not None:
        excluded = excluded | (row_ids[:, None] == key_ids)

    negatives = []
    if in_batch_negatives or negative_keys is None:
        negatives.append((cosine / t[:, None] + of_key).masked_fill(excluded, -torch.inf))
    if negative_keys is not None:
        if negative_index is not None and len(negative_keys):
            negative_keys, negative_mode = negative_keys[negative_index], "paired"  # of -1 the last, left out below
            negative_ids = None if negative_ids is None else negative_ids[negative_index]
            negative_bias = None if negative_bias is None else negative_bias[negative_index]
        shared = negative_mode == "unpaired"
        logits = (query @ negative_keys.T if shared else torch.einsum("nd,nhd->nh", query, negative_keys)) / t[:, None]
        logits = logits if negative_bias is None else logits + negative_bias
        if negative_ids is not None and row_ids is not None:
            logits = logits.masked_fill(row_ids[:, None] == negative_ids, -torch.inf)
        if negative_index is not None and negative_mode == "paired":
            logits = logits.masked_fill(negative_index == -1, -torch.inf)
        negatives.append(logits)
    found = [Direction(pos, torch.cat(negatives, dim=1), t)]
    if symmetric:  # column j, the queries, which have no bias, against key j, with the temperature of row j
        found.append(Direction(column_pos, (cosine / t).masked_fill(excluded, -torch.inf).T, t))
    return found, valid


def reduced(
    loss: Callable[[Direction], Tensor], found: tuple[list[Direction], Tensor], reduction: str, weight: Tensor | None
) -> Tensor:
    """Return the weighted mean over the rows that count, their sum or the rows, of the mean over the directions."""
    each, valid = found
    rows = torch.stack([loss(direction) for direction in each]).mean(0)
    weight = valid.to(rows.dtype) if weight is None else valid * weight
    return reduce(torch.where(valid, weight * rows, 0), reduction, weight.sum())


def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.1,
    reduction: str = "mean", negative_mode: str = "unpaired", *, weight: Tensor | None = None,
    label_smoothing: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Return the mean of -log(exp(pos) / (exp(pos) + exp(neg))) over the rows, or as `reduction` says."""

    def loss(rows: Direction) -> Tensor:
        return label_smoothing * (rows.pos - rows.mean) - F.logsigmoid(rows.pos - rows.neg)

    found = directions(query, positive_key, negative_keys, temperature, negative_mode, **options)
    return reduced(loss, found, reduction, weight)
