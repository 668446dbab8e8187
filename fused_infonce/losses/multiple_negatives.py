"""Multiple negatives ranking: queries against documents with hard negatives, in up to four directions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .. import checks, contrast, reference_ranking
from ..backends.contract import Problem, accumulator
from ..backends.row_losses import infonce
from ..compose.reduction import call_options, dots, log_add, reduced, reduced_mean, unit, wide
from ..contrast import Options
from .base import WithTemperature

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITIONS = ("joint", "per_direction")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")


def multiple_negatives(
    query: Tensor,
    documents: Sequence[Tensor] | Tensor,
    temperature: float | Tensor = 0.05,
    *,
    directions: Collection[str] = ("query_to_doc",),
    partition: str = "joint",
    hardness: str | None = None,
    hardness_strength: float = 0.0,
    offset: int = 0,
    all_queries: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """InfoNCE of queries against their positives, the hard negatives of all queries and, if asked, in other directions.

    With q the queries, d the positives, x the documents of all columns, and i a query and its own documents:

        loss_i = log( sum over the directions of Z_i ) - s(q_i, d_i),    s(a, b) = cos(a, b) / t_i

        query_to_doc      Z_i = sum_j exp(s(q_i, x_j) + h_ij)    over all documents, the own positive among them
        query_to_query    Z_i = sum_{j != i} exp(s(q_i, q_j))
        doc_to_query      Z_i = sum_j exp(s(d_i, q_j))           the own query among them
        doc_to_doc        Z_i = sum_j exp(s(d_i, x_j))           over the documents of other queries

    "per_direction" takes the mean over the directions of `log Z_i - s(q_i, d_i)` in place of the log of their sum. The
    hardness h_ij is `hardness_strength` times the cosine (without `normalize`, the dot product) of i and j, which gets
    no gradient, where j is

        "in_batch_negatives"    any document of another query
        "hard_negatives"        a hard negative of query i
        "all_negatives"         any document but the positive of query i

    and 0 elsewhere. A document with h_ij has the logit of the temperature 1 / (1 / t_i + strength), and the gradient of
    its logit at t_i.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        documents: a sequence of (M, D), or stacked, (1 + H, M, D), with M >= N: the positives, then H columns of hard
            negatives; row `offset + i` of every one is query i's own. M > N where they were gathered from other
            processes.
        temperature: as in `info_nce`; row i's is that of all its directions.
        directions: "query_to_doc", which holds the positive, and any of the others.
        partition: "joint" (one softmax over all directions) or "per_direction" (one each; of "query_to_doc" and
            "doc_to_query" only, since the others do not hold the positive).
        hardness: None, or one of the above. "hard_negatives" has no effect without hard negatives.
        hardness_strength: not negative; 0 has no effect.
        offset: the row of the first query's own documents: `rank * N` of gathered ones.
        all_queries: (M, D), rows `offset` to `offset + N` being `query`; for "query_to_query" and "doc_to_query", which
            compare with all of them; both get gradients. None: `query`, which must have M rows then.
        normalize: as in `info_nce`.
        reduction: "mean", "sum" or "none" (one value per query).
        backend, workspace_limit: as in `info_nce`. The hard negatives are held once in one tensor; several directions,
            or a hardness that tells a query's own hard negatives from others, hold 16-bit rows once in float32.

    Returns: as `info_nce`.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: `MultipleNegativesRankingLoss` of sentence-transformers; Henderson et al. 2017, arXiv:1705.00652; joint
    directions: Li et al. 2023, arXiv:2308.03281; hardness: Lan et al. 2025, arXiv:2503.04812, and Schechter Vera et al.
    2025, arXiv:2509.20354.
    """
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    checks.one_of("backend", backend, checks.BACKENDS)
    check_options(directions, partition, hardness, hardness_strength)
    documents = _check_embeddings(query, documents, offset, all_queries, directions)
    n, m, device = len(query), len(documents[0]), query.device
    t = checks.temperature(temperature, n, accumulator(contrast.compute_dtype([query])), device)
    options = call_options(backend, workspace_limit, temperature, normalize)
    strength = 0.0 if hardness is None else float(hardness_strength)
    if backend == "reference":
        return reference_ranking.multiple_negatives(
            query, documents, t, directions, partition, hardness, strength, offset, all_queries, normalize, reduction
        )
    if hardness == "hard_negatives" and len(documents) == 1:
        strength = 0.0
    apart = strength > 0 and hardness != "all_negatives" and len(documents) > 1  # a row's own hard negatives
    weighted = strength > 0 and hardness != "hard_negatives"  # in-batch negatives
    all_queries = None if all_queries is query else all_queries
    local = n == m and all_queries is None
    columns = local and "doc_to_query" in directions and not weighted  # from the products of query_to_doc
    every = query if all_queries is None else all_queries

    # several problems, or one and the scores of own hard negatives: gradients of 16-bit rows are rounded once
    products: AbstractContextManager[Any] = nullcontext()
    if apart or len(set(directions)) > 1 + columns:
        (query, products), *documents = wide(query), *(wide(x)[0] for x in documents)
        every = query if all_queries is None else wide(every)[0]
    positives, *hard = documents
    index = torch.arange(m, device=device)
    own = index[offset : offset + n]
    target = None if local else own
    shared: dict[str, Any] = {}  # the hard negatives of all rows, and of all but its own
    others: dict[str, Any] = {}
    if hard:
        with contrast.products(device.type):  # autocast would refuse rows of its other 16-bit dtype
            shared = {"negatives": (torch.cat(hard) if len(hard) > 1 else hard[0],), "negative_ids": (None,)}
        others = shared | {"row_ids": own, "negative_ids": (index.repeat(len(hard)),)}

    first = Problem(query, positives, t, target, **(others if apart else shared), columns=columns, normalize=normalize)
    simple = not strength and (set(directions) == {"query_to_doc"} or (columns and partition == "per_direction"))
    if simple:
        return reduced(first, options, reduction, symmetric=columns)

    with products:
        if weighted:
            pos, neg = _weighted(first, options, strength)
        else:
            stats = contrast.statistics(first, options)
            pos, neg = stats.pos, stats.neg
        negs = [neg]
        mine = positives if local else positives[offset : offset + n]
        if "query_to_query" in directions:
            problem = Problem(query, every, t, target, normalize=normalize, self_similar=local)
            negs.append(contrast.statistics(problem, options).neg)
        if columns:
            assert stats.column_neg is not None
            negs.append(stats.column_neg)
        elif "doc_to_query" in directions:
            negs.append(contrast.statistics(Problem(mine, every, t, target, normalize=normalize), options).neg)
        if "doc_to_doc" in directions:
            problem = Problem(
                mine, positives, t, target, **others, normalize=normalize, self_similar=local and not hard
            )
            negs.append(contrast.statistics(problem, options).neg)
    with torch.autocast(device.type, enabled=False):
        if apart:
            mates = [x[offset : offset + n] for x in hard]
            bonus = strength if hardness == "hard_negatives" else 0.0
            negs[0] = log_add(neg, _own(query, mates, t, bonus, normalize))
        if partition == "per_direction":
            return reduced_mean(torch.stack([infonce(neg - pos) for neg in negs]).mean(0), reduction)
        # with doc_to_query the positive is there twice: log(k + exp(x)) = log k + log(1 + exp(x - log k))
        log_k = math.log(1 + ("doc_to_query" in directions))
        return reduced_mean(log_k + infonce(reduce(log_add, negs) - pos - log_k), reduction)


def _weighted(problem: Problem, options: Options, strength: float) -> tuple[Tensor, Tensor]:
    """(pos, neg) where every negative's logit has `strength` times its cosine added, which gets no gradient.

    These are the logits at the temperature r t, r = 1 / (1 + strength t); their gradient is that at t, r times theirs.
    """
    t = problem.temperature
    r = 1 / (1 + strength * t.detach())
    problem, options = replace(problem, temperature=r * t), replace(options, logit_bound=options.logit_bound + strength)
    stats = contrast.statistics(problem, options)
    finite = stats.neg.clamp_min(-1e30)  # where there are no negatives, -inf - -inf would be NaN
    return r * stats.pos, stats.neg.detach() + r * (finite - finite.detach())


def _own(query: Tensor, hard: Sequence[Tensor], t: Tensor, strength: float, normalize: bool) -> Tensor:
    """(N,) logsumexp over a row's own hard negatives, O(N H D)."""
    q = unit(query, normalize, t.dtype)
    cosine = torch.stack([dots(q, unit(x, normalize, t.dtype)) for x in hard], dim=1)
    return torch.logsumexp(cosine / t[:, None] + strength * cosine.detach(), dim=1)


