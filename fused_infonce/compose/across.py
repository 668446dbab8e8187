"""A call's problem over the rows of all ranks: this rank's queries against the keys of all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, contrast
from ..backends import Options
from ..backends.contract import Backend, KeySet, Problem, Statistics, Temperature
from ..backends.precision import accumulator, all_wide, product_dtype
from ..backends.recording import recordings
from ..backends.registry import resolve
from ..backends.rows import as_held, is_its_guide
from ..distributed import Call, block
from ..distributed.exchange import Exchange, exchange_of
from ..distributed.gather import gather, handle
from .biases import bound_of
from .rows import Later, widened


class Met(NamedTuple):
    """The ranks' numbers of rows, once all have come to one call: of the queries, of the first set of keys, and of the
    others that are gathered, with their places among `Problem.keys`."""

    queries: list[int]
    keys: list[int]
    places: list[int]
    others: list[list[int]]


def meet(problem: Problem, options: Options, alike: Collection[int] = ()) -> Met:
    """Wait for the ranks to come to this call, and return how many rows each has; an error of one is one of all.

    alike: as in `across`.
    """
    call: Call = options.call
    places = [place for place, keys in enumerate(problem.keys[1:], 1) if not keys.is_paired() and place not in alike]
    sets = [problem.query, problem.keys[0], *(problem.keys[place] for place in places)]
    call.noted += "".join(f" {len(problem.keys[place].rows)} rows that all ranks have;" for place in alike)
    queries, keys, *others = call.counts(
        _signature(problem, options), _value(problem.temperature), [len(keys.rows) for keys in sets],
        options.limit(problem.query.rows.device), _backend(problem, options).takes_unit_rows,
    )  # fmt: skip
    call.keys = keys
    return Met(queries, keys, places, others)


def across(
    problem: Problem, options: Options, alike: Collection[int] = (), met: Met | None = None, reused: bool = False
) -> tuple[Problem, AbstractContextManager[Any]]:
    """Return the problem of this rank's rows against those of all ranks, and the context of its products.

    Keys that all queries of this rank share are gathered, in rank order, with their ids, guides and biases; a query's
    own stay where they are. Without ranks the problem is returned as it is.

    Rows come as the backend holds them: 16-bit ones as they are, and others, where it takes them, as unit rows. A
    handle stands for them in the graph. The queries of all ranks, which the direction of `columns` is of, come when it
    is asked for, so that their gradients are on their way before those of the keys are made.

    alike: places among `problem.keys` of sets that are the same on all ranks, such as a queue. met: what `meet`
        returned for this problem, if the ranks have met. reused: whether this rank's rows take part in the loss beside
        this problem too, so that their 16-bit gradients are to be added in float32.
    """
    call: Call | None = options.call
    if call is None:
        return problem, nullcontext()
    met = met or meet(problem, options, alike)
    way = _Way.of(problem, options)
    once = way.lean and not reused and not problem.columns and not problem.self_similar
    problem, context = (problem, nullcontext()) if once or way.wire is None else widened(problem)
    return _placed(problem, options, met, way), context


def counted(problem: Problem, options: Options, met: Met) -> Problem:
    """Return the problem of this rank's rows against keys of all ranks that have ids and no components, from which the
    numbers of negatives are known."""
    return _placed(problem, options, met, _Way(None, lean=False, empty=True))


def _placed(problem: Problem, options: Options, met: Met, way: _Way) -> Problem:
    """Return the problem of this rank's rows against those of all ranks, among which its own have their places."""
    call: Call = options.call
    of_queries, of_keys, wanted, of_others = met
    first, meets_first = problem.keys[0], problem.in_batch
    sets = [(problem.keys[place], each) for place, each in zip(wanted, of_others, strict=True)]
    if meets_first:
        sets.append((first, of_keys))
    found = _gathered(sets, problem, options, way)
    keys = list(problem.keys)
    handles: list[Tensor | None] = [None] * len(problem.sets)
    for place in [*wanted, 0][: len(found)]:
        keys[place], handles[1 + place] = found.pop(0)
    query, target = problem.query, problem.target
    if meets_first:
        start = call.start(of_keys)
        target = _shifted(problem, start, len(first.rows), sum(of_keys))
        if problem.self_similar:  # a row has the id of its place, so that it is not its own negative
            every = torch.arange(sum(of_keys), device=query.rows.device)
            keys[0] = keys[0]._replace(ids=every)
            query = query._replace(ids=every[start : start + len(query.rows)])
    opposite = None
    if problem.columns:
        opposite = Later(partial(_opposite, problem.swapped(), of_queries, options, way))
    return replace(
        problem, query=query, keys=tuple(keys), target=target, self_similar=False, two_views=False, opposite=opposite,
        handles=tuple(handles) if way.lean else (), bias_bound=_bound(problem, keys),
    )  # fmt: skip


