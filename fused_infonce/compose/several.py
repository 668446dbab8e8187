"""Several positives a row: all of them are left out of the negatives, and their logits are made pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import Options
from ..backends.contract import KeySet, Problem, RowStatistics
from ..backends.indexing import add_rows, take_rows
from ..backends.precision import without_autocast
from ..backends.row_losses import infonce
from .across import blocked, of_all
from .biases import offset_of
from .positives import equal_pairs, members, pair_margins
from .reduction import reduced_rows
from .rows import dots, log_add, unit
from .sums import pair_dots

PositivesMode = Literal["each", "all", "any"]
POSITIVES: tuple[PositivesMode, ...] = get_args(PositivesMode)


class Several(NamedTuple):
    """The positives of a call, of which a row may have any number.

    target: (N,) the first of each row's, -1 for none; None: key i
    rows, keys: (K,) the pairs, in the order of the rows
    weight: (K,) how much each counts beside its row's others, 0 of a pair that is none, NaN of a target out of range
    ids: of queries and keys, (N, P) and (M, P); a key is left out of a row's negatives where any agrees
    """

    target: Tensor | None
    rows: Tensor
    keys: Tensor
    weight: Tensor
    ids: tuple[Tensor, Tensor]
    named: bool = False  # whether ids are the user's, and mean the same on all ranks


def by_target(target: Any, weight: Any, query: Tensor, keys: int, ignore_index: int, dtype: torch.dtype) -> Several:
    """Return the positives that a (N, P) target names, checked, padded with `ignore_index`."""
    n, p = target.shape
    index = checks.target(target, query, keys, ignore_index, several=True)
    there = (index >= 0).to(dtype)
    share = there if weight is None else there * checks.positive_weight(weight, (n, p), query).to(dtype)
    if not (keys and p):  # no row has any
        columns = max(p, 1)  # as on other ranks, which may have keys
        nobody, none = index.new_full((n, columns), -1), index.new_zeros(0)
        return Several(nobody[:, 0], none, none, share.flatten()[:0], (nobody, index.new_zeros(keys, columns)))
    share = share.masked_fill(index == keys, torch.nan)  # out of range, where values are not read
    counts = share != 0
    first = index.gather(1, counts.to(torch.int8).argmax(1, keepdim=True))[:, 0]
    rows, names = (torch.arange(count, device=index.device) for count in (n, keys))
    return Several(
        torch.where(counts.any(1), first, -1), rows.repeat_interleave(p, output_size=n * p),
        index.clamp(0, keys - 1).flatten(), share.flatten(), (index, names[:, None].expand(keys, p)),
    )  # fmt: skip


def by_ids(ids: Any, query: Tensor, key: Tensor, paired: bool, dtype: torch.dtype) -> Several:
    """Return the keys of each query's id as its positives, checked; paired: query i and key i have one id.

    How many pairs there are is read, which on a GPU is a synchronisation.
    """
    if isinstance(ids, tuple) and len(ids) != 2:
        raise ValueError(f"positive_ids must be one tensor, or two of the queries and the keys, got {len(ids)}")
    of_rows, of_keys = ids if isinstance(ids, tuple) else (ids, ids)
    of_rows = checks.ids("positive_ids", of_rows, (query.shape[0],), query.device)
    of_keys = checks.ids("positive_ids", of_keys, (key.shape[0],), query.device)
    rows, keys = equal_pairs(of_rows, of_keys)
    target = None if paired else _first(of_rows, of_keys)
    share = torch.ones(rows.shape, dtype=dtype, device=query.device)
    return Several(target, rows, keys, share, (of_rows[:, None], of_keys[:, None]), named=True)


def _first(of_rows: Tensor, of_keys: Tensor) -> Tensor:
    """Return the first key of each row's id, -1 for none."""
    order, first, count = members(of_rows, of_keys)
    last = max(order.shape[0] - 1, 0)
    return torch.where(count > 0, take_rows(order, first.clamp(0, last)), -1) if len(order) else count - 1


