"""Guided InfoNCE with the scores of the rows and of their guide in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import per_row, reduce, unit_rows

TIE = 1e-14  # cosines that differ by their rounding in float64 are equal


def guided_info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.01,
    reduction: str = "mean", negative_mode: str = "unpaired", *, guide_query: Tensor | None = None,
    guide_key: Tensor | None = None, guide_negatives: Tensor | None = None, key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None, margin: float = 0.0, margin_strategy: str = "absolute",
    spare_negatives: bool = False, contrast_queries: bool = False, contrast_keys: bool = False, offset: int = 0,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Return InfoNCE over the negatives whose guide is at most as similar to the query's as the positive's, and margin.

    `negative_mode` is what the dimensions of `negative_keys` say.
    """
    n, own = len(query), slice(offset, offset + len(query))
    if guide_query is None or guide_key is None:
        guide_query, guide_key, guide_negatives = query, positive_key, negative_keys
    guides = (guide_query, guide_key, guide_negatives)
    g_query, g_key, g_negatives = (None if g is None else unit_rows(g.detach()) for g in guides)
    if normalize:
        query, positive_key = unit_rows(query), unit_rows(positive_key)
        negative_keys = None if negative_keys is None else unit_rows(negative_keys)
    positive = (g_query * g_key[own]).sum(1)
    ceiling = positive + (margin * positive.abs() if margin_strategy == "relative" else margin) + TIE
    row_ids = None if key_ids is None else key_ids[own]
    t, row = per_row(temperature, query, n), torch.arange(n, device=query.device)

    def against(x: Tensor, y: Tensor, g: Tensor, h: Tensor | None, first: int | None, ids: Tensor | None) -> Tensor:
        """Return logits of x and y, -inf at row `first + i` of y, at the id of row i, and where the guide says so."""
        paired = "nd,nhd->nh" if y.dim() == 3 else "nd,md->nm"
        logits = torch.einsum(paired, x, y) / t[:, None]
        out = torch.zeros_like(logits, dtype=torch.bool)
        if first is not None:
            out[row, first + row] = True
        if ids is not None and row_ids is not None:
            out |= row_ids[:, None] == ids
        if h is not None:
            out |= torch.einsum(paired, g, h) > ceiling[:, None]
        return logits.masked_fill(out, -torch.inf)

    sets = [against(query, positive_key, g_query, g_key, offset, key_ids)]
    if contrast_queries:
        sets.append(against(query, query, g_query, g_query, 0, row_ids))
    if contrast_keys:
        sets.append(against(positive_key[own], positive_key, g_key[own], g_key, offset, key_ids))
    if negative_keys is not None:
        guide = None if spare_negatives else g_negatives
        sets.append(against(query, negative_keys, g_query, guide, None, negative_ids))
    pos = (query * positive_key[own]).sum(1) / t
    return reduce(-F.logsigmoid(pos - torch.logsumexp(torch.cat(sets, dim=1), dim=1)), reduction)