class _Way(NamedTuple):
    """How rows are gathered.

    wire: the 16-bit dtype in which they travel and are multiplied; None: their own. lean: whether they come as the
    backend holds them, without a graph, which neither the reference nor a recording can do. empty: whether they come
    without components and only their ids are gathered
    """

    wire: torch.dtype | None
    lean: bool
    empty: bool = False

    @staticmethod
    def of(problem: Problem, options: Options) -> _Way:
        rows = problem.query.rows
        wire = _wire(rows)
        lean = product_dtype(rows) == rows.dtype or wire is not None
        return _Way(wire, lean and not (torch.compiler.is_compiling() or _backend(problem, options).differentiable))


def _gathered(
    sets: Sequence[tuple[KeySet, Sequence[int]]], problem: Problem, options: Options, way: _Way
) -> list[tuple[KeySet, Tensor | None]]:  # fmt: skip
    """Return sets of keys of all ranks, from this rank's with their numbers of rows, each with its handle."""
    call: Call = options.call
    if way.empty:
        ids = [None if x.ids is None else gather(call, [x.ids], [each])[0] for x, each in sets]
        return [(KeySet(x.rows.new_empty(sum(each), 0), y), None) for (x, each), y in zip(sets, ids, strict=True)]
    if contrast.is_explaining():
        for part, each in sets:
            contrast.explain(_exchange(part.rows, each, options, gather=True, wire=way.wire))
    if not way.lean:
        return [(keys, None) for keys in gathered_sets(call, sets, way.wire)]
    handles = [
        handle(call, part.rows, each, problem.acc_dtype)
        if part.rows.requires_grad and torch.is_grad_enabled()
        else None
        for part, each in sets
    ]
    held, guides = [], []
    for part, each in sets:
        rows = part.rows.detach()
        narrow = part._replace(rows=rows if way.wire is None else rows.to(way.wire))
        guides.append(problem.normalize and is_its_guide(narrow))
        narrow = narrow._replace(guide=None) if guides[-1] else narrow
        held.append((as_held(narrow, problem, call.takes_unit_rows), each))
    found = gathered_sets(call, held)
    found = [keys._replace(guide=keys.rows) if same else keys for keys, same in zip(found, guides, strict=True)]
    return [*zip(found, handles, strict=True)]


def _opposite(own: Problem, counts: Sequence[int], options: Options, way: _Way) -> Problem:
    """Return the problem of this rank's keys against the queries of all ranks, from that against its own."""
    [(queries, ticket)] = _gathered([(own.keys[0]._replace(guide=None), counts)], own, options, way)
    start, n = options.call.start(counts), len(own.query.rows)
    return replace(
        own, keys=(queries,), bias_bound=_bound(own, [queries]), handles=(None, ticket) if way.lean else (),
        target=torch.arange(start, start + n, device=own.query.rows.device),
    )  # fmt: skip


def _bound(problem: Problem, keys: Sequence[KeySet]) -> float | None:
    """Return a bound on the size of biases of this rank's problem and of keys of all ranks, as `Problem.bias_bound`."""
    of_all = bound_of(*[s.bias for s in keys])
    return None if of_all is None or problem.bias_bound is None else max(of_all, problem.bias_bound)


def _backend(problem: Problem, options: Options) -> Backend:
    return backends.get(resolve(options.backend, problem.query.rows))


def all_rows(
    sets: Sequence[KeySet], temperature: Temperature, options: Options, more: str
) -> tuple[list[KeySet], AbstractContextManager[Any]]:
    """Return the first set as it is and the others of all ranks, as many rows each, and the context of their products.

    What `across` does for a loss that makes several problems of the same rows.
    """
    call: Call = options.call
    resolve(options.backend, sets[0].rows)
    wire = _wire(sets[0].rows)
    context: AbstractContextManager[Any] = nullcontext()
    if wire is not None:
        rows, context = all_wide([keys.rows for keys in sets])
        sets = [keys._replace(rows=x) for keys, x in zip(sets, rows, strict=True)]
    described = "; ".join(map(_described, sets))
    (call.keys,) = call.counts(
        f"{described} {more} {options.reduction!r}",
        f"temperature {temperature.lowest if temperature.is_shared() else None}",
        [len(sets[0].rows)],
    )
    return [sets[0], *gathered_sets(call, [(keys, call.keys) for keys in sets[1:]], wire)], context


def unique(ids: Tensor, options: Options) -> Tensor:
    """Return ids that a loss gives its rows, by which they differ from those of other ranks too."""
    return ids if options.call is None else options.call.unique(ids)


def blocked(problem: Problem, options: Options) -> tuple[Problem, AbstractContextManager[Any]]:
    """Return a problem of which more than one sum is made, with 16-bit gradients added in float32, over all ranks."""
    return widened(problem) if options.call is None else across(problem, options, reused=True)


