"""Random calls of sentence-transformers' losses and of their drop-ins; the library must be installed."""

from __future__ import annotations

import random
from functools import partial

import torch
import torch.nn.functional as F
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as originals
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from fused_infonce.compat import sentence_transformers as drop_in

from .side_by_side import assert_same

PLAIN, CACHED = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
KINDS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
GTE = ("query_to_doc", *OTHERS)


class Model(nn.Sequential):
    """A model of means of token embeddings, with dropout: the part of a SentenceTransformer that the losses use."""

    def __init__(self, d=12, dropout=0.2):
        super().__init__(nn.Embedding(50, d), nn.Dropout(dropout), nn.Linear(d, d))
        self.d = d

    def forward(self, features):
        x = self[0](features["input_ids"]) * features["attention_mask"][..., None]
        return features | {"sentence_embedding": self[2](self[1](x.sum(1)))}

    def get_embedding_dimension(self):
        return self.d


class Given(nn.Sequential):
    """A model of sentence-transformers of which the losses see the embeddings that come under a key."""

    max_seq_length = 8

    def __init__(self, key):
        super().__init__(nn.Identity())
        self.key = key
        words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)

    def forward(self, features):
        return features | {"sentence_embedding": features[self.key]}


def features(columns=3, n=7):
    masks = [torch.arange(5) < torch.randint(2, 6, (n, 1)) for _ in range(columns)]
    return [{"input_ids": torch.randint(50, (n, 5)), "attention_mask": mask.long()} for mask in masks]


def configuration(seed):
    """Return rows, components, columns, dtype and options of a random call."""
    draw = random.Random(seed)
    partition = draw.choice(["joint", "joint", "per_direction"])
    others = ("doc_to_query",) if partition == "per_direction" else OTHERS
    directions = ["query_to_doc", *(x for x in others if draw.random() < 0.5)]
    draw.shuffle(directions)
    options = {
        "scale": draw.choice([1, 5.5, 20, 20, 50.0, 100.0]),
        "similarity_fct": draw.choice([util.cos_sim, util.pytorch_cos_sim, util.dot_score]),
        "directions": tuple(directions),
        "partition_mode": partition,
        "hardness_mode": draw.choice(KINDS),
        "hardness_strength": draw.choice([0.5, 5.0, 9]),
    }
    dtype = draw.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16])
    return draw.randint(4, 40), draw.randint(2, 48), draw.randint(2, 5), dtype, options


def columns_of(n, d, count, dtype=torch.float32, dot=False):
    """Return anchors, positives somewhat alike and hard negatives, as unit rows for the dot product."""
    anchor = torch.randn(n, d, dtype=torch.float64)
    alike = [0.4, *[0.2] * (count - 2)]
    columns = [anchor, *(k * anchor + torch.randn(n, d, dtype=torch.float64) for k in alike)]
    columns = [F.normalize(x, dim=1) if dot else x for x in columns]
    return {f"column_{i}": x.to(dtype) for i, x in enumerate(columns)}


def call(loss, **columns):
    """Return the loss of these embeddings, computed in mini-batches by a cached loss."""
    if hasattr(loss, "mini_batch_size"):
        return loss.calculate_loss([list(x.split(loss.mini_batch_size)) for x in columns.values()])
    return loss.compute_loss_from_embeddings(list(columns.values()), None)


def both(name, model=Model, **options):
    return [getattr(where, name)(model(), **options) for where in (drop_in, originals)]


def assert_same_in(configuration, name, **options):
    n, d, count, dtype, more = configuration
    columns = columns_of(n, d, count, dtype, more["similarity_fct"] is util.dot_score)
    try:
        assert_same(*(partial(call, loss) for loss in both(name, **more, **options)), columns, 1 / more["scale"])
    except AssertionError as why:
        raise AssertionError(f"{n} x {d}, {count} columns, {dtype}, {more}") from why
