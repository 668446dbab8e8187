"""The rows of InfoNCE and its relatives, one at a time: the logit of the positive, and a list of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Row(NamedTuple):
    index: int
    pos: Tensor  # 0-d
    others: Tensor  # (K,) logits of the negatives
    t: Tensor  # 0-d


def rows_of(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.1, *,
    normalize: bool = True, negative_mode: str = "unpaired", in_batch_negatives: bool | None = None,
    symmetric: bool = False, target: Tensor | None = None, query_ids: Tensor | None = None,
    key_ids: Tensor | None = None, negative_ids: Tensor | None = None,
) -> Iterator[Row | None]:  # fmt: skip
    """Yield the rows of InfoNCE, None for one that is ignored; with `symmetric` those of the keys after them."""
    unit = (lambda x: F.normalize(x, dim=-1)) if normalize else (lambda x: x)
    q, k = unit(query), unit(positive_key)
    extra = None if negative_keys is None else unit(negative_keys)
    t = torch.as_tensor(temperature, dtype=q.dtype, device=q.device).reshape(-1).expand(len(q))
    in_batch = negative_keys is None if in_batch_negatives is None else in_batch_negatives
    for i in range(len(q)):
        y = i if target is None else int(target[i])
        if y == -100:
            yield None
            continue
        own = query_ids[i] if query_ids is not None else None if key_ids is None else key_ids[y]
        others = []
        for j in range(len(k)):
            if in_batch and j != y and not (key_ids is not None and key_ids[j] == own):
                others.append(q[i] @ k[j] / t[i])
        for h in range(0 if extra is None else extra.shape[-2]):
            negative, ids = (extra[i], negative_ids) if negative_mode == "paired" else (extra, negative_ids)
            ids = ids[i] if ids is not None and negative_mode == "paired" else ids
            if not (ids is not None and own is not None and ids[h] == own):
                others.append(q[i] @ negative[h] / t[i])
        yield Row(i, q[i] @ k[y] / t[i], torch.stack(others) if others else q.new_zeros(0), t[i])
    if not symmetric:
        return
    for j in range(len(k)):
        own = None if key_ids is None else key_ids[j]
        others = []
        for i in range(len(q)):
            its = query_ids[i] if query_ids is not None else None if key_ids is None else key_ids[i]
            if i != j and not (key_ids is not None and its == own):
                others.append(q[i] @ k[j] / t[j])
        yield Row(j, q[j] @ k[j] / t[j], torch.stack(others) if others else q.new_zeros(0), t[j])


def rows_of_views(view_a: Tensor, view_b: Tensor, temperature: Any = 0.1, *, normalize: bool = True) -> Iterator[Row]:
    z = torch.cat([view_a, view_b])
    z, n = F.normalize(z, dim=-1) if normalize else z, len(view_a)
    t = torch.as_tensor(temperature, dtype=z.dtype, device=z.device).reshape(-1).expand(2 * n)
    for i in range(2 * n):
        others = [z[i] @ z[j] / t[i] for j in range(2 * n) if j % n != i % n]
        yield Row(i, z[i] @ z[(i + n) % (2 * n)] / t[i], torch.stack(others) if others else z.new_zeros(0), t[i])


def reduce(
    loss: Callable[[Row], Tensor], rows: Iterator[Row | None], reduction: str, count: int, weight: Tensor | None = None
) -> Tensor:
    """Reduce the losses of `count` rows, or of twice as many in two directions; one without negatives has loss 0."""
    losses, total = [], 0
    for place, row in enumerate(rows):
        counted = row is not None
        w = 1 if weight is None else weight[place % count]
        total = total + counted * w
        losses.append((w * loss(row) if counted and len(row.others) else None, w))
    zero = next((0 * x for x, _ in losses if x is not None), torch.zeros((), dtype=torch.float64))
    values = torch.stack([zero if x is None else x for x, _ in losses])
    values = values.view(-1, count).mean(0) if count else values
    directions = len(losses) // count
    return {"none": values, "sum": values.sum(), "mean": values.sum() / (total / directions)}[reduction]
