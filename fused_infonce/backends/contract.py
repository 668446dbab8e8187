"""The contract between autograd and a backend: the problems it is given, and the functions it must offer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .temperature import Temperature as Temperature

if TYPE_CHECKING:
    from .ladder import Ladder, Profile
    from .plan import Plan

EPS = 1e-12  # rows with a norm up to this are divided by it, as torch.nn.functional.normalize does
LOG2E = math.log2(math.e)  # logits are held in base 2 on both backends, because exp2 is the cheaper exponential
LN2 = math.log(2)


# A NamedTuple has methods and no properties: the compiler of PyTorch 2.9 knows none of them.
class KeySet(NamedTuple):
    """One set of embeddings with everything that belongs to its rows. The queries are one too: see `Problem.swapped`.

    rows: (M, D), shared by all queries, or (N, H, D), the H keys that only query i is scored against; with `indices`,
        (M, D) of a table
    ids: rows without their last dimension, int64; a negative whose id equals its query's is left out. Or with one
        dimension more, I ids a row, of which one that agrees is enough
    guide: a guide's embeddings of the same rows, (M, D'); a negative that the guide finds closer to the query than
        `Problem.ceiling` is left out. Of float64 exactly where the rows are. Not for (N, H, D)
    scale: float32, rows without their last dimension; row i of the logits is `scale_i rows_i`. None: 1
    bias: c in nats, rows without their last dimension, accumulator dtype, contiguous; added to every logit in which the
        row is what a query is scored against, and to none in which it is the query. -inf leaves it out. None: 0. With
        `indices`, (N, H)
    norm: (M, 1) in the accumulator dtype, what the rows have been divided by where they are unit rows already, of which
        gradients are still those of the rows that they were made of. None: they are as they came. For a backend that
        `takes_unit_rows`, with `Problem.normalize`, of shared keys
    indices: (N, H) int64; the keys that only query i is scored against are `rows[indices[i]]`. -1 is no key, and the
        logit of M is NaN. Not of the queries or the first set
    """

    rows: Tensor
    ids: Tensor | None = None
    guide: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    norm: Tensor | None = None
    indices: Tensor | None = None

    def is_paired(self) -> bool:
        """Return whether every query has keys of its own."""
        return self.indices is not None or self.rows.dim() == 3

    def columns(self) -> int:
        """Return the number of keys that a query is scored against."""
        return self.rows.shape[-2] if self.indices is None else self.indices.shape[1]


def largest_bias(biases: Iterable[Tensor]) -> float:
    """Return the size of the largest bias of those that leave no key out, read from the tensors; 0 without one."""
    return max((x.masked_fill(x == -math.inf, 0).abs().max().item() for x in biases if x.numel()), default=0.0)


@dataclass(eq=False)
class Problem:
    """One set of queries against their targets and one or more sets of keys, in one dtype.

    `s_ij = a_i b_j (q_i . k_j) / t_i + c_j` with `a_i = 1 / max(|q_i|, EPS)` and `b_j = 1 / max(|k_j|, EPS)`; without
    `normalize`, a and b are the sets' scales. Row i's negatives are the keys of all sets but its target and what ids,
    guides, biases of -inf and `self_similar` leave out.

    The bias of a target is `offset`, apart from those of negatives: a backend's `pos` is without it, `contrast` adds it
    to a result, and only `Backend.onepass`, which makes losses, reads it.
    """

    query: KeySet  # (N, D)
    keys: tuple[KeySet, ...]  # the first, (M, D), holds every row's target
    temperature: Temperature
    target: Tensor | None = None  # (N,) int64 into the first set; -1: none. None: row i's target is key i
    ceiling: Tensor | None = None  # (N,) of the guide's cosines, accumulator dtype, contiguous; None: no guide
    # What is added to the logits of the rows' targets, accumulator dtype: (N,), or with `columns` (2, N), whose second
    # row is that of the columns. None: 0
    offset: Tensor | None = None
    in_batch: bool = True  # the first set's keys that are not the row's target are its negatives
    # Also the statistics of key j of the first set against all queries but the one whose target it is. Without a target
    # N == M; with one, no two rows have the same, temperatures are shared, and there are M columns
    columns: bool = False
    normalize: bool = True
    # The keys are the queries and there is no other set, no row is its own negative, and the target of a row's target
    # is the row, so that exclusions are symmetric. Gradients of both sides are then returned as the query's
    self_similar: bool = False
    two_views: bool = False  # of self-similar rows: the target of row i is row i + N / 2, or i - N / 2
    # On the size of every bias but -inf, a target's included, but not of a margin, which is below 0; None: not known
    # without reading a tensor
    bias_bound: float | None = None
    # The problem of the keys against the queries, where `columns` asks for it and other products than those of the rows
    # give it: those of keys and queries of other processes
    opposite: Callable[[], Problem] | None = None
    # In place of rows that have no graph, what autograd is given, in the accumulator dtype and of their shape, so that
    # it takes their gradients as they were added up; None where it is given the rows. Empty: nowhere
    handles: tuple[Tensor | None, ...] = ()

    def __post_init__(self) -> None:
        # the queries and every set of keys, and their rows: with which gradients are aligned
        self.sets: tuple[KeySet, ...] = (self.query, *self.keys)
        inputs, biases = [self.query.rows], []
        if self.columns and self.query.bias is not None:
            biases.append(self.query.bias)
        for keys in self.keys:
            inputs.append(keys.rows)
            if keys.bias is not None:
                biases.append(keys.bias)
        self.inputs: tuple[Tensor, ...] = tuple(inputs)
        self.biases: list[Tensor] = biases  # those of scored rows, which have gradients as the inputs have
        # all that is added to logits: the biases and, after them, the offset
        self.added: list[Tensor] = biases if self.offset is None else [*biases, self.offset]

    @property
    def biased(self) -> list[int]:
        """Return the places in `sets` of those that `biases` belong to."""
        return [i for i, s in enumerate(self.sets) if s.bias is not None and (i > 0 or self.columns)]

    @property
    def leaves(self) -> Sequence[Tensor]:
        """Return what autograd is given for the inputs, of which gradients are asked for."""
        if not self.handles:
            return self.inputs
        return [x if handle is None else handle for x, handle in zip(self.inputs, self.handles, strict=True)]

    @property
    def largest_added(self) -> float:
        """Return the most by which biases but -inf move negatives' logits or raise targets', read from the tensors."""
        return largest_bias([*self.biases, *([] if self.offset is None else [self.offset.clamp_min(0)])])

    @property
    def acc_dtype(self) -> torch.dtype:
        """Return the dtype of logits and accumulated gradients: float64 for float64 inputs, else float32."""
        return self.temperature.dtype

    @property
    def score_bound(self) -> float:
        """Return a bound on the size of every logit without its bias, as far as is known without reading a tensor."""
        return 1 / self.temperature.lowest if self.normalize and self.temperature.lowest else math.inf

    @property
    def logit_bound(self) -> float:
        """Return a bound on the size of every logit, as far as is known without reading a tensor."""
        of_biases = 0.0 if not self.added else math.inf if self.bias_bound is None else self.bias_bound
        return self.score_bound + of_biases

    @property
    def every_row_counts(self) -> bool:
        """Return whether no row can be without a target."""
        return self.self_similar or self.target is None

    @property
    def apart(self) -> bool:
        """Return whether the direction that `columns` asks for is a problem of its own: only rows have other keys."""
        return self.columns and (not self.in_batch or self.opposite is not None)

    @property
    def one_to_one(self) -> bool:
        """Return whether there is one set of keys, each of them the target of one query."""
        return len(self.keys) == 1 and self.every_row_counts and self.in_batch and self.ceiling is None

    @property
    def plain(self) -> bool:
        """Return whether all keys are negatives of all queries, but for the targets, which are on a diagonal."""
        return self.one_to_one and self.keys[0].ids is None

    @property
    def joint(self) -> bool:
        """Return whether the scores are those of one matrix of rows: every key of all sets, all of them as they came,
        against every query, and columns of one."""
        if not self.in_batch or not self.keys[0].rows.shape[0] or any(keys.norm is not None for keys in self.keys):
            return False
        return len(self.keys) == 1 or (not self.columns and not any(keys.is_paired() for keys in self.keys[1:]))

    def swapped(self) -> Problem:
        """Return the problem of the keys against the queries: the direction that `columns` asks for."""
        if self.opposite is not None:
            return self.opposite()
        query, (key, *_) = self.query, self.keys
        ids = query.ids if key.ids is not None else None
        return Problem(
            key, (query._replace(ids=ids),), self.temperature, normalize=self.normalize, bias_bound=self.bias_bound,
            offset=None if self.offset is None else self.offset[1],
        )  # fmt: skip

    def directions(self) -> list[Problem]:
        """Return the problem of the rows and, where `columns` asks for it, that of the keys against the queries."""
        return [self.of_rows(), self.swapped()] if self.columns else [self]

    def blocks(self) -> list[Callable[[], Problem]]:
        """Return what makes the problems whose scores are of one block each: of both directions, or of one after the
        other, of which the second's rows may come when they are asked for."""
        return [self.of_rows, self.swapped] if self.apart else [lambda: self]

    def of_rows(self) -> Problem:
        """Return the problem without the direction that `columns` asks for, itself where there is none."""
        if not self.columns:
            return self
        return replace(self, columns=False, opposite=None, offset=None if self.offset is None else self.offset[0])

    def tensors(self) -> list[Tensor | None]:
        """Return every tensor of the problem, in the order that `with_tensors` takes."""
        return [self.temperature.values, self.target, self.ceiling, self.offset, *[x for s in self.sets for x in s]]

    def with_tensors(self, tensors: Sequence[Any]) -> Problem:
        """Return this problem over other tensors."""
        problem = Problem.of(tensors, *self.flags)
        problem.temperature.lowest = self.temperature.lowest
        problem.bias_bound = self.bias_bound
        return problem

    @property
    def shape(self) -> tuple[Any, ...]:
        """Return the flags, and the shapes of all tensors, None for what is not there: what a plan depends on."""
        found: list[Any] = [self.in_batch, self.columns, self.normalize, self.self_similar, self.two_views]
        found.append(self.temperature.is_shared())
        rest = (None if self.two_views else self.target, self.ceiling, self.offset)
        for tensors in (*self.sets, rest):
            for x in tensors:
                found.append(None if x is None else x.shape)
        return tuple(found)

    @property
    def flags(self) -> tuple[bool, ...]:
        return self.in_batch, self.columns, self.normalize, self.self_similar, self.two_views

    @staticmethod
    def of(tensors: Sequence[Any], *flags: bool) -> Problem:
        """Return the problem that `tensors` and `flags` were taken from."""
        temperature, target, ceiling, offset, *rest = tensors
        width = len(KeySet._fields)
        query, *keys = (KeySet(*rest[i : i + width]) for i in range(0, len(rest), width))
        return Problem(query, tuple(keys), Temperature(temperature), target, ceiling, offset, *flags)  # type: ignore[arg-type]