def of_all(x: Tensor, options: Options) -> Tensor:
    """Return what belongs to the rows of the first set of keys, those of all ranks, once `across` has met them."""
    return x if options.call is None else gather(options.call, [x], [options.call.keys])[0]


def of_own(rows: slice, options: Options) -> slice:
    """Return where some of this rank's keys, the first set's, are among those of all ranks."""
    start = 0 if options.call is None else options.call.start(options.call.keys)
    return slice(start + rows.start, start + rows.stop)


def in_block(problem: Problem, options: Options, met: Met, full: bool = False) -> Statistics:
    """Return the statistics of a problem that `block.fits`, over the rows of all ranks; full: as in `Plan`."""
    exchange = _exchange(problem.keys[0].rows, met.keys, options, gradients=not problem.self_similar)
    return block.statistics(problem, options, exchange, full)


def _exchange(
    rows: Tensor, counts: Sequence[int], options: Options, gradients: bool = True, gather: bool = False,
    wire: torch.dtype | None = None,
) -> Exchange:  # fmt: skip
    """Return the exchange of a set's rows; gather: all at once, whatever the user asked for. wire: as in `_Way`"""
    call, dtype = options.call, product_dtype(rows)
    return exchange_of(
        "gather" if gather else call.options.exchange, counts, call.rank, rows.shape[1],
        (wire or _wire(rows) or rows.dtype).itemsize, accumulator(dtype).itemsize, call.limit,
        gradients=gradients and rows.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip


def gathered_sets(
    call: Call, sets: Sequence[tuple[KeySet, Sequence[int]]], wire: torch.dtype | None = None
) -> list[KeySet]:
    """Return sets of keys of all ranks, from this rank's with their numbers of rows; wire: the dtype of rows on it."""
    tensors: list[Tensor] = []
    counts: list[Sequence[int]] = []
    wires: list[torch.dtype | None] = []
    for keys, each in sets:
        for name, x in zip(KeySet._fields, keys, strict=True):
            if x is not None:
                tensors.append(x)
                counts.append(each)
                wires.append(wire if name == "rows" else None)
    found = iter(gather(call, tensors, counts, wires))
    fields = [[None if x is None else next(found) for x in keys] for keys, _ in sets]
    return [KeySet(rows, *rest) for rows, *rest in fields if rows is not None]


def _wire(rows: Tensor) -> torch.dtype | None:
    """Return the 16-bit dtype in which rows travel and are multiplied; None: their own."""
    dtype = product_dtype(rows)
    if dtype.itemsize != 2:
        return None
    return dtype if rows.dtype == dtype or dtype == torch.bfloat16 else None


def _shifted(problem: Problem, start: int, own: int, every: int) -> Tensor:
    """Return the targets of this rank's rows among the keys of all ranks, of which its own begin at `start`."""
    target = problem.target
    if target is None:
        return torch.arange(start, start + own, device=problem.query.rows.device)
    return torch.where(target < 0, target, torch.where(target == own, every, target + start))


def _signature(problem: Problem, options: Options) -> str:
    """Return what of a call must be the same on every rank, for its collectives to be."""
    sets = "; ".join(_described(keys) for keys in problem.sets)
    flags = [name for name, value in zip(FLAGS, problem.flags, strict=True) if value]
    given = [name for name in ("target", "ceiling", "offset") if getattr(problem, name) is not None]
    t = problem.temperature.values
    graph = f"gradient of the temperature {t.requires_grad and torch.is_grad_enabled()}"
    graph += "; recorded" if recordings.wanted else ""
    dense = ", in the reference" if resolve(options.backend, problem.query.rows) == "reference" else ""
    return f"query and keys {sets}; {', '.join([*flags, *given])}; {graph}; reduction={options.reduction!r}{dense}"


FLAGS = ("in_batch", "columns", "normalize", "self_similar", "two_views")


def _described(keys: KeySet) -> str:
    rows = keys.rows
    fields = [  # with the components of a guide, or the number of ids a row
        "".join([name, *[f" {size}" for size in x.shape[rows.dim() - 1 :]]])
        for name, x in zip(KeySet._fields[1:], keys[1:], strict=True)
        if x is not None
    ]
    grads = [name for name, x in zip(KeySet._fields, keys, strict=True) if x is not None and x.requires_grad]
    shape = ", ".join(["N", *["H"] * (rows.dim() - 2), str(rows.shape[-1])])
    products = "" if product_dtype(rows) == rows.dtype else f" under autocast to {product_dtype(rows)}"
    needed = f" with gradients of {', '.join(grads)}" if grads and torch.is_grad_enabled() else ""
    return f"({shape}) {str(rows.dtype).removeprefix('torch.')}{products} {' '.join(fields)}{needed}"


def _value(temperature: Temperature) -> str:
    return f"temperature {temperature.lowest}" if temperature.is_shared() else ""
