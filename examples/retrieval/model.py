"""Small bi-encoder: hashed words and character n-grams, one embedding table, one residual layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize
from torch import Tensor, nn

HASH_BITS = 16


@dataclass(frozen=True)
class Bags:
    """Rows of weighted features in the layout of `nn.EmbeddingBag`."""

    features: Tensor
    offsets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, rows: csr_matrix, device: torch.device) -> Bags:
        features = torch.from_numpy(rows.indices.astype(np.int64))
        offsets = torch.from_numpy(rows.indptr[:-1].astype(np.int64))
        weights = torch.from_numpy(rows.data.astype(np.float32))
        return cls(features.to(device), offsets.to(device), weights.to(device))


def hashed_features(texts: Sequence[str], bits: int = HASH_BITS) -> csr_matrix:
    """Hashes words and pairs of words into one half of the columns, character 3- to 5-grams into the other.

    Every row has length 1.
    """
    halves = []
    for analyzer, ngrams in (("word", (1, 2)), ("char_wb", (3, 5))):
        hashing = HashingVectorizer(
            n_features=2**bits, analyzer=analyzer, ngram_range=ngrams, norm=None, alternate_sign=False
        )
        halves.append(hashing.transform(texts))
    rows = hstack(halves).tocsr()
    rows.data = np.log1p(rows.data)
    return normalize(rows)


class Encoder(nn.Module):
    """Encoder of queries and of keys alike: both towers share every weight. The loss normalises the output."""

    def __init__(self, dim: int, bits: int = HASH_BITS) -> None:
        super().__init__()
        self.dim = dim
        self.table = nn.EmbeddingBag(2 * 2**bits, dim, mode="sum")
        # Only directions count, so a small table changes nothing at first; it lets Adam's fixed step move it far.
        nn.init.normal_(self.table.weight, std=0.01)
        self.residual = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, bags: Bags) -> Tensor:
        pooled = self.table(bags.features, bags.offsets, bags.weights)
        scaled = F.normalize(pooled, dim=-1) * self.dim**0.5
        return scaled + self.residual(scaled)


@torch.no_grad()
def embed(encoder: Encoder, rows: csr_matrix, device: torch.device, batch: int = 2048) -> Tensor:
    """Embeds all rows, in float32 and normalised."""
    starts = range(0, rows.shape[0], batch)
    encoded = [encoder(Bags.of(rows[start : start + batch], device)) for start in starts]
    return F.normalize(torch.cat(encoded), dim=-1)
