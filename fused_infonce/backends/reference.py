"""The oracle: InfoNCE in plain PyTorch, dense, differentiable any number of times, in any floating dtype.

It holds every N x M matrix in the inputs' dtype, and shares nothing with the fused implementation. Tests run it in
float64; `backend="reference"` runs it on the inputs as they are. Arguments are those of `functional.info_nce`.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    more_views: Sequence[Tensor] = (),
    normalize: bool = True,
) -> Tensor:
    views = (view_a, view_b, *more_views)
    rows = torch.cat(views)
    rows = unit_rows(rows) if normalize else rows
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=rows.dtype)
    logits = rows @ rows.T / temperature.to(rows.device, rows.dtype).reshape(-1, 1)
    index = torch.arange(len(rows), device=rows.device)
    sample = index % max(len(view_a), 1)
    same_sample = sample == sample[:, None]
    neg = torch.logsumexp(logits.masked_fill(same_sample, -torch.inf), dim=1)
    positive = same_sample & (index != index[:, None])
    pairs = -F.logsigmoid(logits - neg[:, None])  # of row i with positive j: -log(exp(s_ij) / (exp(s_ij) + exp(neg_i)))
    loss = torch.where(positive, pairs, 0).sum(1) / (len(views) - 1)
    return reduce(loss, torch.tensor(len(rows)), reduction)


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    base_temperature: float = 0.07,
    reduction: str = "mean",
    *,
    normalize: bool = True,
) -> Tensor:
    samples, views = features.shape[:2]
    rows = torch.cat(features.flatten(2).unbind(1))  # (V N, D)
    rows = unit_rows(rows) if normalize else rows
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=rows.dtype)
    t = temperature.to(rows.device, rows.dtype).reshape(1)
    if mask is None:
        classes = torch.arange(samples, device=rows.device) if labels is None else labels.flatten()
        mask = classes[:, None] == classes
    anchors = samples if contrast_mode == "one" else len(rows)
    index = torch.arange(len(rows), device=rows.device)
    itself = index[:anchors, None] == index
    weights = mask.to(rows.dtype).repeat(anchors // max(samples, 1), views).masked_fill(itself, 0)

    logits = rows[:anchors] @ rows.T / t
    others = logits.masked_fill(itself, -torch.inf)
    lse = torch.logsumexp(others, dim=1, keepdim=True)
    largest = others == (others.amax(1, keepdim=True) if len(rows) else others)
    largest &= largest.cumsum(1) == 1
    rest = torch.logsumexp(others.masked_fill(largest, -torch.inf), dim=1, keepdim=True)
    pairs = torch.where(largest, -F.logsigmoid(logits - rest), lse - logits)  # lse - the largest logit would cancel
    count = weights.sum(1)
    loss = torch.where(weights > 0, weights * pairs, 0).sum(1) / torch.where(count == 0, 1, count)
    return reduce(loss * (t / base_temperature), torch.tensor(anchors), reduction)


def guided_info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    temperature: Tensor,
    reduction: str,
    *,
    guides: tuple[Tensor, Tensor, Tensor | None],
    ceiling: Tensor,
    key_ids: Tensor | None,
    negative_ids: Tensor | None,
    contrast_queries: bool,
    contrast_keys: bool,
    offset: int,
    normalize: bool,
) -> Tensor:
    """`functional.guided_info_nce`, its ceilings given; a guide of None spares the negatives."""
    if normalize:
        query, positive_key = unit_rows(query), unit_rows(positive_key)
        negative_keys = None if negative_keys is None else unit_rows(negative_keys)
    n = len(query)
    row, own = torch.arange(n, device=query.device), slice(offset, offset + n)
    guide, guide_key, guide_negatives = (None if g is None else unit_rows(g.to(ceiling.dtype)) for g in guides)

    row_ids = None if key_ids is None else key_ids[own]

    def against(
        x: Tensor, y: Tensor, itself: int | None, g: Tensor | None, h: Tensor | None, ids: Tensor | None
    ) -> Tensor:
        """(N, M) logits, -inf where row i of x is row `itself + i` of y, of its id, and where the guide says so."""
        paired = "nd,nhd->nh" if y.dim() == 3 else "nd,md->nm"
        logits = torch.einsum(paired, x, y) / temperature.to(x.dtype)[:, None]
        if itself is not None:
            logits = logits.index_put((row, itself + row), logits.new_tensor(-torch.inf))
        if ids is not None and row_ids is not None:
            logits = logits.masked_fill(row_ids[:, None] == ids, -torch.inf)
        if g is None or h is None:
            return logits
        return logits.masked_fill(torch.einsum(paired, g, h) > ceiling[:, None], -torch.inf)

    sets = [against(query, positive_key, offset, guide, guide_key, key_ids)]
    if contrast_queries:
        sets.append(against(query, query, 0, guide, guide, row_ids))
    if contrast_keys and guide_key is not None:
        sets.append(against(positive_key[own], positive_key, offset, guide_key[own], guide_key, key_ids))
    if negative_keys is not None:
        sets.append(against(query, negative_keys, None, guide, guide_negatives, negative_ids))
    pos = (query * positive_key[own]).sum(1) / temperature.to(query.dtype)
    loss = -F.logsigmoid(pos - torch.logsumexp(torch.cat(sets, dim=1), dim=1))
    return reduce(loss, torch.tensor(n), reduction)


def reduce(loss: Tensor, count: Tensor, reduction: str) -> Tensor:
    loss = loss if loss.dtype == torch.float64 else loss.float()
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / count


def distillation(
    query: Tensor,
    passages: Tensor,
    group_size: int,
    temperature: Tensor,
    teacher_scores: Tensor,
    kind: str,
    *,
    normalize: bool = True,
    offset: int = 0,
) -> Tensor:
    """(N,) terms of `functional.grouped_info_nce` that a teacher adds ("kl_div") or that replace it ("m3_kd_loss")."""
    if normalize:
        query, passages = unit_rows(query), unit_rows(passages)
    logits = query @ passages.T / temperature.to(query.dtype).reshape(-1, 1)  # (N, M)
    own = (offset + torch.arange(len(query) * group_size, device=query.device)).view(-1, group_size)  # (N, G)
    weight = teacher_scores.softmax(1).to(logits.dtype)
    if kind == "kl_div":
        rows = -(weight * logits.gather(1, own).log_softmax(1)).sum(1)
    else:
        rows = logits.new_zeros(len(query))
        for k in range(group_size):
            rows = rows + weight[:, k] * F.cross_entropy(logits, own[:, k], reduction="none")
            logits = logits.scatter(1, own[:, k, None], -torch.inf)
    return rows if rows.dtype == torch.float64 else rows.float()
