"""Division of the pairs into trained and held-out ones, with no description or name on both sides."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer

from .mining import Pair
from .text import words

# Of the distinct pairs of neighbouring words in two texts, the share in common from which they count as one text.
NEAR_DUPLICATE = 0.5


@dataclass(frozen=True)
class Split:
    """Pairs to train on, and pairs to evaluate with."""

    train: list[Pair]
    held_out: list[Pair]


def split_pairs(pairs: list[Pair], held_out: int, seed: int) -> Split:
    """Holds out whole groups of related pairs, one pair of each, so that nothing like it is trained on."""
    pairs = drop_repeats(pairs)
    group_of = related_groups(pairs)
    rng = np.random.default_rng(seed)
    groups = rng.permutation(group_of.max() + 1)[:held_out]
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(group_of):
        members[int(group)].append(index)
    chosen = [pairs[int(rng.choice(members[int(group)]))] for group in groups]
    excluded = {int(group) for group in groups}
    return Split([pair for pair, group in zip(pairs, group_of, strict=True) if int(group) not in excluded], chosen)


def drop_repeats(pairs: list[Pair]) -> list[Pair]:
    """Keeps the first of the pairs with the same text (inherited, copied) or the same key (overloads)."""
    texts: set[str] = set()
    keys: set[str] = set()
    kept = []
    for pair in pairs:
        if pair.query in texts or pair.key in keys:
            continue
        texts.add(pair.query)
        keys.add(pair.key)
        kept.append(pair)
    return kept


def related_groups(pairs: list[Pair]) -> np.ndarray:
    """Numbers the group of each pair: near-duplicate texts share one, and so do equal names (any `dot`)."""
    by_name: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        by_name[words(pair.name)].append(index)
    same_name = [link for same in by_name.values() for link in pairwise(same)]
    links = np.concatenate(
        [
            near_duplicates([pair.query for pair in pairs]),
            near_duplicates([pair.strict_query for pair in pairs]),
            np.array(same_name, dtype=np.int64).reshape(-1, 2),
        ]
    )
    graph = coo_matrix((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(len(pairs), len(pairs)))
    return connected_components(graph, directed=False)[1]


def near_duplicates(texts: list[str]) -> np.ndarray:
    """Pairs of row numbers whose sets of neighbouring words have a Jaccard similarity of NEAR_DUPLICATE or more."""
    vectorizer = CountVectorizer(ngram_range=(2, 2), binary=True, token_pattern=r"\S+", dtype=np.int32)
    shingles = vectorizer.fit_transform(texts)
    shared = (shingles @ shingles.T).tocoo()
    sizes = np.asarray(shingles.sum(axis=1)).ravel()
    jaccard = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data)
    near = jaccard >= NEAR_DUPLICATE
    return np.stack([shared.row[near], shared.col[near]], axis=1).astype(np.int64)