def check_options(directions: Any, partition: str, hardness: str | None, hardness_strength: Any) -> None:
    if isinstance(directions, str) or not isinstance(directions, Collection):
        raise TypeError(f"directions must be a tuple of names, got {type(directions).__name__}")
    for direction in directions:
        checks.one_of("directions", direction, DIRECTIONS)
    if "query_to_doc" not in directions:
        raise ValueError(f"directions must hold 'query_to_doc', the one with the positive, got {tuple(directions)}")
    checks.one_of("partition", partition, PARTITIONS)
    without = [name for name in ("query_to_query", "doc_to_doc") if name in directions]
    if partition == "per_direction" and without:
        raise ValueError(f"partition='per_direction' needs the positive in every direction, {without[0]!r} has none")
    if hardness is not None:
        checks.one_of("hardness", hardness, HARDNESS)
    if not 0 <= checks.real("hardness_strength", hardness_strength) < math.inf:
        raise ValueError(f"hardness_strength must not be negative, and finite, got {hardness_strength}")


def _check_embeddings(
    query: Any, documents: Any, offset: Any, all_queries: Any, directions: Collection[str]
) -> list[Tensor]:
    """The columns of documents."""
    checks.embeddings("query", query, 2, "(N, D)")
    if isinstance(documents, Tensor):
        checks.embeddings("documents", documents, 3, "(1 + H, M, D), or be a sequence of (M, D)")
    elif not isinstance(documents, Sequence):
        raise TypeError(f"documents must be a sequence of tensors of shape (M, D), got {type(documents).__name__}")
    documents = list(documents)
    if not documents:
        raise ValueError("documents must hold the positives, and hard negatives after them, got none")
    tensors = {f"documents[{i}]": x for i, x in enumerate(documents)}
    if all_queries is not None:
        tensors["all_queries"] = all_queries
    for name, tensor in tensors.items():
        checks.embeddings(name, tensor, 2, "(M, D)")
    checks.same_kind({"query": query} | tensors)
    n, m = len(query), len(documents[0])
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (m, query.shape[1]):
            raise ValueError(f"{name} must have shape {(m, query.shape[1])}, got {tuple(tensor.shape)}")
    if checks.whole("offset", offset, 0) + n > m:
        raise ValueError(f"documents must have {offset + n} rows or more, offset={offset} and {n} queries, got {m}")
    wanted = [name for name in ("query_to_query", "doc_to_query") if name in directions]
    if n != m and wanted and all_queries is None:
        raise ValueError(f"{wanted[0]!r} compares with the queries of all {m} documents: pass them as all_queries")
    return documents


