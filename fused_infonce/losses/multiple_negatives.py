"""Multiple negatives ranking: queries against documents with hard negatives, in up to four directions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import checks
from ..backends import BackendName, Reduction
from ..backends.precision import without_autocast
from ..backends.recording import record_together
from ..backends.row_losses import infonce
from ..compose.arguments import call_options, temperature_of
from ..compose.biases import of_columns
from ..compose.ranking import Ranking
from ..compose.reduction import reduced, reduced_mean
from ..compose.rows import log_add
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
Partition = Literal["joint", "per_direction"]
Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PARTITIONS: tuple[Partition, ...] = get_args(Partition)
HARDNESS: tuple[Hardness, ...] = get_args(Hardness)


@together
def multiple_negatives(
    query: Tensor,
    documents: Sequence[Tensor] | Tensor,
    temperature: float | Tensor = 0.05,
    *,
    directions: Collection[Direction] = DIRECTIONS[:1],
    partition: Partition = "joint",
    hardness: Hardness | None = None,
    hardness_strength: float = 0.0,
    offset: int = 0,
    all_queries: Tensor | None = None,
    key_bias: Tensor | None = None,
    positive_bias: bool = True,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
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
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per query, for all
            directions; gradients flow to tensors.
        directions: "query_to_doc", which holds the positive, and any of the others.
        partition: "joint" (one softmax over all directions) or "per_direction" (one each; of "query_to_doc" and
            "doc_to_query" only, since the others do not hold the positive).
        hardness: None, or one of the above. "hard_negatives" has no effect without hard negatives.
        hardness_strength: not negative; 0 has no effect.
        offset: the row of the first query's own documents: `rank * N` of gathered ones.
        all_queries: (M, D), rows `offset` to `offset + N` being `query`; for "query_to_query" and "doc_to_query", which
            compare with all of them; both get gradients. None: `query`, which must have M rows then.
        key_bias: (1 + H, M) c, of the documents as they are stacked, floating, in nats: added to every s(a, x_j) where
            document j is what a query or a document is compared with; gradients flow to it. -inf leaves a document out,
            which may not be a query's positive. Not with a hardness.
        positive_bias: whether the logit of a query's positive has its bias too.
        normalize: divide every row by max(norm, 1e-12) first, so that scores are cosines.
        reduction: "mean", "sum" or "none" (one value per query).
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
            Beside it the hard negatives are held once in one tensor; several directions, or a hardness that tells a
            query's own hard negatives from others, hold 16-bit rows once in float32.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: `MultipleNegativesRankingLoss` of sentence-transformers; Henderson et al. 2017, arXiv:1705.00652; joint
    directions: Li et al. 2023, arXiv:2308.03281; hardness: Lan et al. 2025, arXiv:2503.04812, and Schechter Vera et al.
    2025, arXiv:2509.20354.
    """
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    check_options(directions, partition, hardness, hardness_strength)
    documents = _check_embeddings(query, documents, offset, all_queries, directions)
    if key_bias is not None and hardness_strength:
        raise ValueError("key_bias cannot be used with a hardness")
    ranking = Ranking(
        query, documents, query if all_queries is None else all_queries, offset, temperature_of(temperature, query),
        frozenset(directions), hardness, float(hardness_strength), normalize,
        of_columns(key_bias, positive_bias, query, documents, slice(offset, offset + len(query))),
    )  # fmt: skip
    both = ranking.columns and partition == "per_direction"
    if options.call is not None:
        ranking.check_own()
    if not ranking.strength and (ranking.directions == {"query_to_doc"} or both):
        return reduced(ranking.first, options, "infonce")
    ranking, products = ranking.widened() if options.call is None else ranking.of_all(options, key_bias, positive_bias)
    with products:
        pos, negs = ranking.scores(options)
    with without_autocast(query.device.type):
        if ranking.apart:
            negs[0] = log_add(negs[0], ranking.own_negatives())
        added = ranking.biases.offset  # to the positive of query_to_doc alone
        if partition == "per_direction":
            each = [pos, pos if added is None else pos - added]
            return reduced_mean(
                torch.stack([infonce(neg - p) for neg, p in zip(negs, each[: len(negs)], strict=True)]).mean(0), options
            )
        record_together()
        # With doc_to_query the sum holds the positive twice: log(k + exp(x)) = log k + log(1 + exp(x - log k)).
        log_k: float | Tensor = math.log(1 + ("doc_to_query" in directions))
        if log_k and added is not None:  # k = 1 + exp(-added): that of doc_to_query has no bias
            log_k = infonce(-added)
        return reduced_mean(log_k + infonce(reduce(log_add, negs) - pos - log_k), options)


