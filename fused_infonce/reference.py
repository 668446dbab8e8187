"""The oracle: InfoNCE in plain PyTorch, dense, differentiable any number of times, in any floating dtype.

It holds every N x M matrix in the inputs' dtype, and shares nothing with the fused implementation. Tests run it in
float64; `backend="reference"` runs it on the inputs as they are. Arguments are those of `functional.info_nce`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """`F.normalize(x, dim=-1)`, except that a row with a norm up to EPS has no gradient (there it would be 1e12)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    small = norm <= EPS
    return torch.where(small, x.detach() / EPS, x / torch.where(small, 1, norm))


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    symmetric: bool = False,
    normalize: bool = True,
    in_batch_negatives: bool | None = None,
    ignore_index: int = -100,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    n, m = len(query), len(positive_key)
    if normalize:
        query, positive_key = unit_rows(query), unit_rows(positive_key)
        negative_keys = None if negative_keys is None else unit_rows(negative_keys)
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=query.dtype)
    t = temperature.to(query.device, query.dtype).reshape(-1)  # (1,) or (N,)
    if target is None:
        target = torch.arange(n, device=query.device)
    valid = target != ignore_index
    target = target.masked_fill(~valid, 0)

    cosine = query @ positive_key.T  # (N, M)
    pos = (cosine.gather(1, target[:, None])[:, 0] if m else cosine.sum(1)) / t
    row_ids = query_ids if query_ids is not None or key_ids is None else key_ids[target]
    excluded = torch.arange(m, device=query.device) == target[:, None]
    if key_ids is not None and row_ids is not None:
        excluded = excluded | (row_ids[:, None] == key_ids)

    negatives = []
    if in_batch_negatives or negative_keys is None:
        negatives.append((cosine / t[:, None]).masked_fill(excluded, -torch.inf))
    if negative_keys is not None:
        shared = negative_mode == "unpaired"
        logits = (query @ negative_keys.T if shared else torch.einsum("nd,nhd->nh", query, negative_keys)) / t[:, None]
        if negative_ids is not None and row_ids is not None:
            logits = logits.masked_fill(row_ids[:, None] == negative_ids, -torch.inf)
        negatives.append(logits)
    neg = torch.logsumexp(torch.cat(negatives, dim=1), dim=1)
    loss = -F.logsigmoid(pos - neg)  # -log(exp(pos) / (exp(pos) + exp(neg)))
    loss = loss + label_smoothing * (pos - mean_logit(torch.cat([pos[:, None], *negatives], dim=1)))

    if symmetric:  # column j, the queries against key j, with the temperature of row j
        columns = (cosine / t).masked_fill(excluded, -torch.inf).T
        column_loss = -F.logsigmoid(pos - torch.logsumexp(columns, dim=1))
        column_loss = column_loss + label_smoothing * (pos - mean_logit(torch.cat([pos[:, None], columns], dim=1)))
        loss = (loss + column_loss) / 2

    weight = valid.to(loss.dtype) if weight is None else valid * weight
    return reduce(torch.where(valid, weight * loss, 0), weight.sum(), reduction)


def mean_logit(logits: Tensor) -> Tensor:
    """Of those of each row that are not left out, that is -inf."""
    kept = logits != -torch.inf
    return torch.where(kept, logits, 0).sum(1) / kept.sum(1)


def nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    *,
    normalize: bool = True,
) -> Tensor:
    rows = torch.cat([view_a, view_b])
    rows = unit_rows(rows) if normalize else rows
    n = len(rows)
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=rows.dtype)
    logits = rows @ rows.T / temperature.to(rows.device, rows.dtype).reshape(-1, 1)
    index = torch.arange(n, device=rows.device)
    target = index.roll(n // 2)
    left_out = (index == index[:, None]) | (index == target[:, None])
    pos = logits[index, target]
    neg = torch.logsumexp(logits.masked_fill(left_out, -torch.inf), dim=1)
    return reduce(-F.logsigmoid(pos - neg), torch.tensor(n), reduction)


def reduce(loss: Tensor, count: Tensor, reduction: str) -> Tensor:
    loss = loss if loss.dtype == torch.float64 else loss.float()
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / count