class MultipleNegativesLoss(WithTemperature):
    """InfoNCE with hard negatives, in up to four directions; see `multiple_negatives`.

    Args:
        temperature, directions, partition, hardness, hardness_strength, normalize, reduction, backend, workspace_limit:
            as in `multiple_negatives`.

    Example:
        >>> loss = MultipleNegativesLoss(hardness="hard_negatives", hardness_strength=5.0)
        >>> query, positive, hard = (torch.randn(32, 128, requires_grad=True) for _ in range(3))
        >>> loss(query, [positive, hard]).backward()
    """

    shown = ("temperature", "directions", "partition", "hardness", "hardness_strength", "reduction")

    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        *,
        directions: Collection[str] = ("query_to_doc",),
        partition: str = "joint",
        hardness: str | None = None,
        hardness_strength: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        workspace_limit: int | None = None,
    ):
        super().__init__(temperature, reduction, normalize, backend, workspace_limit)
        check_options(directions, partition, hardness, hardness_strength)
        self.directions = tuple(directions)
        self.partition = partition
        self.hardness = hardness
        self.hardness_strength = hardness_strength

    def forward(
        self,
        query: Tensor,
        documents: Sequence[Tensor] | Tensor,
        *,
        offset: int = 0,
        all_queries: Tensor | None = None,
    ) -> Tensor:
        return multiple_negatives(
            query,
            documents,
            self.temperature,
            directions=self.directions,
            partition=self.partition,
            hardness=self.hardness,
            hardness_strength=self.hardness_strength,
            offset=offset,
            all_queries=all_queries,
            **self.options,
        )
