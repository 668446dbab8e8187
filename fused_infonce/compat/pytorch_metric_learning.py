"""Drop-ins of pytorch-metric-learning 2.9.0: `NTXentLoss` and `SupConLoss` without a matrix of pairs.

They are the originals with another `compute_loss`, so reducers, regularizers, wrappers and trainers see what they saw
before: the same losses, indices and kind of reduction. What is fused: `CosineSimilarity` and `DotProductSimilarity`
(p = 2, power = 1), with or without `ref_emb`, and pairs by labels: no `indices_tuple`, or one of all pairs but each
row's with itself, as `CrossBatchMemory` and `DistributedLossWrapper` make it. The rest runs the original's own code
and says so once.

`CrossBatchMemory` is the original, but makes no tuple for these losses where it has no miner: the original's own makes
that of all N x M pairs before the loss sees it.

    NTXentLoss  -log( exp(s_ip) / (exp(s_ip) + sum_{n of another label} exp(s_in)) ) of every pair (i, p) of one label:
                O((N + M) D + P) memory for P such pairs, where the original has P times the number of negative pairs
    SupConLoss  mean_p of -log( exp(s_ip) / sum_{all but i itself} exp(s_ij) ) of every row i: O((N + M) D)

Known differences:
    - The originals add the smallest normal number before the logarithm: a loss of NTXentLoss ends at 87.3 (9.7 in
      float16), where its gradient is 0. Here it goes on.
    - Small losses keep their digits here. `AvgNonZeroReducer`, the default of SupConLoss, leaves out what the
      originals' dtype rounds to 0, and counts it here.
    - 16-bit losses are computed in float32 and rounded once. There the division of SupConLoss may give NaN for rows
      without positives, which are 0 here.
    - A row of zeros has gradient 0, where the original divides by its norm's lower bound.
    - `create_graph=True` is refused, as everywhere in fused_infonce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pytorch_metric_learning import distances, losses
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from .. import checks, contrast
from ..backends import Options
from ..backends.contract import KeySet, Problem
from ..backends.precision import product_dtype, wide, without_autocast
from ..backends.row_losses import infonce
from ..compose.arguments import call_options
from ..compose.positives import equal_pairs, members, pair_margins
from ..compose.rows import class_sums, dots, unit
from .common import one_number, said, say_once

SIMILARITIES = (distances.CosineSimilarity, distances.DotProductSimilarity)
CHECKED = 2**20  # pairs of a tuple that are looked at in one part


@dataclass(frozen=True)
class AllPairs:
    """A stand-in for an `indices_tuple` of all pairs but the pair of each row i with the key own_i.

    own: (N,), a key of each row's label, -1 for none
    make: returns the tuple itself
    """

    own: Tensor
    make: Callable[[], Any]


@dataclass(frozen=True)
class Labels:
    """The labels of a call, and what pairs they make.

    rows, keys: (N,) and (M,), int64
    own: (N,), the key that makes no pair with row i, -1 for none
    positives, negatives: the numbers of pairs of one label and of two
    twins: whether the keys are the rows, with exactly two of each label
    """

    rows: Tensor
    keys: Tensor
    own: Tensor
    positives: int
    negatives: int
    twins: bool


class _Fused:
    """A base class that computes a loss where it can be fused; the next base class, the original, does the rest."""

    backend: str = "auto"
    workspace_limit: int | None = None
    original: Any  # the class of the library that a drop-in stands in for

    def compute_loss(
        self: Any, embeddings: Any, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> dict[str, Any]:
        c_f.labels_or_indices_tuple_required(labels, indices_tuple)
        found, why = None, self._why_not(embeddings, ref_emb)
        if not why:
            found, why = _labels(labels, indices_tuple, ref_labels)
        if found is None:
            made = indices_tuple.make() if isinstance(indices_tuple, AllPairs) else indices_tuple
            loss = super().compute_loss(embeddings, labels, made, ref_emb, ref_labels)  # type: ignore[misc]
            say_once(type(self).__name__, why)
            return loss
        if found.positives <= 1 and found.negatives <= 1:  # here the original does not even look at distances
            return self.zero_losses()
        self._record_norms(embeddings, ref_emb)
        if not found.positives or not found.negatives:
            return self.zero_losses()

        normalize = self.distance.normalize_embeddings
        rows, context = wide(embeddings)
        keys = rows if ref_emb is embeddings else wide(ref_emb)[0]
        if keys is ref_emb and not ref_emb.requires_grad:  # a memory may be overwritten before the backward
            keys = keys.clone()
        t = checks.temperature(self.temperature, rows, rows.dtype)
        options = call_options(self.backend, self.workspace_limit)
        twins = found.twins and keys is rows  # half of a symmetric matrix will do
        problem = Problem(KeySet(rows), (KeySet(keys),), t, normalize=normalize, self_similar=twins)
        with context:
            terms, indices, kind = self._terms(problem, found, options)
        terms = terms.to(_dtype(embeddings, self.temperature))
        return {"loss": {"losses": terms, "indices": indices, "reduction_type": kind}}

    def _why_not(self: Any, embeddings: Any, ref_emb: Any) -> str:
        """Return what it is in the loss or the embeddings that cannot be fused; "" if all can."""
        if type(self)._compute_loss is not self.original._compute_loss:
            return "a subclass has a _compute_loss of its own"
        if type(self.distance) not in SIMILARITIES or self.distance.p != 2 or self.distance.power != 1:
            return "the distance is not CosineSimilarity or DotProductSimilarity with p=2 and power=1"
        try:
            checks.embeddings("embeddings", embeddings, 2, "(N, D)")
            checks.embeddings("ref_emb", ref_emb, 2, "(M, D)")
            checks.same_kind({"embeddings": embeddings, "ref_emb": ref_emb})
            one_number("temperature", self.temperature)
            checks.temperature(self.temperature, embeddings, embeddings.dtype)
        except (TypeError, ValueError) as error:
            return said(error)
        return "" if ref_emb.shape[1] == embeddings.shape[1] else "ref_emb must have as many components as embeddings"

    def _record_norms(self: Any, embeddings: Tensor, ref_emb: Tensor) -> None:
        """Record the statistics of norms that the distance would record."""
        distance = self.distance
        distance.reset_stats()
        if distance.collect_stats:
            seen = (distance.maybe_normalize(x.detach()) for x in (embeddings, ref_emb))
            distance.set_default_stats(embeddings, ref_emb, *seen)


class NTXentLoss(_Fused, losses.NTXentLoss):
    """NT-Xent of pytorch-metric-learning with O((N + M) D + P) memory for P pairs of equal labels.

    The attributes `backend` and `workspace_limit`, of the class or of a loss, are those of `fused_infonce.info_nce`.

    Example:
        >>> loss = NTXentLoss(temperature=0.1)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.arange(32) % 8).backward()
    """

    original = losses.NTXentLoss

    def _terms(self, problem: Problem, labels: Labels, options: Options) -> tuple[Tensor, Any, str]:
        pairs = equal_pairs(labels.rows, labels.keys, labels.own)
        if problem.self_similar:
            stats = contrast.statistics(replace(problem, target=pairs[1]), options).rows
            return infonce(stats.neg - stats.pos), pairs, "pos_pair"
        others = _with_ids(problem, torch.full_like(labels.rows, -1), labels.rows, labels.keys)
        neg = contrast.statistics(others, options).rows.neg  # over the keys of other labels
        with without_autocast(neg.device.type):
            x, y = _units(problem)
            margins = pair_margins(neg, x / problem.temperature.values, y, *pairs, options.workspace_limit)
            return infonce(margins), pairs, "pos_pair"


class SupConLoss(_Fused, losses.SupConLoss):
    """The supervised contrastive loss of pytorch-metric-learning with O((N + M) D) memory.

    The attributes `backend` and `workspace_limit`, of the class or of a loss, are those of `fused_infonce.info_nce`.

    Example:
        >>> loss = SupConLoss(temperature=0.1)
        >>> loss(torch.randn(32, 128, requires_grad=True), torch.arange(32) % 8).backward()
    """

    original = losses.SupConLoss

    def _terms(self, problem: Problem, labels: Labels, options: Options) -> tuple[Tensor, Any, str]:
        order, first, count = members(labels.rows, labels.keys)
        own, last = labels.own, len(order) - 1
        place = first + (order[first.clamp(max=last)] == own).long()  # of the first positive that is not own
        target = torch.where(place < first + count, order[place.clamp(max=last)], -1)
        count = count - (own >= 0).long()
        index = torch.arange(len(own), device=own.device)
        if problem.self_similar:
            stats = contrast.statistics(replace(problem, target=target), options).rows
            return infonce(stats.neg - stats.pos), index, "element"
        keys = torch.arange(len(order), device=own.device)
        stats = contrast.statistics(_with_ids(problem, target, own, keys), options).rows
        with without_autocast(own.device.type):
            x, y = _units(problem)
            total, _ = class_sums(labels.keys, y, labels.rows)
            total = total - torch.where((own >= 0)[:, None], y[own.clamp(min=0)], 0)
            mean = dots(x, total) / (problem.temperature.values * count.clamp(min=1))
            # The logsumexp over all others less the mean, in two parts: with one positive the second is 0, and the
            # first is exact however small the loss.
            terms = infonce(stats.neg - stats.pos) + torch.where(count == 1, 0, stats.pos - mean)
            return torch.where(count == 0, 0, terms), index, "element"


class CrossBatchMemory(losses.CrossBatchMemory):
    """The memory of pytorch-metric-learning; without a miner it makes no N x M pairs for this module's losses."""

    def create_indices_tuple(
        self, embeddings: Tensor, labels: Tensor, E_mem: Tensor, L_mem: Tensor, input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> Any:  # fmt: skip
        """Return the pairs of a batch and the memory, or an `AllPairs` in their place."""
        make = partial(
            super().create_indices_tuple, embeddings, labels, E_mem, L_mem, input_indices_tuple,
            do_remove_self_comparisons,
        )  # fmt: skip
        few = len(embeddings) < 2  # of a single row the original keeps the pair with itself, which `own` would drop
        if self.miner or input_indices_tuple is not None or few or not isinstance(self.loss, _Fused):
            return make()
        own = self.curr_batch_idx if do_remove_self_comparisons else torch.full_like(labels, -1, dtype=torch.long)
        return AllPairs(own, make)


def _dtype(embeddings: Tensor, temperature: Any) -> torch.dtype:
    """Return the dtype of the original's losses, which is that of its products and its temperature."""
    dtype, device = product_dtype(embeddings), embeddings.device.type
    if torch.is_autocast_enabled(device) and device != "cpu" and dtype != torch.float64:
        return torch.float32  # where autocast makes exponentials and sums in float32
    return torch.result_type(torch.empty(1, 1, dtype=dtype), temperature)


def _units(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return rows and keys in the dtype of the logits, divided by their norms if the distance does that."""
    dtype = problem.acc_dtype
    query, key = problem.inputs
    x = unit(query, problem.normalize, dtype)
    return x, x if key is query else unit(key, problem.normalize, dtype)


def _with_ids(problem: Problem, target: Tensor, row_ids: Tensor, key_ids: Tensor) -> Problem:
    query, (key,) = problem.query, problem.keys
    return replace(problem, query=query._replace(ids=row_ids), keys=(key._replace(ids=key_ids),), target=target)


def _labels(labels: Any, indices_tuple: Any, ref_labels: Any) -> tuple[Labels | None, str]:
    """Return the labels of a call and their pairs; or None, and why labels do not say which pairs there are."""
    if labels is None or ref_labels is None:
        return None, "labels or ref_labels are not given"
    n, m = len(labels), len(ref_labels)
    if labels.is_floating_point() or ref_labels.is_floating_point():
        both = torch.cat([labels, ref_labels])
        if both.isnan().any():
            return None, "labels are NaN"
        rows, keys = torch.unique(both, return_inverse=True)[1].split([n, m])
    else:
        # copies, since a memory's labels may be overwritten before the backward
        rows, keys = (x.to(torch.int64, copy=True) for x in (labels, ref_labels))
    count = members(rows, keys)[2]
    twins = False
    own: Tensor | None = torch.full_like(rows, -1)
    if isinstance(indices_tuple, AllPairs):
        own = indices_tuple.own
    elif indices_tuple is not None:
        own = _own(indices_tuple, rows, keys)
    elif ref_labels is labels:
        own = torch.arange(n, device=rows.device)
        twins = bool((count == 2).all())
    if own is None:
        return None, "indices_tuple is not all pairs by labels in order (pairs that a miner chose are not fused)"
    equal = int(count.sum())
    return Labels(rows, keys, own, equal - int((own >= 0).sum()), n * m - equal, twins), ""


def _own(indices_tuple: Any, row_ids: Tensor, key_ids: Tensor) -> Tensor | None:
    """Return `AllPairs.own` of a tuple of all pairs but at most one positive of each row; None for any other tuple."""
    known = all(isinstance(x, Tensor) and x.dtype == torch.int64 and x.dim() == 1 for x in indices_tuple)
    if len(indices_tuple) != 4 or not known or any(x.device != row_ids.device for x in indices_tuple):
        return None
    rows, keys = equal_pairs(row_ids, key_ids)
    a1, p, a2, n = indices_tuple
    different = len(row_ids) * len(key_ids) - len(rows)
    if len(a1) != len(p) or len(a2) != len(n) or len(a2) != different:
        return None
    if not _are_pairs(a1, p, row_ids, key_ids, True) or not _are_pairs(a2, n, row_ids, key_ids, False):
        return None
    missing = torch.ones_like(rows, dtype=torch.bool)
    missing[torch.searchsorted(rows * len(key_ids) + keys, a1 * len(key_ids) + p)] = False
    rows, keys = rows[missing], keys[missing]
    if (rows[1:] == rows[:-1]).any():
        return None
    return torch.full_like(row_ids, -1).index_put((rows,), keys)


def _are_pairs(rows: Tensor, keys: Tensor, row_ids: Tensor, key_ids: Tensor, equal: bool) -> bool:
    """Return whether these are pairs of equal (or of different) ids, in order and each once.

    The pairs are looked at in parts of CHECKED.
    """
    n, m = len(row_ids), len(key_ids)
    good = torch.ones((), dtype=torch.bool, device=rows.device)
    for start in range(0, len(rows), CHECKED):
        part = slice(max(start - 1, 0), start + CHECKED)  # with the last pair of the part before, to see the order
        i, j = rows[part], keys[part]
        good &= ((i >= 0) & (i < n) & (j >= 0) & (j < m)).all()
        good &= ((row_ids[i.clamp(0, n - 1)] == key_ids[j.clamp(0, m - 1)]) == equal).all()
        place = i * m + j
        good &= (place[1:] > place[:-1]).all()
    return bool(good)
