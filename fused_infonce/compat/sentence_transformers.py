"""Losses of sentence-transformers 6.2.0 without the similarity matrices.

Each is a subclass that computes only the loss over embeddings itself: embedding the columns, GradCache, configuration,
citation and what `MatryoshkaLoss` and the trainer rely on are the original's. A call that the fused loss refuses, such
as one with another similarity than the cosine or the dot product, with sparse embeddings or with columns of different
sizes, is passed to sentence-transformers, whose value or error is returned. Known differences:

- The loss is differentiable once: `create_graph=True` in the backward raises RuntimeError.
- Similarities of 16-bit embeddings, and under autocast, are never rounded to 16 bits, so that losses and gradients are
  nearer to the exact values than there.
- The gradient of an embedding of zeros is 0, where `torch.nn.functional.normalize` gives 1e12 times the upstream.
- Queries are gathered only for the directions that compare with them.
- The cached losses are not chunked by `mini_batch_size`, and their progress bar shows the embedding alone.
- In the GISTEmbed losses a row is never its own negative; there it is where the guide finds its pair identical. A
  negative exactly as similar as the positive is kept however both were rounded. A temperature that is a tensor has a
  gradient; there that is NaN as soon as a negative is left out. A negative margin is left to the original's own code.
- On a GPU the value of a scale tensor is not read: one that is not positive gives NaN.

`MultipleNegativesRankingLoss` and `CachedMultipleNegativesRankingLoss` serve in place of the deprecated symmetric ones,
with the options that their warnings name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import sentence_transformers
import torch
from torch import Tensor, nn

try:
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.sentence_transformer import losses as original
    from sentence_transformers.util import (
        SimilarityFunction,
        all_gather_with_grad,
        batch_to_device,
        cos_sim,
        dot_score,
        get_rank,
        pytorch_cos_sim,
    )
except ImportError as error:
    found = sentence_transformers.__version__
    raise ImportError(f"this drop-in is for sentence-transformers 6.2, found {found}: {error}") from error

from ..backends.precision import accumulator
from ..distributed import DistributedLike
from ..functional import guided_info_nce, multiple_negatives
from .common import fused_or

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "GISTEmbedLoss",
    "MultipleNegativesRankingLoss",
]


class OverProcesses:
    """What all of these losses have beside the originals' arguments.

    Attributes:
        distributed: the processes whose rows make one batch, exactly, in place of the original's gathering; see
            docs/distributed.md. It is assigned, `loss.distributed = True`, since the constructors are the originals'.
            Nothing is then passed to the original: what the fused loss refuses is an error.
    """

    distributed: DistributedLike = False


class AssignableTemperature:
    """A `temperature` that is 1 / `scale`, as the originals have it, and may be assigned at any time."""

    scale: Any

    @property
    def temperature(self) -> Any:
        """The inverse of `scale`."""
        return 1 / self.scale

    @temperature.setter
    def temperature(self, value: Any) -> None:
        self.scale = 1 / value


class MultipleNegativesRankingLoss(AssignableTemperature, OverProcesses, original.MultipleNegativesRankingLoss):
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
        """Return the 0-d loss of [anchors, positives, hard negatives...], (N, D) each.

        It is float32, or float64 for float64 embeddings; under autocast it has the original's dtype.
        """
        original = partial(super().compute_loss_from_embeddings, embeddings, labels)
        fused = partial(_multiple_negatives, self, embeddings)
        return fused_or(original, "MultipleNegativesRankingLoss", fused, distributed=self.distributed)


class CachedMultipleNegativesRankingLoss(
    AssignableTemperature, OverProcesses, original.CachedMultipleNegativesRankingLoss
):  # fmt: skip
    """`MultipleNegativesRankingLoss` by GradCache, which embeds a batch twice in mini-batches to save memory.

    The second pass takes the gradients of the loss over the whole batch.

    Args:
        mini_batch_size, mini_batch_num_tokens: rows, or tokens, that are embedded at a time; the loss is that of the
            whole batch whatever they are.
        show_progress_bar: show a bar while embedding.
        The other arguments are those of `MultipleNegativesRankingLoss`.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the 0-d loss of the embeddings of every column, given in mini-batches.

        `with_backward` gives the embeddings their gradients and detaches the loss.
        """
        return fused_or(
            partial(super().calculate_loss, reps, labels, with_backward=with_backward),
            "CachedMultipleNegativesRankingLoss",
            lambda **given: _multiple_negatives(self.loss, [torch.cat(parts) for parts in reps], **given),
            _backward if with_backward else None,
            self.distributed,
        )


class GISTEmbedLoss(OverProcesses, original.GISTEmbedLoss):
    """InfoNCE without the negatives that a guide model takes for positives, and without (B, B, D) tensors of cosines.

    The formula is that of `functional.guided_info_nce`.

    Args:
        model, guide: SentenceTransformers with tokenizers.
        temperature: a positive number or a tensor of one element, which gets a gradient.
        margin_strategy, margin: with c the guide's cosine of a pair, negatives above c - margin ("absolute") or above
            c - margin |c| ("relative") are left out.
        contrast_anchors, contrast_positives: other anchors, and other positives, are negatives too.
        gather_across_devices: this process's anchors against the positives and negatives of all, with gradients.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Return the 0-d loss of (anchor, positive) or (anchor, positive, negative) columns of features."""
        columns = list(sentence_features)
        untouched = [dict(column) for column in columns]  # models write into what they are given
        if not 2 <= len(columns) <= 3:
            return super().forward(columns, labels)  # which raises its error
        rows = embed_columns(self.model, columns)
        with torch.no_grad():
            guides = embed_columns(self.guide, _features_of_guide(self, untouched))
        original = partial(super().forward, untouched, labels)
        fused = partial(_guided, self, rows, guides)
        return fused_or(original, "GISTEmbedLoss", fused, distributed=self.distributed)