class RowStatistics(NamedTuple):
    """The vectors that losses are made of, (N,) in the accumulator dtype, of every row over its negatives in all sets.

    pos: the target's logit s_{i, y_i}; 0 where the row has no target (-1), NaN where the target is out of range. A
        backend's is without the bias, `Problem.offset`
    neg: log sum_j exp s_ij over the row's negatives; -inf where there are none
    mean: sum_j exp(s_ij - neg_i) (s_ij - c_j), of the logits without their biases, on which the temperature acts; 0
        where there are none, and of any value, such as NaN, for a plan without `mean`. No gradient flows through it
    maximum, scale: m and r with exp(s_ij - neg_i) = 2^(s_ij log2(e) - m_i) r_i, where a large neg_i has lost digits
        that m_i has. m is the largest logit in base 2, or 0 where every exponential fits. Both have no gradient

    A logit that is not finite makes all but pos NaN (-inf too: it is never legitimate, unless the bias is).
    """

    pos: Tensor
    neg: Tensor
    mean: Tensor
    maximum: Tensor
    scale: Tensor


STATE_SLOTS = 3  # vectors of what is merged into the last four: a maximum, a sum of exponentials, one of products


class Statistics(NamedTuple):
    """The statistics of the rows and, where `Problem.columns` asks for them, of the keys against the queries.

    Column j has the target, the temperature and hence, but for a bias, the `pos` of row j; where a target says which
    row that is, `pos` of the columns is still that of the rows.
    """

    rows: RowStatistics
    columns: RowStatistics | None = None

    def tensors(self) -> list[Tensor]:
        """Return every tensor of a backend once, in the order that `of` takes: columns share the rows' `pos`."""
        return [*self.rows, *(self.columns[1:] if self.columns else ())]

    @staticmethod
    def of(tensors: Iterable[Tensor]) -> Statistics:
        flat = list(tensors)
        width = len(RowStatistics._fields)
        columns = RowStatistics(flat[0], *flat[width:]) if len(flat) > width else None
        return Statistics(RowStatistics(*flat[:width]), columns)


