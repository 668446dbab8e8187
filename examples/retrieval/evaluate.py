"""R@1 and MRR@10 of held-out descriptions that should find their own objects, for the encoder and for TF-IDF."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import FeatureUnion

from .mining import Pair
from .model import Encoder, embed, hashed_features

# The two forms of the queries: as described by Pair.strict_query and Pair.query.
FORMS = ("strict", "plain")


@dataclass(frozen=True)
class Scores:
    """Share of queries answered first, and mean of 1 / rank, counted up to rank 10."""

    recall_at_1: float
    mrr_at_10: float


def retrieval_scores(similarity: np.ndarray) -> Scores:
    """Scores of similarities whose row i should find column i. A tie with a wrong column counts as a miss."""
    own = similarity.diagonal()[:, None]
    rank = (similarity >= own).sum(axis=1)
    return Scores(float((rank == 1).mean()), float(np.where(rank <= 10, 1 / rank, 0.0).mean()))


def queries_of(pairs: list[Pair], form: str) -> list[str]:
    return [pair.strict_query if form == "strict" else pair.query for pair in pairs]


def encoder_scores(encoder: Encoder, held_out: list[Pair], device: torch.device) -> dict[str, Scores]:
    keys = embed(encoder, hashed_features([pair.key for pair in held_out]), device)
    scores = {}
    for form in FORMS:
        queries = embed(encoder, hashed_features(queries_of(held_out, form)), device)
        scores[form] = retrieval_scores((queries @ keys.T).cpu().numpy())
    return scores


def tfidf_settings() -> dict[str, TfidfVectorizer | FeatureUnion]:
    def vectorizer(analyzer: str, shortest: int, longest: int) -> TfidfVectorizer:
        return TfidfVectorizer(analyzer=analyzer, ngram_range=(shortest, longest), sublinear_tf=True)

    return {
        "words": vectorizer("word", 1, 1),
        "words 1-2": vectorizer("word", 1, 2),
        "characters 2-4": vectorizer("char_wb", 2, 4),
        "characters 3-5": vectorizer("char_wb", 3, 5),
        "words and characters 2-4": FeatureUnion(
            [("words", vectorizer("word", 1, 1)), ("characters", vectorizer("char_wb", 2, 4))]
        ),
    }


def tfidf_scores(train: list[Pair], held_out: list[Pair]) -> dict[str, dict[str, Scores]]:
    """Scores by setting and form of query, fitted on the very words that the encoder is trained on."""
    corpus = [text for pair in train for text in (pair.query, pair.key)]
    by_setting = {}
    for setting, vectorizer in tfidf_settings().items():
        vectorizer.fit(corpus)
        keys = vectorizer.transform([pair.key for pair in held_out])
        by_setting[setting] = {
            form: retrieval_scores((vectorizer.transform(queries_of(held_out, form)) @ keys.T).toarray())
            for form in FORMS
        }
    return by_setting
