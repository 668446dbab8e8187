"""Checks of a user's arguments, and the `Problem` and `Options` that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import checks
from ..backends import BackendName, Options, Reduction
from ..backends.contract import KeySet, Problem, Temperature
from ..backends.precision import statistics_dtype, without_autocast
from ..backends.views import TwoViews, other_views
from ..distributed import DistributedLike
from .biases import biases_of, by_index, with_margin

NegativeMode = Literal["unpaired", "paired"]
NAMES = ("positive_key", "symmetric", "negative_keys")  # of arguments that some functions call otherwise
NEGATIVE_MODES: tuple[NegativeMode, ...] = get_args(NegativeMode)


def call_options(
    backend: BackendName,
    workspace_limit: int | None,
    reduction: Reduction = "mean",
    distributed: DistributedLike = False,
) -> Options:
    """Return the options that every loss takes, checked."""
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    checks.one_of("backend", backend, checks.BACKENDS)
    limit = None if workspace_limit is None else checks.workspace_limit(workspace_limit)
    return Options(backend, limit, reduction, distributed or None)


def temperature_of(value: float | Tensor, rows: Tensor, name: str = "temperature") -> Temperature:
    """Return the temperature of these rows, checked, in the dtype of their statistics."""
    return checks.temperature(value, rows, statistics_dtype(rows), name)


def of_keys(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None, temperature: float | Tensor, negative_mode: str,
    *, symmetric: bool, normalize: bool = True, in_batch_negatives: bool | None = None, ignore_index: int = -100,
    target: Tensor | None = None, query_ids: Tensor | None = None, key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None, key_bias: Tensor | None = None, negative_bias: Tensor | None = None,
    positive_bias: bool = True, negative_mask: Tensor | None = None, negative_index: Tensor | None = None,
    margin: float = 0.0,
    names: tuple[str, str, str] = NAMES,
) -> Problem:  # fmt: skip
    """Return the problem of queries against keys: the arguments of `info_nce`, checked.

    names: of the arguments in NAMES where the user's function calls them otherwise.
    """
    if (
        negative_mode == "unpaired" and negative_keys is None and in_batch_negatives is None and target is None
        and query_ids is None and key_ids is None and negative_ids is None and key_bias is None
        and negative_bias is None and positive_bias is True and negative_mask is None and negative_index is None
        and margin == 0 and checks.alike(query, positive_key)
    ):  # fmt: skip
        t = temperature_of(temperature, query)  # the usual case: of pairs alone there is nothing more to check
        return of_pairs(query, positive_key, t, symmetric, normalize)
    if negative_index is not None:
        _check_table(negative_keys, negative_mode)
    in_batch = _check_embeddings(
        query, positive_key, negative_keys, negative_mode, symmetric, in_batch_negatives, target, names
    )  # fmt: skip
    index = None if target is None else checks.target(target, query, positive_key.shape[0], ignore_index)
    ids = all_ids(query_ids, key_ids, negative_ids, query, positive_key, negative_keys, in_batch or symmetric, True)
    biases = biases_of(
        key_bias, negative_bias, positive_bias, query, positive_key, negative_keys, index, in_batch, symmetric,
        negative_mask,
    )  # fmt: skip
    keys = [KeySet(positive_key, ids[1], bias=biases.key)]
    if negative_keys is not None:
        own, bias = None, biases.negative
        if negative_index is not None:
            own = checks.negative_index(negative_index, query, negative_keys)
            bias = by_index(bias, own)
        keys.append(KeySet(negative_keys, ids[2], bias=bias, indices=own))
    t = temperature_of(temperature, query)
    offset = with_margin(biases.offset, margin, t, query.shape[0], symmetric)
    return Problem(
        KeySet(query, _row_ids(ids[0], ids[1], index)), tuple(keys), t, index, offset=offset,
        in_batch=in_batch, columns=symmetric, normalize=normalize, bias_bound=biases.bound,
    )  # fmt: skip


def of_pairs(query: Tensor, key: Tensor, t: Temperature, columns: bool, normalize: bool) -> Problem:
    """Return the problem of queries against the keys of all pairs."""
    return Problem(KeySet(query), (KeySet(key),), t, columns=columns, normalize=normalize)


def _check_table(negative_keys: Any, negative_mode: str) -> None:
    """Check that there is a table for a `negative_index` to look up."""
    if negative_keys is None:
        raise ValueError("negative_index are places in negative_keys, which were not given")
    if negative_mode == "paired":
        raise ValueError(
            "negative_index gives each query its own rows of negative_keys (M, D): it cannot be used with "
            "negative_mode='paired'"
        )
    if isinstance(negative_keys, Tensor) and negative_keys.dim() != 2:
        raise ValueError(
            f"negative_keys must have 2 dimensions (M, D) with negative_index, got shape {tuple(negative_keys.shape)}"
        )


def _row_ids(query_ids: Tensor | None, key_ids: Tensor | None, target: Tensor | None) -> Tensor | None:
    """Return the id of each row, whose negatives of that id are left out: its query's, or else its positive's."""
    if query_ids is not None or key_ids is None or target is None:
        return key_ids if query_ids is None else query_ids
    if not len(key_ids):
        return key_ids.new_zeros(len(target), *key_ids.shape[1:])
    return key_ids[target.clamp(0, len(key_ids) - 1)]


def _check_embeddings(
    query: Any, positive_key: Any, negative_keys: Any, negative_mode: str, symmetric: bool,
    in_batch_negatives: bool | None, target: Any, names: tuple[str, str, str],
) -> bool:  # fmt: skip
    """Check the modes and embeddings of `info_nce`; return whether in-batch keys are negatives."""
    checks.one_of("negative_mode", negative_mode, NEGATIVE_MODES)
    key_embeddings(query, positive_key, negative_keys, negative_mode, target is not None, names)
    if symmetric and target is not None:
        raise ValueError(f"{names[1]}=True pairs query i with key i: it cannot be used with target")
    if in_batch_negatives is False and negative_keys is None:
        raise ValueError("in_batch_negatives=False leaves no negatives: pass negative_keys")
    return negative_keys is None if in_batch_negatives is None else bool(in_batch_negatives)


def key_embeddings(
    query: Any, positive_key: Any, negative_keys: Any, negative_mode: str, targets: bool,
    names: tuple[str, str, str] = NAMES,
) -> None:  # fmt: skip
    """Check (N, D) queries, their keys and negatives.

    targets: whether a target says which key is a query's, so that keys need not be as many as queries.
    """
    key_name, _, negative_name = names
    checks.embeddings("query", query, 2, "(N, D)")
    checks.embeddings(key_name, positive_key, 2, "(N, D)")
    tensors = {"query": query, key_name: positive_key}
    if negative_keys is not None:
        paired = negative_mode == "paired"
        given = negative_keys.dim() if isinstance(negative_keys, Tensor) else 0
        if given == 5 - (3 if paired else 2):
            other = "unpaired" if paired else "paired"
            raise ValueError(
                f"{negative_name} must have {3 if paired else 2} dimensions with negative_mode={negative_mode!r}, got "
                f"shape {tuple(negative_keys.shape)}: it is for negative_mode={other!r}"
            )
        checks.embeddings(negative_name, negative_keys, 3 if paired else 2, "(N, H, D)" if paired else "(M, D)")
        if paired and len(negative_keys) != len(query):
            raise ValueError(
                f"paired {negative_name} must have {len(query)} rows as query has, got {len(negative_keys)}"
            )
        tensors[negative_name] = negative_keys
    if not targets and positive_key.shape[0] != query.shape[0]:
        raise ValueError(
            f"{key_name} must have {len(query)} rows as query has (or pass target), got {len(positive_key)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name} must have {query.shape[-1]} components as query has, got {tensor.shape[-1]}")
    checks.same_kind(tensors)


def all_ids(
    query_ids: Any, key_ids: Any, negative_ids: Any, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None,
    keys_are_negatives: bool, several: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the ids of queries, keys and negatives, checked; `several`: a row may have more than one."""
    if query_ids is None and key_ids is None and negative_ids is None:
        return None, None, None
    if query_ids is not None and key_ids is None and negative_ids is None:
        raise ValueError("query_ids alone compare with nothing: pass key_ids or negative_ids too")
    if negative_ids is not None and negative_keys is None:
        raise ValueError("negative_ids are the ids of negative_keys, which were not given")
    if negative_ids is not None and query_ids is None and key_ids is None:
        raise ValueError("negative_ids alone compare with nothing: pass key_ids or query_ids too")
    if key_ids is not None and negative_ids is None and not keys_are_negatives:
        raise ValueError(
            "key_ids have no effect where negative_keys replace the in-batch negatives without negative_ids"
        )
    given = {"query_ids": (query_ids, query), "key_ids": (key_ids, positive_key)}
    if negative_keys is not None:
        given["negative_ids"] = negative_ids, negative_keys
    found = {
        name: checks.ids(name, ids, tuple(rows.shape[:-1]), query.device, several=several)
        for name, (ids, rows) in given.items()
        if ids is not None
    }
    counts = {name: ids.shape[-1] if ids.dim() == given[name][1].dim() else 1 for name, ids in found.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"all rows must have the same number of ids, got {counts}")
    for name, ids in found.items():
        if counts[name] == 1 and ids.dim() == given[name][1].dim():
            found[name] = ids[..., 0].contiguous()
    return found.get("query_ids"), found.get("key_ids"), found.get("negative_ids")