def without_positives(problem: Problem, several: Several) -> Problem:
    """Return the problem whose negatives are without the positives, besides what ids leave out."""
    query, (key, *others) = problem.query, problem.keys
    own, names = several.ids
    if query.ids is not None and key.ids is None:
        key = key._replace(ids=_of_no_row(query.ids, key.rows))
    more = []
    for keys in others:
        absent = None if keys.ids is None else _of_no_row(own, keys.rows)
        more.append(keys if absent is None else keys._replace(ids=_beside(absent, keys)))
    query, key = query._replace(ids=_beside(own, query)), key._replace(ids=_beside(names, key))
    return replace(problem, query=query, keys=(key, *more))


def _of_no_row(ids: Tensor, rows: Tensor) -> Tensor:
    """Return ids of these rows, as many as `ids` of queries are a row, that agree with none of them."""
    nobody = ids.amin() - 1 if ids.numel() else ids.new_zeros(())
    return nobody.expand(*rows.shape[:-1], *ids.shape[1:])


def _beside(ids: Tensor, keys: KeySet) -> Tensor:
    """Return ids (..., P) of the rows of a set, with those that they have after them."""
    if keys.ids is None:
        return ids.contiguous()
    had = keys.ids if keys.ids.dim() == ids.dim() else keys.ids[..., None]
    return torch.cat([ids, had], -1)