def check_options(directions: Any, partition: str, hardness: str | None, hardness_strength: Any) -> None:
    """Check the options that the function and the module share."""
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
    checks.not_negative("hardness_strength", hardness_strength)
    if hardness is None and hardness_strength:
        kinds = ", ".join(map(repr, HARDNESS))
        raise ValueError(f"hardness_strength={hardness_strength} has no effect without hardness: one of {kinds}")


def _check_embeddings(
    query: Any, documents: Any, offset: Any, all_queries: Any, directions: Collection[str]
) -> list[Tensor]:
    """Return the columns of documents, a list of (M, D), checked together with the queries."""
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


class MultipleNegativesLoss(ContrastiveLoss):
    """InfoNCE of queries against documents with hard negatives, in up to four directions, as a module.

    The function `multiple_negatives` has the formulas.

    Args:
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        directions: a tuple of names: "query_to_doc", which must be there, "query_to_query", "doc_to_query",
            "doc_to_doc".
        partition: "joint" (one softmax over all directions) or "per_direction" (one each, and their mean).
        hardness: whose logits grow with their cosine: "in_batch_negatives" (documents of other queries),
            "hard_negatives" (the query's own), "all_negatives" (both), or None (nobody's).
        hardness_strength: by how much, as a multiple of the cosine; not negative.
        normalize: divide every row by its norm first, so that scores are cosines.
        reduction: "mean", "sum" or "none" (one value per query).
        learnable_temperature: hold the (1,) parameter `logit_scale = log(1 / temperature)`, as CLIP does. Give
            `loss.parameters()` to the optimizer, without weight decay.
        max_logit_scale: the largest `1 / temperature` that `clamp_logit_scale_()` leaves (CLIP: 100); None: no bound.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch memory; None: 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.
        record: keep what the rows of the last call were made of in `recorded`: the positives' logits, and the
            logsumexps and mean logits of the negatives.

    Example:
        >>> loss = MultipleNegativesLoss(hardness="hard_negatives", hardness_strength=5.0)
        >>> query, positive, hard = (torch.randn(32, 128, requires_grad=True) for _ in range(3))
        >>> loss(query, [positive, hard]).backward()
    """

    own = ("directions", "partition", "hardness", "hardness_strength")

    def __init__(
        self,
        temperature: TemperatureLike = 0.05,
        *,
        directions: Collection[Direction] = DIRECTIONS[:1],
        partition: Partition = "joint",
        hardness: Hardness | None = None,
        hardness_strength: float = 0.0,
        normalize: bool = True,
        reduction: Reduction = "mean",
        learnable_temperature: bool = False,
        max_logit_scale: float | None = None,
        backend: BackendName = "auto",
        workspace_limit: int | None = None,
        distributed: DistributedLike = False,
        record: bool = False,
    ):
        super().__init__(
            temperature, learnable_temperature, max_logit_scale, reduction, normalize, backend, workspace_limit,
            distributed, record,
        )  # fmt: skip
        check_options(directions, partition, hardness, hardness_strength)
        self.directions = tuple(directions)
        self.partition = partition
        self.hardness = hardness
        self.hardness_strength = hardness_strength

    def check_record(self) -> None:
        if self.hardness_strength:
            raise ValueError("record keeps statistics of the scores, which a hardness changes: set hardness_strength=0")

    def forward(
        self,
        query: Tensor,
        documents: Sequence[Tensor] | Tensor,
        *,
        offset: int = 0,
        all_queries: Tensor | None = None,
        key_bias: Tensor | None = None,
        positive_bias: bool = True,
    ) -> Tensor:
        """Return the loss of (N, D) queries and their documents: a positive each, then columns of hard negatives."""
        return multiple_negatives(
            query, documents, self.temperature, offset=offset, all_queries=all_queries, key_bias=key_bias,
            positive_bias=positive_bias, **self.options,
        )  # fmt: skip
