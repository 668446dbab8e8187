"""A bias a key: what is added to the logits of keys, as negatives and as positives, from a user's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.contract import Temperature, largest_bias
from ..backends.indexing import take_rows
from ..backends.precision import statistics_dtype


class Biases(NamedTuple):
    """The biases of a call, in the dtype of the statistics.

    key, negative: of the rows of these sets as negatives; query: of the queries, where they are negatives of keys
    offset, bound: as in `Problem`
    """

    key: Tensor | None = None
    negative: Tensor | None = None
    offset: Tensor | None = None
    bound: float | None = None
    query: Tensor | None = None


NONE = Biases(bound=0.0)


def biases_of(
    key_bias: Any, negative_bias: Any, positive_bias: Any, query: Tensor, positive_key: Tensor,
    negative_keys: Tensor | None, target: Tensor | None, in_batch: bool, symmetric: bool = False,
    negative_mask: Any = None,
) -> Biases:  # fmt: skip
    """Return the biases of queries against keys, checked.

    target: as in `Problem`. in_batch: whether the keys are negatives. symmetric: whether there is the direction of the
        keys against the queries too, which have no biases. negative_mask: where paired negatives are there.
    """
    checks.flags(positive_bias=positive_bias)
    if key_bias is None and not positive_bias:
        raise ValueError("positive_bias=False takes the positives' biases away: it needs key_bias")
    if key_bias is None and negative_bias is None and negative_mask is None:
        return NONE
    if negative_bias is not None and negative_keys is None:
        raise ValueError("negative_bias are the biases of negative_keys, which were not given")
    if key_bias is not None and not in_batch and not positive_bias:
        raise ValueError(
            "key_bias has no effect where negative_keys replace the in-batch negatives and positive_bias=False"
        )
    key = negative = offset = None
    if key_bias is not None:
        key = checks.bias("key_bias", key_bias, tuple(positive_key.shape[:1]), query)
        if positive_bias:
            offset = offset_of("key_bias", key, target)
            offset = torch.stack([offset, torch.zeros_like(offset)]) if symmetric else offset
    if negative_bias is not None and negative_keys is not None:
        negative = checks.bias("negative_bias", negative_bias, tuple(negative_keys.shape[:-1]), query)
    if negative_mask is not None:
        there = checks.mask("negative_mask", negative_mask, _paired(negative_keys), query.device)
        zero = torch.zeros((), dtype=statistics_dtype(query), device=query.device)
        negative = torch.where(there, zero if negative is None else negative, -math.inf)
    return Biases(key if in_batch else None, negative, offset, bound_of(key, negative))


def _paired(negative_keys: Tensor | None) -> tuple[int, ...]:
    """Return the shape of a mask of these negatives."""
    if negative_keys is None or negative_keys.dim() != 3:
        raise ValueError("negative_mask says which paired negative_keys are there: it needs negative_mode='paired'")
    return tuple(negative_keys.shape[:-1])


def by_index(bias: Tensor | None, index: Tensor) -> Tensor | None:
    """Return the biases (N, H) of the rows of a table at these places; of any value where there is no row."""
    if bias is None or not len(bias):
        return None
    return take_rows(bias, index.clamp(0, len(bias) - 1).flatten()).view(index.shape)


def with_margin(offset: Tensor | None, margin: Any, temperature: Temperature, n: int, symmetric: bool) -> Tensor | None:
    """Return what is added to the logits of the targets with -margin / t, for both directions where `symmetric`."""
    if margin == 0:
        return offset
    size = (2, n) if symmetric else (n,)
    less = (checks.not_negative("margin", margin) / temperature.values).expand(size).contiguous()
    return -less if offset is None else offset - less


def of_columns(key_bias: Any, positive_bias: Any, query: Tensor, columns: Sequence[Tensor], own: slice) -> Biases:
    """Return the biases (1 + H, M) of as many columns of keys, of which rows `own` of the first are the positives."""
    checks.flags(positive_bias=positive_bias)
    if key_bias is None:
        if not positive_bias:
            raise ValueError("positive_bias=False takes the positives' biases away: it needs key_bias")
        return NONE
    bias = checks.bias("key_bias", key_bias, (len(columns), len(columns[0])), query)
    offset = offset_of("key_bias", bias[0, own], None) if positive_bias else None
    return Biases(bias[0], bias[1:].flatten() if len(columns) > 1 else None, offset, bound_of(bias))


def of_two_sides(named: dict[str, Any], positive_bias: Any, like: Tensor) -> Biases:
    """Return the biases of the rows of two sides, each of which is scored against the other, checked.

    named: the biases of the queries' side and of the keys', by the names of their arguments.
    """
    checks.flags(positive_bias=positive_bias)
    given = [name for name, value in named.items() if value is not None]
    if not given and not positive_bias:
        raise ValueError(f"positive_bias=False takes the positives' biases away: it needs {' or '.join(named)}")
    if not given:
        return NONE
    query, key = (
        None if value is None else checks.bias(name, value, tuple(like.shape[:1]), like)
        for name, value in named.items()
    )
    there = [x for x in (key, query) if x is not None]
    offset = None
    if positive_bias:
        names = reversed(list(named))  # the rows' positives are keys
        of_sides = zip(names, (key, query), strict=True)
        offset = torch.stack([torch.zeros_like(there[0]) if x is None else offset_of(n, x, None) for n, x in of_sides])
    return Biases(key, offset=offset, bound=bound_of(*there), query=query)


def offset_of(name: str, bias: Tensor, target: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """Return the biases of the rows' targets, (N,), 0 of a row without one.

    A target that is left out is an error where that is free to read, else NaN. rows: (N,) the rows that targets are of,
    where a row may have several.
    """
    offset = bias
    if target is not None:
        last = bias.shape[0] - 1
        offset = take_rows(bias, target.clamp(0, last)) if last >= 0 else bias.new_zeros(target.shape[0])
        offset = torch.where(target == -1, 0, offset)
    left_out = offset == -math.inf
    if not checks.values_are_free(offset):
        return torch.where(left_out, math.nan, offset)
    if left_out.any():
        first = left_out.nonzero()[0]
        row = (first if rows is None else rows[first]).item()
        raise ValueError(
            f"{name} must not be -inf for a row's positive (or pass positive_bias=False, where that is an option), got "
            f"row {row}'s"
        )
    return offset


def bound_of(*biases: Tensor | None) -> float | None:
    """Return a bound on the size of all biases but -inf; None where it is not free to read."""
    there = [x for x in biases if x is not None]
    if not there:
        return 0.0
    return largest_bias(there) if all(map(checks.values_are_free, there)) else None