class CachedGISTEmbedLoss(OverProcesses, original.CachedGISTEmbedLoss):
    """`GISTEmbedLoss` by GradCache, with any number of columns of negatives."""

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """Return the 0-d loss of the embeddings of every column, given in mini-batches, and of the guide's.

        `with_backward` gives the embeddings their gradients and detaches the loss.
        """

        def fused(**given: Any) -> Tensor:
            return _guided(self, *([torch.cat(parts) for parts in columns] for columns in (reps, reps_guided)), **given)

        original = partial(super().calculate_loss, reps, reps_guided, with_backward=with_backward)
        then = _backward if with_backward else None
        return fused_or(original, "CachedGISTEmbedLoss", fused, then, self.distributed)


def _backward(loss: Tensor) -> Tensor:
    """Make the gradients of a loss's embeddings, and return it detached."""
    loss.backward()
    return loss.detach()


def _features_of_guide(loss: Any, columns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the features that the guide embeds: those of the model, or of their texts by the guide's tokenizer."""
    if not loss.must_retokenize:
        return [dict(column) for column in columns]
    features = []
    for column in columns:
        tokens = column["input_ids"]
        if "cu_seq_lens_q" in column:  # a column's texts lie in one row, between these places
            tokens = [row.tolist() for row in torch.tensor_split(tokens[0].cpu(), column["cu_seq_lens_q"][1:-1].cpu())]
        texts = loss.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        features.append(batch_to_device(loss.guide.preprocess(texts), loss.guide.device))
    return features


def _guided(
    loss: Any, rows: Sequence[Tensor], guides: Sequence[Tensor], distributed: DistributedLike = False
) -> Tensor:  # fmt: skip
    """Return the value of `loss` for [anchors, positives, negatives...] and the guide's embeddings of their texts."""
    if len(rows) != len(guides) or len(rows) < 2:
        raise ValueError(f"as many columns must be embedded by the guide for the fused loss, got {len(guides)}")
    similarity, entropy = loss.similarity_fct, loss.cross_entropy_loss
    if type(similarity) is not nn.CosineSimilarity or type(entropy) is not nn.CrossEntropyLoss:
        raise TypeError("similarity_fct and cross_entropy_loss must be the original's for the fused loss")
    if loss.margin < 0:
        raise ValueError("margin must not be negative for the fused loss: an anchor would be its own negative")
    query, *documents = rows
    guide_query, *views = guides
    if any(len(x) != len(query) for x in documents):
        raise ValueError("columns must be of one size for the fused loss")
    offset = 0
    if loss.gather_across_devices and not distributed:
        documents, views = ([all_gather_with_grad(x) for x in columns] for columns in (documents, views))
        offset = get_rank() * len(query)
    more: dict[str, Any] = {}
    if len(documents) > 1:
        more = {"negative_keys": torch.cat(documents[1:]), "guide_negatives": torch.cat(views[1:])}
    value = guided_info_nce(
        query,
        documents[0],
        temperature=loss.temperature,
        guide_query=guide_query,
        guide_key=views[0],
        margin=-loss.margin,
        margin_strategy=loss.margin_strategy,
        contrast_queries=loss.contrast_anchors,
        contrast_keys=loss.contrast_positives,
        offset=offset,
        distributed=distributed,
        **more,
    )
    with torch.no_grad():
        one = loss.sim_matrix(query[:1], query[:1]) / loss.temperature
        # the dtype that the original's loss has
        dtype = entropy(one, torch.zeros(len(one), dtype=torch.int64, device=one.device)).dtype
    return value.to(dtype)


def _multiple_negatives(loss: Any, embeddings: Sequence[Tensor], distributed: DistributedLike = False) -> Tensor:
    """Return the value of `loss`, an original or a drop-in, for [anchors, positives, hard negatives...]."""
    normalize = _is_cosine(loss.similarity_fct)
    query, *documents = _alike(embeddings)
    offset, every = 0, None
    if loss.gather_across_devices and not distributed:
        if {"query_to_query", "doc_to_query"}.intersection(loss.directions):
            every = all_gather_with_grad(query)
        documents = [all_gather_with_grad(x) for x in documents]
        offset = get_rank() * len(query)
    value = multiple_negatives(
        query,
        documents,
        _temperature(loss.scale, query),
        directions=loss.directions,
        partition=loss.partition_mode,
        hardness=loss.hardness_mode,
        hardness_strength=0.0 if loss.hardness_mode is None else loss.hardness_strength,  # which is then ignored
        offset=offset,
        all_queries=every,
        normalize=normalize,
        distributed=distributed,
    )
    return value.to(_loss_dtype(query, loss.scale))


def _temperature(scale: Any, rows: Tensor) -> Any:
    """Return 1 / scale, in the dtype of the statistics where it is a tensor."""
    return 1 / (scale.to(accumulator(rows.dtype)) if isinstance(scale, Tensor) else scale)


def _is_cosine(similarity: Any) -> bool:
    """Return whether a similarity is the cosine, and not the dot product; any other is refused."""
    kind = getattr(getattr(similarity, "__self__", None), "similarity_fn_name", None)
    if kind is not None and getattr(similarity, "__name__", "") == "similarity":  # a model's method
        similarity = SimilarityFunction.to_similarity_fn(kind)
    if similarity is dot_score:
        return False
    if similarity is cos_sim or similarity is pytorch_cos_sim:
        return True
    raise TypeError("similarity_fct must be cos_sim or dot_score for the fused loss")


def _alike(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Return the columns, checked to be dense and of one shape; if their dtypes differ, in float32 at least.

    The originals have all embeddings in float32 at least.
    """
    for i, x in enumerate(embeddings):
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.shape != embeddings[0].shape:
            raise ValueError(f"columns must be dense tensors of one shape for the fused loss, got another at {i}")
    if len({x.dtype for x in embeddings}) == 1:
        return list(embeddings)
    return [x.float() if x.is_floating_point() and x.dtype.itemsize <= 2 else x for x in embeddings]


@torch.no_grad()
def _loss_dtype(rows: Tensor, scale: float | Tensor) -> torch.dtype:
    """Return the dtype of `logsumexp(scale cos)` in at least float32, which under autocast depends on the device."""
    one = torch.zeros((1, 1), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    return torch.logsumexp(one @ one * scale, dim=1).dtype