def of_views(view_a: Tensor, view_b: Tensor, temperature: float | Tensor, normalize: bool) -> Problem:
    """Return the problem of the rows of two views against all others, where the other view is the positive."""
    rows = stacked(views(view_a, view_b, ()))
    return of_stacked(rows, temperature_of(temperature, rows), normalize)


def of_stacked(rows: Tensor, t: Temperature, normalize: bool) -> Problem:
    """Return the problem of two views' rows, one view's after the other's, against all others."""
    same = KeySet(rows)
    if torch.compiler.is_compiling():
        target = other_views(rows)
        return Problem(same, (same,), t, target, normalize=normalize, self_similar=True, two_views=True)
    return TwoViews(same, (same,), t, normalize=normalize, self_similar=True, two_views=True)


def stacked(views: Sequence[Tensor]) -> Tensor:
    """Return the (V N, D) rows of all views, one view after another."""
    with without_autocast(views[0].device.type):  # autocast refuses rows of another 16-bit dtype than its own
        return torch.cat(list(views))


def views(view_a: Any, view_b: Any, more_views: Any) -> list[Tensor]:
    """Return two or more views of a batch, (N, D) each, checked to be alike."""
    if more_views == () and checks.alike(view_a, view_b):
        return [view_a, view_b]
    if isinstance(more_views, Tensor) or not isinstance(more_views, Sequence):
        raise TypeError(f"more_views must be a sequence of tensors of shape (N, D), got {type(more_views).__name__}")
    named = {"view_a": view_a, "view_b": view_b} | {f"more_views[{i}]": view for i, view in enumerate(more_views)}
    if not all(checks.alike(view_a, view) for view in named.values()):
        for name, view in named.items():
            checks.embeddings(name, view, 2, "(N, D)")
        checks.same_kind(named)
        for name, view in named.items():
            if view.shape != view_a.shape:
                raise ValueError(f"{name} must have shape {tuple(view_a.shape)} as view_a has, got {tuple(view.shape)}")
    return list(named.values())
