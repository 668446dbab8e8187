"""Losses of sentence-transformers 6.2.0 without the similarity matrices.

Each is a subclass that computes only the loss over embeddings itself: embedding the columns, GradCache, configuration,
citation and what `MatryoshkaLoss` and the trainer rely on are the original's. A call that the fused loss refuses, such
as one with another similarity than the cosine or the dot product, with sparse embeddings or with columns of different
sizes, is the original's own: its value, or its error. Known differences:

- The loss is differentiable once: `create_graph=True` in the backward raises RuntimeError.
- Similarities of 16-bit embeddings, and under autocast, are never rounded to 16 bits, so that losses and gradients are
  nearer to the exact values than there.
- The gradient of an embedding of zeros is 0, where `torch.nn.functional.normalize` gives 1e12 times the upstream.
- Queries are gathered only for the directions that compare with them.
- The cached loss is not chunked by `mini_batch_size`, and its progress bar shows the embedding alone.
- On a GPU the value of a scale tensor is not read: one that is not positive gives NaN.

`MultipleNegativesRankingLoss` and `CachedMultipleNegativesRankingLoss` serve in place of the deprecated symmetric ones,
with the options that their warnings name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses as original
from sentence_transformers.util import (
    SimilarityFunction,
    all_gather_with_grad,
    cos_sim,
    dot_score,
    get_rank,
    pytorch_cos_sim,
)
from torch import Tensor

from ..functional import multiple_negatives
from .common import said, say_once

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]


class MultipleNegativesRankingLoss(original.MultipleNegativesRankingLoss):
    """InfoNCE of anchors against the candidates of the batch; see `functional.multiple_negatives` for the formulas.

    Args:
        model: a SentenceTransformer.
        scale: 1 / temperature, a positive number or a tensor of one element, which gets a gradient.
        similarity_fct: `cos_sim`, `dot_score`, or a model's `similarity` where it is one of these.
        gather_across_devices: this process's rows against the candidates of all, with gradients.
        directions, partition_mode, hardness_mode, hardness_strength: the `directions`, `partition`, `hardness` and
            `hardness_strength` of `functional.multiple_negatives`.

    Example:
        >>> loss = MultipleNegativesRankingLoss(model, scale=20.0)
        >>> trainer = SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss)
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The 0-d loss of [anchors, positives, hard negatives...], (N, D) each; float32 or float64, under autocast the
        dtype that the original's has."""
        try:
            return _multiple_negatives(self, embeddings)
        except (TypeError, ValueError) as why:
            loss = super().compute_loss_from_embeddings(embeddings, labels)  # or its error, in the context of ours
            say_once("MultipleNegativesRankingLoss", said(why))
            return loss


class CachedMultipleNegativesRankingLoss(original.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` by GradCache: embeddings are made twice, in mini-batches, the second time with the
    gradients of the loss over all of them.

    Args:
        mini_batch_size, mini_batch_num_tokens: rows, or tokens, that are embedded at a time; the loss is that of the
            whole batch whatever they are.
        show_progress_bar: while embedding.
        The others as in `MultipleNegativesRankingLoss`.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The 0-d loss of the embeddings of every column, in mini-batches; detached `with_backward`, which gives these
        their gradients."""
        try:
            loss = _multiple_negatives(self.loss, [torch.cat(parts) for parts in reps])
        except (TypeError, ValueError) as why:
            loss = super().calculate_loss(reps, labels, with_backward=with_backward)
            say_once("CachedMultipleNegativesRankingLoss", said(why))
            return loss
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


def _multiple_negatives(loss: Any, embeddings: Sequence[Tensor]) -> Tensor:
    """What `loss`, an original or one of ours, makes of [anchors, positives, hard negatives...]."""
    normalize = _is_cosine(loss.similarity_fct)
    query, *documents = _alike(embeddings)
    offset, every = 0, None
    if loss.gather_across_devices:
        if {"query_to_query", "doc_to_query"}.intersection(loss.directions):
            every = all_gather_with_grad(query)
        documents = [all_gather_with_grad(x) for x in documents]
        offset = get_rank() * len(query)
    value = multiple_negatives(
        query,
        documents,
        1 / loss.scale,
        directions=loss.directions,
        partition=loss.partition_mode,
        hardness=loss.hardness_mode,
        hardness_strength=loss.hardness_strength,
        offset=offset,
        all_queries=every,
        normalize=normalize,
    )
    return value.to(_loss_dtype(query, loss.scale))


def _is_cosine(similarity: Any) -> bool:
    """Or the dot product."""
    kind = getattr(getattr(similarity, "__self__", None), "similarity_fn_name", None)
    if kind is not None and getattr(similarity, "__name__", "") == "similarity":  # that of a model
        similarity = SimilarityFunction.to_similarity_fn(kind)
    if similarity is dot_score:
        return False
    if similarity is cos_sim or similarity is pytorch_cos_sim:
        return True
    raise TypeError("similarity_fct must be cos_sim or dot_score for the fused loss")


def _alike(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Dense columns of one shape; where their dtypes differ, in float32 at least, as the originals have all of them."""
    for i, x in enumerate(embeddings):
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.shape != embeddings[0].shape:
            raise ValueError(f"columns must be dense tensors of one shape for the fused loss, got another at {i}")
    if len({x.dtype for x in embeddings}) == 1:
        return list(embeddings)
    return [x.float() if x.is_floating_point() and x.dtype.itemsize <= 2 else x for x in embeddings]


@torch.no_grad()
def _loss_dtype(rows: Tensor, scale: float | Tensor) -> torch.dtype:
    """Of `logsumexp(scale cos)` of these rows in at least float32: under autocast it depends on the device."""
    one = torch.zeros((1, 1), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    return torch.logsumexp(one @ one * scale, dim=1).dtype