class Upstream(NamedTuple):
    """The derivatives dL/dpos, dL/dneg and dL/dneg of columns: (N,), accumulator dtype, contiguous."""

    pos: Tensor
    neg: Tensor
    column_neg: Tensor | None = None


class OnePass(NamedTuple):
    """A reduced loss with its gradients, or with what these are finished from once the upstream is known.

    inputs: the gradients, or with `kept` their sums over all scores, aligned with `Problem.inputs`, in the accumulator
        dtype; None where not wanted, and for paired keys, whose gradients are still to be made
    temperature: the gradient of `Temperature.given`, in its shape, that of `row_losses.temperature_gradient` from
        sum_j (s_ij - c_j) dL/ds_ij of each row; None where not wanted; always finished
    kept: what `Backend.finished` needs beside the sums; empty where the gradients are finished
    biases, offset: the gradients of `Problem.biases`, None where not wanted, and that of `Problem.offset`, if there is
        one; always finished
    rows: pos, neg and mean, as in `RowStatistics`, of the rows and of the columns, for a plan that is to `record`
    """

    loss: Tensor
    inputs: list[Tensor | None]
    temperature: Tensor | None
    kept: Sequence[Tensor] = ()
    biases: Sequence[Tensor | None] = ()
    offset: Tensor | None = None
    rows: Sequence[Sequence[Tensor]] = ()


