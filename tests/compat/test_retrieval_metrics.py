"""Retrieval metrics of a sweep against sentence-transformers' InformationRetrievalEvaluator."""

from __future__ import annotations

import pytest
import torch
from support.libraries import library
from torch import Tensor

from fused_infonce.temperature import sweep

evaluation = library("sentence_transformers.sentence_transformer.evaluation")

KS = [1, 3, 10]


class Encoded:
    """A model whose texts are the rows of tables that it was made with."""

    def __init__(self, query: Tensor, key: Tensor):
        self.query, self.key = query, key

    def encode_query(self, texts: list[str], **_) -> Tensor:
        return self.query[[int(text) for text in texts]]

    def encode_document(self, texts: list[str], **_) -> Tensor:
        return self.key[[int(text) for text in texts]]


def evaluated(query: Tensor, key: Tensor, target: Tensor) -> dict[str, dict[int, float]]:
    """Return the evaluator's metrics under dot products. It ranks by score, then by the keys' names."""
    evaluator = evaluation.InformationRetrievalEvaluator(
        {str(i): str(i) for i in range(len(query))}, {str(j): str(j) for j in range(len(key))},
        {str(i): {str(j)} for i, j in enumerate(target.tolist())}, mrr_at_k=KS, accuracy_at_k=KS, ndcg_at_k=[1],
        precision_recall_at_k=KS, map_at_k=[1], score_functions={"dot": lambda q, k: q @ k.T}, write_csv=False,
    )  # fmt: skip
    return evaluator.compute_all_metrics(Encoded(query, key))["dot"]


def moved(query: Tensor, key: Tensor, target: Tensor, by: float) -> tuple[Tensor, Tensor]:
    """Return embeddings in which every query's score with its positive is changed by so much, and no other score."""
    return torch.cat([query, torch.eye(len(key), dtype=query.dtype)[target]], 1), torch.cat(
        [key, by * torch.eye(len(key), dtype=key.dtype)], 1
    )


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_both_bounds_are_the_evaluators_metrics_with_ties_and_duplicates(start):
    """Scores are whole numbers, so that half of one lets a positive lose or win all of its ties and nothing else."""
    for case in range(start, start + 50):
        generator = torch.Generator().manual_seed(case)
        n, m, d = 2 + case % 17, 12 + case % 13, 1 + case % 5
        query, key = (torch.randint(-2, 3, (rows, d), generator=generator).float() for rows in (n, m))
        copies = torch.randint(m, (2, m // 3), generator=generator)
        key[copies[0]] = key[copies[1]]
        target = torch.randint(m, (n,), generator=generator)
        found = sweep(query, key, (0.5, 0.5), target=target, normalize=False)
        last, first = (evaluated(*moved(query, key, target, by), target) for by in (-0.5, 0.5))
        between = evaluated(query, key, target)
        for k in KS:
            for name, ours in (("accuracy@k", found.recall(k)), ("recall@k", found.recall(k)), ("mrr@k", found.mrr(k))):
                assert ours == pytest.approx((last[name][k], first[name][k]), abs=1e-12), (case, name, k)
                assert ours.pessimistic - 1e-12 <= between[name][k] <= ours.optimistic + 1e-12
