"""One function per loss: validate, call the primitive, compose in O(N), reduce."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import contrast, reference, validation
from .contrast import Options
from .plan import Plan
from .problem import Problem, accumulator
from .row_loss import infonce


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
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """InfoNCE between queries and keys, without the N x M logits.

        loss_i = -log( exp(s_i,y) / (exp(s_i,y) + sum_j exp(s_ij)) ),    s_ij = cos(q_i, k_j) / t_i

    over the negatives j of row i. The first six arguments are those of `info_nce` of info-nce-pytorch 0.1.4, with its
    order, defaults and values.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        positive_key: (N, D), row i the positive of query i; with `target`, (M, D).
        negative_keys: explicit negatives, (M', D) if `negative_mode` is "unpaired", (N, H, D) if "paired". None: the
            other rows of `positive_key` are the negatives.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per row; gradients
            flow to tensors. Values of tensors are checked on a CPU; on a GPU a bad one gives NaN.
        reduction: "mean", "sum" or "none" (one value per query).
        negative_mode: "unpaired" (negatives shared by all queries) or "paired" (each query its own).
        symmetric: the mean of this loss and of that of the keys against the queries, as CLIP has it. Needs N = M and no
            `target`. Explicit negatives enter the query direction only; column j has the temperature of row j.
        normalize: divide every row by max(norm, 1e-12), as `torch.nn.functional.normalize`; else s_ij = q_i.k_j / t_i.
        in_batch_negatives: whether the other rows of `positive_key` are negatives too. None: only if there are no
            `negative_keys`.
        ignore_index: rows with this target count neither in the loss nor in the mean.
        target: (N,) integer indices of each query's positive in `positive_key`. None: row i.
        query_ids, key_ids, negative_ids: (N,), (M,) and, as `negative_keys` without its last dimension, integer ids.
            `key_ids` alone: a negative with the id of the row's positive is left out (a duplicate document). With
            `query_ids`: every negative with the id of its query is left out (labels). The positive is always kept.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 256 MiB elsewhere.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32. With no rows, or all ignored, "mean"
        is NaN and "sum" 0, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: van den Oord et al. 2018, arXiv:1807.03748; https://github.com/RElbers/info-nce-pytorch.
    """
    problem, options = _problem(
        query, positive_key, negative_keys, temperature, reduction, negative_mode, symmetric=symmetric,
        normalize=normalize, in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target,
        query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids, backend=backend,
        workspace_limit=workspace_limit,
    )  # fmt: skip
    if backend == "reference":
        return reference.info_nce(
            query, positive_key, negative_keys, problem.temperature, reduction, negative_mode, symmetric=symmetric,
            normalize=normalize, in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target,
            query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids,
        )  # fmt: skip
    return _reduced(problem, options, reduction, symmetric)


def nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """NT-Xent, SimCLR's loss: every row of both views against all other rows, its other view the positive.

        loss_i = -log( exp(s_i,p(i)) / sum_{j != i} exp(s_ij) ),    z = [view_a; view_b],  s_ij = cos(z_i, z_j) / t_i

    The scores are symmetric, so half of them are computed.

    Args:
        view_a, view_b: (N, D) each, row i of one the positive of row i of the other; dtypes as in `info_nce`.
        temperature: as in `info_nce`; per row it has (2N,) values, those of `view_a` first.
        reduction: "mean" over the 2N rows, "sum", or "none": (2N,), the rows of `view_a` first.
        normalize, backend, workspace_limit: as in `info_nce`.

    Returns and raises: as `info_nce`. Reference: Chen et al. 2020, arXiv:2002.05709.
    """
    validation.one_of("reduction", reduction, validation.REDUCTIONS)
    validation.one_of("backend", backend, validation.BACKENDS)
    if not validation.alike(view_a, view_b):
        validation.embeddings("view_a", view_a, 2, "(N, D)")
        validation.embeddings("view_b", view_b, 2, "(N, D)")
        validation.same_kind({"view_a": view_a, "view_b": view_b})
        if view_a.shape != view_b.shape:
            raise ValueError(f"view_b must have shape {tuple(view_a.shape)} as view_a has, got {tuple(view_b.shape)}")
    rows = torch.cat([view_a, view_b])
    n = rows.shape[0]
    t = validation.temperature(temperature, n, accumulator(contrast.compute_dtype([rows])), rows.device)
    options = _options(backend, workspace_limit, temperature, normalize)
    if backend == "reference":
        return reference.nt_xent(view_a, view_b, t, reduction, normalize=normalize)
    target = torch.arange(n, device=rows.device).roll(n // 2)
    problem = Problem(rows, rows, t, target, normalize=normalize, self_similar=True)
    return _reduced(problem, options, reduction, symmetric=False)


def explain(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    symmetric: bool = False,
    **options: Any,
) -> Plan:
    """How `info_nce` would compute this very call, and why: a `Plan`, which prints as a sentence. Computes nothing.

    Takes what `info_nce` takes, and raises what it raises. Whether inputs require gradients matters.
    """
    if options.get("backend") == "reference":
        raise ValueError("backend='reference' has no plan: it holds the dense matrices")
    problem, settings = _problem(
        query, positive_key, negative_keys, temperature, reduction, negative_mode, symmetric=symmetric, **options
    )
    return contrast.make_plan(problem, settings, reduced=reduction != "none" and problem.columns == symmetric)


def _problem(
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
    in_batch = validation.info_nce(
        query, positive_key, negative_keys, reduction, negative_mode, symmetric, in_batch_negatives, target, backend
    )
    n, m, device = query.shape[0], positive_key.shape[0], query.device
    ids = validation.all_ids(
        query_ids, key_ids, negative_ids, query, positive_key, negative_keys, in_batch or symmetric
    )
    index = None if target is None else validation.target(target, n, m, ignore_index, device)
    problem = Problem(
        query=query,
        key=positive_key,
        temperature=validation.temperature(temperature, n, accumulator(contrast.compute_dtype([query])), device),
        target=index,
        negatives=() if negative_keys is None else (negative_keys,),
        row_ids=_row_ids(ids[0], ids[1], index),
        key_ids=ids[1],
        negative_ids=() if negative_keys is None else (ids[2],),
        in_batch=in_batch,
        columns=symmetric and in_batch,
        normalize=normalize,
    )
    return problem, _options(backend, workspace_limit, temperature, normalize)


def _options(backend: str, workspace_limit: int | None, temperature: float | Tensor, normalize: bool) -> Options:
    lowest = validation.lowest_temperature(temperature) if normalize else None
    return Options(backend, validation.workspace_limit(workspace_limit), 1 / lowest if lowest else math.inf)


def _reduced(problem: Problem, options: Options, reduction: str, symmetric: bool) -> Tensor:
    """InfoNCE of a problem."""
    if reduction == "none":
        rows = _row_losses(problem, options, symmetric)
        return rows if problem.target is None else torch.where(problem.target == -1, 0, rows)
    weight, empty = _weights(problem, reduction)
    if symmetric and not problem.columns:  # the columns are a problem apart
        loss = (weight * _row_losses(problem, options, symmetric)).sum()
    else:
        loss = contrast.reduced_loss(problem, options, "infonce", weight)
    return loss if empty is None else torch.where(empty, torch.nan, loss)


def _weights(problem: Problem, reduction: str) -> tuple[Tensor, Tensor | None]:
    """What each row's loss is multiplied by, (1,) or (N,); and where rows may be none, whether a mean has no rows."""
    n = problem.query.shape[0]
    if problem.target is None or problem.self_similar:  # no row is ignored
        weight = problem.temperature.new_full((1,), 1 / max(n, 1) if reduction == "mean" else 1.0)
        return weight, weight[0] > 0 if reduction == "mean" and n == 0 else None
    valid = (problem.target != -1).to(problem.temperature.dtype)
    if reduction == "sum":
        return valid, None
    count = valid.sum()
    return valid / count.clamp_min(1), count == 0


def _row_losses(problem: Problem, options: Options, symmetric: bool) -> Tensor:
    """(N,) InfoNCE of every query, or its mean with that of every query's key."""
    stats = contrast.statistics(problem, options)
    rows = infonce(stats.neg - stats.pos)
    if not symmetric:
        return rows
    column_neg = stats.column_neg
    if column_neg is None:  # explicit negatives replaced the in-batch ones in the rows: the columns are a problem apart
        swapped = replace(
            problem,
            query=problem.key,
            key=problem.query,
            negatives=(),
            negative_ids=(),
            row_ids=problem.key_ids,
            key_ids=problem.row_ids if problem.key_ids is not None else None,
            in_batch=True,
        )
        column_neg = contrast.statistics(swapped, options).neg
    return (rows + infonce(column_neg - stats.pos)) / 2


def _row_ids(query_ids: Tensor | None, key_ids: Tensor | None, target: Tensor | None) -> Tensor | None:
    """The id whose negatives a row does not want: its query's, or for lack of one its positive's."""
    if query_ids is not None or key_ids is None or target is None:
        return key_ids if query_ids is None else query_ids
    return key_ids[target.clamp(0, len(key_ids) - 1)] if len(key_ids) else target
