"""What a backend is given and what it returns: the contract between `contrast` and the backends.

A backend is a module with these functions (`backend_torch`, `backend_triton`):

    statistics(problem, plan) -> Statistics
    gradients(problem, plan, statistics, upstream, dtypes) -> list[Tensor | None]
    onepass(problem, plan, kind, weight, wanted) -> OnePass, where `plan.choose` may return a plan that is `one_pass`

`dtypes` is aligned with `problem.inputs`: the dtype in which that input's gradient is returned, or
None where it is not needed and its work is skipped. The list returned is aligned with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-12  # rows with a norm up to this are divided by it, as torch.nn.functional.normalize does

# bits of range: 2^(a logit up to this), summed over a million columns, divided by a million rows, and its inverse stay
# normal numbers of the accumulator and, on a GPU, of the products' dtype; float16 has no such range
EXPONENT_ROOM = {torch.float16: 0.0, torch.bfloat16: 90.0, torch.float32: 90.0, torch.float64: 900.0}

KEY = 1  # its index in `Problem.inputs`: query, key, *negatives


@dataclass(eq=False)
class Problem:
    """One query set against its targets and one or more segments of negatives, in one dtype.

    `s_ij = a_i b_j (q_i . k_j) / t_i` with `a_i = 1 / max(|q_i|, EPS)`, `b_j = 1 / max(|k_j|, EPS)`;
    without `normalize`, `a` and `b` are `scales` (1 where None).
    """

    query: Tensor  # (N, D)
    key: Tensor  # (M, D), holds every row's target
    temperature: Tensor  # (1,) or (N,), accumulator dtype, contiguous
    target: Tensor | None = None  # (N,) int64 into key; -1: none. None: row i's target is key i
    negatives: tuple[Tensor, ...] = ()  # each (M', D), shared by all rows, or (N, H, D), a row's own
    row_ids: Tensor | None = None  # (N,) int64; a negative whose id equals its row's is left out
    key_ids: Tensor | None = None  # (M,) int64
    negative_ids: tuple[Tensor | None, ...] = ()  # aligned with negatives: (M',) or (N, H) int64
    in_batch: bool = True  # the keys that are not the row's target are its negatives
    columns: bool = False  # also the statistics of key j against all queries; needs target None, N == M
    normalize: bool = True
    # key is query, no row is its own negative, and the target of a row's target is the row; gradients of both sides
    # are then returned as the query's
    self_similar: bool = False
    scales: tuple[Tensor | None, ...] = ()  # aligned with inputs, or empty: see above; (N,), (M,), ...
    # A guide's rows, aligned with inputs, or empty: a negative j of shared keys (M, D) that have guides is left out
    # where cos(guide of i, guide of j) > ceiling_i. Of the accumulator dtype when that is float64, else narrower. No
    # columns, no self_similar
    guides: tuple[Tensor | None, ...] = ()
    ceiling: Tensor | None = None  # (N,), accumulator dtype, contiguous

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, *self.negatives)

    @property
    def acc_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, else float32: of logits, statistics and accumulated gradients."""
        return accumulator(self.query.dtype)

    @property
    def plain(self) -> bool:
        """Nothing but normalised queries and keys, all of them negatives of each other but for the target."""
        bare = len(self.negatives) == 0 and self.key_ids is None and (self.target is None or self.self_similar)
        return bare and self.in_batch and self.normalize and self.ceiling is None

    def scale(self, index: int) -> Tensor | None:
        return self.scales[index] if self.scales else None

    def guide(self, index: int) -> Tensor | None:
        return self.guides[index] if self.guides else None

    def ids(self, index: int) -> Tensor | None:
        """Of the input with this index, 1 or more."""
        return self.key_ids if index == KEY else self.negative_ids[index - 2]

    def tensors(self) -> list[Tensor | None]:
        """Every tensor in it, in the order that `with_tensors` takes."""
        none = [None] * len(self.inputs)
        flat = [*self.inputs, self.temperature, self.target, self.row_ids, self.key_ids, *self.negative_ids]
        return [*flat, self.ceiling, *(self.guides or none), *(self.scales or none)]

    def with_tensors(self, tensors: Sequence[Any]) -> Problem:
        """The same problem over other tensors."""
        return Problem.of(tensors, *self.flags)

    @property
    def flags(self) -> tuple[bool, ...]:
        return self.in_batch, self.columns, self.normalize, self.self_similar

    @staticmethod
    def of(tensors: Sequence[Any], in_batch: bool, columns: bool, normalize: bool, self_similar: bool) -> Problem:
        """From what `tensors` returns: 11 of a query and a key, 4 more with each set of negatives."""
        extra = (len(tensors) - 11) // 4
        query, key, *rest = tensors
        temperature, target, row_ids, key_ids = rest[extra : extra + 4]
        ceiling, *guides = rest[2 * extra + 4 : 3 * extra + 7]
        scales = tuple(rest[3 * extra + 7 :])
        return Problem(
            query=query,
            key=key,
            temperature=temperature,
            target=target,
            negatives=tuple(rest[:extra]),
            row_ids=row_ids,
            key_ids=key_ids,
            negative_ids=tuple(rest[extra + 4 : 2 * extra + 4]),
            in_batch=in_batch,
            columns=columns,
            normalize=normalize,
            self_similar=self_similar,
            scales=() if all(scale is None for scale in scales) else scales,
            guides=() if ceiling is None else tuple(guides),
            ceiling=ceiling,
        )


class Statistics(NamedTuple):
    """The `(N,)` vectors of `Problem`, in the accumulator dtype.

    pos_i  = s_{i, y_i}, 0 where the row has no target (-1), NaN where the target is out of range
    neg_i  = log sum_j exp s_ij over the row's negatives in all segments; -inf where there are none
    mean_i = sum_j exp(s_ij - neg_i) s_ij; 0 where there are none. Not differentiable
    softmax = (m, r), (2, N), of logits in base 2: exp(s_ij - neg_i) = 2^(s_ij - m_i) r_i, where a large neg_i has lost
        digits that m_i has; m is 0 where every exponential fits. Not differentiable
    column_neg_j, column_mean_j, column_softmax_j: the same over the queries i != j for key j, with the temperature of
    row j; None unless `columns`.

    A logit that is not finite makes all but pos NaN (for -inf too: it is never legitimate).
    """

    pos: Tensor
    neg: Tensor
    mean: Tensor
    softmax: Tensor
    column_neg: Tensor | None = None
    column_mean: Tensor | None = None
    column_softmax: Tensor | None = None


class Upstream(NamedTuple):
    """dL/dneg, dL/dpos, dL/dcolumn_neg: `(N,)`, accumulator dtype, contiguous."""

    neg: Tensor
    pos: Tensor
    column_neg: Tensor | None = None


class OnePass(NamedTuple):
    """A reduced loss and its gradients: inputs' aligned with `Problem.inputs`, temperature's one a row."""

    loss: Tensor
    inputs: list[Tensor | None]
    temperature: Tensor | None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
