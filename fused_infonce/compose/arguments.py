"""What the losses ask of the primitive: their arguments, checked, as a `Problem`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends.contract import Problem, accumulator
from ..contrast import Options
from .reduction import call_options


def of_keys(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    negative_mode: str,
    *,
    symmetric: bool,
    normalize: bool = True,
    in_batch_negatives: bool | None = None,
    ignore_index: int = -100,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> tuple[Problem, Options]:
    """The arguments of `info_nce`, checked, as the primitive takes them."""
    in_batch = checks.info_nce(
        query, positive_key, negative_keys, reduction, negative_mode, symmetric, in_batch_negatives, target, backend
    )
    n, m, device = query.shape[0], positive_key.shape[0], query.device
    ids = checks.all_ids(query_ids, key_ids, negative_ids, query, positive_key, negative_keys, in_batch or symmetric)
    index = None if target is None else checks.target(target, n, m, ignore_index, device)
    problem = Problem(
        query=query,
        key=positive_key,
        temperature=checks.temperature(temperature, n, accumulator(contrast.compute_dtype([query])), device),
        target=index,
        negatives=() if negative_keys is None else (negative_keys,),
        row_ids=_row_ids(ids[0], ids[1], index),
        key_ids=ids[1],
        negative_ids=() if negative_keys is None else (ids[2],),
        in_batch=in_batch,
        columns=symmetric and in_batch,
        normalize=normalize,
    )
    return problem, call_options(backend, workspace_limit, temperature, normalize)


def _row_ids(query_ids: Tensor | None, key_ids: Tensor | None, target: Tensor | None) -> Tensor | None:
    """The id whose negatives a row does not want: its query's, or for lack of one its positive's."""
    if query_ids is not None or key_ids is None or target is None:
        return key_ids if query_ids is None else query_ids
    return key_ids[target.clamp(0, len(key_ids) - 1)] if len(key_ids) else target


def of_views(
    view_a: Tensor,
    view_b: Tensor,
    temperature: float | Tensor,
    reduction: str,
    normalize: bool,
    backend: str,
    workspace_limit: int | None,
) -> tuple[Problem, Options]:
    """The rows of two views against those of all other samples, the other view of their own the positive."""
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    checks.one_of("backend", backend, checks.BACKENDS)
    rows, t = rows_of(checks.views(view_a, view_b, ()), temperature)
    target = torch.arange(len(rows), device=rows.device).roll(len(rows) // 2)
    problem = Problem(rows, rows, t, target, normalize=normalize, self_similar=True)
    return problem, call_options(backend, workspace_limit, temperature, normalize)


def rows_of(views: Sequence[Tensor], temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """(V N, D) rows of all views, those of the first one first, and the temperature of each or all."""
    with contrast.products(views[0].device.type):  # autocast would refuse rows of its other 16-bit dtype
        rows = torch.cat(list(views))
    acc = accumulator(contrast.compute_dtype([rows]))
    return rows, checks.temperature(temperature, rows.shape[0], acc, rows.device)