def several_reduced(
    problem: Problem, options: Options, several: Several, mode: PositivesMode, weight: Tensor | None,
    margin: float = 0.0, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return InfoNCE of rows with several positives, reduced; with `problem.columns` the mean of both directions.

    margin: what each positive's cosine is less by. bias: (M,), added to the logits of keys where they are positives
    """
    if bias is not None:
        offset_of("key_bias", bias, torch.where(several.weight == 0, -1, several.keys), several.rows)
    if options.call is not None and not several.named:
        several = several._replace(ids=tuple(map(options.call.unique, several.ids)))
    problem, context = blocked(without_positives(problem, several), options)
    rows, columns, target = _pairs(problem, several, options)
    problem = problem if target is None else replace(problem, target=target)
    with context:
        added = None if bias is None else take_rows(of_all(bias, options), rows[1])
        losses: list[Tensor] = []
        for block_of in problem.blocks():
            block = block_of()
            both = contrast.statistics(block, options) if block.columns else [None]
            for each, stats in zip(block.directions(), both, strict=True):
                pairs = columns if losses else rows
                assert pairs is not None
                losses.append(_of_direction(each, stats, pairs, mode, options, margin, None if losses else added))
    return reduced_rows(losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2, problem, options, weight)


Pairs = tuple[Tensor, Tensor, Tensor]  # rows, keys and weights of pairs, as in `Several`


def _pairs(problem: Problem, several: Several, options: Options) -> tuple[Pairs, Pairs | None, Tensor | None]:
    """Return the pairs of this rank's rows with keys of all ranks, those of its columns, and the rows' first keys.

    The last two are None where there is no such direction, or the problem has its targets already.
    """
    rows, keys, share = several.rows, several.keys, several.weight
    if options.call is None:
        return (rows, keys, share), (keys, rows, share), None
    if not several.named:
        return (rows, keys + options.call.start(options.call.keys), share), None, None
    of_rows, of_keys = (ids[:, 0] for ids in several.ids)
    every = of_all(of_keys, options)
    rows, keys = equal_pairs(of_rows, every)
    pairs = rows, keys, share.new_ones(rows.shape)
    return pairs, pairs, None if several.target is None else _first(of_rows, every)  # of one id a pair, both alike


def _of_direction(
    problem: Problem, stats: RowStatistics | None, pairs: Pairs, mode: PositivesMode, options: Options, margin: float,
    added: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the losses of rows; added: (K,) to the logits of the pairs, of which one of -inf is an error, here NaN.

    stats: those of the rows, where they have been made with others'.
    """
    rows, keys, share = pairs
    device, t = problem.query.rows.device.type, problem.temperature.values
    with without_autocast(device):
        problem, pos = _logits(problem, rows, keys, options)
    neg = (contrast.statistics(problem, options).rows if stats is None else stats).neg
    with without_autocast(device):
        if margin:
            pos = pos - take_rows((margin / t).expand(len(neg)), rows)
        if added is not None:
            pos = pos + added.masked_fill(added == -torch.inf, torch.nan)
        return of_rows(neg, pos, rows, share, mode)


def _logits(problem: Problem, rows: Tensor, keys: Tensor, options: Options) -> tuple[Problem, Tensor]:
    """Return the problem to go on with, and the logits (K,) of pairs of rows and keys."""
    query, key, t = problem.query, problem.keys[0], problem.temperature.values
    x = unit(query.rows, problem.normalize, t.dtype) / t[:, None]
    if problem.handles and problem.handles[1] is not None:
        return pair_dots(problem, x, rows, keys, options.limit(x.device))
    return problem, _pair_dots(x, unit(key.rows, problem.normalize and key.norm is None, t.dtype), rows, keys, options)


def _pair_dots(x: Tensor, y: Tensor, rows: Tensor, keys: Tensor, options: Options) -> Tensor:
    if options.backend == "reference":  # to be differentiated any number of times
        return dots(take_rows(x, rows), take_rows(y, keys))
    return -pair_margins(x.new_zeros(x.shape[0]), x, y, rows, keys, options.workspace_limit)


def of_rows(neg: Tensor, pos: Tensor, rows: Tensor, weight: Tensor, mode: PositivesMode) -> Tensor:
    """Return (N,) losses of rows from their negatives and the logits (K,) of the pairs with their positives.

    S_i = log sum_p exp(pos_ip), over the row's positives p, and w_ip their weights, which sum to 1:

        each    sum_p w_ip log(1 + exp(neg_i - pos_ip))
        all     sum_p w_ip (log(exp(neg_i) + exp(S_i)) - pos_ip)
        any     log(1 + exp(neg_i - S_i))
    """
    n, none = neg.shape[0], weight == 0
    pos = (pos + 0 * weight).masked_fill(none, 0)  # a weight of NaN is of a target out of range
    if mode == "each":
        return _shared(infonce(take_rows(neg, rows) - pos), rows, weight, n)
    top = pos.new_full((n,), -torch.inf).scatter_reduce(0, rows, pos.detach().masked_fill(none, -torch.inf), "amax")
    top = torch.where(top == -torch.inf, 0, top)
    total = add_rows(pos.new_zeros(n), rows, torch.exp(pos - take_rows(top, rows)).masked_fill(none, 0))
    empty = total == 0
    every = (top + torch.log(torch.where(empty, 1, total))).masked_fill(empty, 0)
    if mode == "any":
        return infonce(torch.where(empty, 0, neg - every)).masked_fill(empty, 0)
    count = add_rows(pos.new_zeros(n), rows, (~none).to(pos.dtype))
    alone = take_rows(count, rows) == 1  # the difference below would lose a small loss to rounding
    one = infonce(take_rows(neg, rows) - pos)
    return _shared(torch.where(alone, one, take_rows(log_add(neg, every), rows) - pos), rows, weight, n)


def _shared(losses: Tensor, rows: Tensor, weight: Tensor, n: int) -> Tensor:
    """Return the weighted mean of the losses of each row's pairs, 0 for a row without any."""
    total = add_rows(losses.new_zeros(n), rows, weight)
    share = weight / take_rows(torch.where(total == 0, 1, total), rows)
    return add_rows(losses.new_zeros(n), rows, torch.where(share == 0, 0, share * losses))


def check_several(
    target: Any, positive_ids: Any, positive_weight: Any, positives: str, symmetric: bool, others: Sequence[str]
) -> None:
    """Check how the arguments that name several positives go together; others: options that do not go with them."""
    checks.one_of("positives", positives, POSITIVES)
    if target is not None and positive_ids is not None:
        raise ValueError("target and positive_ids both say what the positives are: pass one of them")
    if positive_weight is not None and (target is None or positive_ids is not None):
        raise ValueError("positive_weight are the weights of a (N, P) target's positives: it needs such a target")
    if positive_weight is not None and positives == "any":
        raise ValueError("positives='any' takes the positives together: it has no positive_weight")
    if symmetric and isinstance(positive_ids, tuple):
        raise ValueError("symmetric=True pairs query i with key i, which then have one id: positive_ids is one tensor")
    if others:
        raise ValueError(f"several positives cannot be used with {' or '.join(others)}")