class Sigmoids(NamedTuple):
    """The losses of rows whose pairs are classified one by one, and the gradients of their weighted sum.

    loss_i = softplus(-(pos_i + b)) + sum_j softplus(s_ij + b) over the row's negatives j in all sets, b being the bias

    losses: (N,) in the accumulator dtype, not weighted; NaN where a logit is not finite
    inputs: the gradients of sum_i weight_i loss_i, aligned with `Problem.inputs`, in the accumulator dtype; None where
        not wanted
    logits, bias: sum_j s_ij dL/ds_ij and sum_j dL/ds_ij of each row, its positive among them, (N,), what the gradients
        of the temperature and of the bias are made of; None where not wanted
    """

    losses: Tensor
    inputs: list[Tensor | None]
    logits: Tensor | None
    bias: Tensor | None


class Backend(Protocol):
    """A way to compute the primitive on a device: the modules `torch`, `triton` and `reference` of this folder.

    `dtypes` and `wanted` are aligned with `Problem.inputs` and, after these, `Problem.biases`: the dtype in which a
    gradient is returned, or None where it is not needed and its work is skipped; `wanted` ends with the temperature.
    """

    takes_unit_rows: bool  # whether keys may come with `KeySet.norm`: it would hold unit rows of its own otherwise
    differentiable: bool  # whether autograd sees through `statistics` and `sigmoids`: nothing else is asked for then

    def unavailable(self, tensor: Tensor) -> str:
        """Return why the backend cannot run on such a tensor; "" if it can."""
        ...

    def statistics(self, problem: Problem, plan: Plan, keep: list[Tensor] | None = None) -> Statistics:
        """Return the statistics; `keep` may be given what `gradients` is then spared from making again."""
        ...

    def gradients(
        self, problem: Problem, plan: Plan, statistics: Statistics, upstream: Upstream,
        dtypes: Sequence[torch.dtype | None], kept: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:  # fmt: skip
        """Return the gradients; kept: what `statistics` of this problem and plan put into `keep`, or nothing."""
        ...

    def onepass(
        self, problem: Problem, plan: Plan, loss: str, weight: Tensor | float, wanted: Sequence[bool]
    ) -> OnePass:
        """Return `sum_i weight_i loss_i` and its gradients, for a plan that is `one_pass`.

        loss: a name in `row_losses.ROW_LOSSES`. weight: (N,), a row of weight 0 counting for nothing; or one for all
        rows, a number or (1,).
        """
        ...

    def finished(
        self, problem: Problem, plan: Plan, sums: Sequence[Tensor | None], kept: Sequence[Tensor], upstream: Tensor,
        dtypes: Sequence[torch.dtype | None], spent: Sequence[int] = (),
    ) -> list[Tensor | None]:  # fmt: skip
        """Return the gradients of a one-pass loss times its upstream, rounded once; asked where `onepass` kept tensors.

        sums, kept: of the `OnePass`, which stay as they are. upstream: a tensor of no dimensions. spent: places of sums
        that may be overwritten all the same.
        """
        ...

    def sigmoids(
        self, problem: Problem, plan: Plan, bias: Tensor, weight: Tensor | float, wanted: Sequence[bool]
    ) -> Sigmoids:
        """Return the losses of sigmoids and the gradients of their weighted sum.

        bias: (1,) in the accumulator dtype, added to every logit. weight: as for `onepass`. wanted: ends with the
        temperature and the bias.
        """
        ...

    def profile(self, problem: Problem, plan: Plan, ladder: Ladder) -> Profile:
        """Return the profile of the rows; the problem's temperature has no part in it, and nothing has a gradient."""
        ...

    def kept_sizes(self, problem: Problem, plan: Plan) -> list[int]:
        """Return the sizes of the vectors that `onepass` keeps, in the accumulator dtype."""
        ...
