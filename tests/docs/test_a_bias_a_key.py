"""What docs/key-bias.md builds with a bias equals dense code in float64, and so do its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.documentation import blocks
from torch import Tensor

N, D = 24, 6


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for code in blocks("docs/key-bias.md"):
        exec(code, names)
    return names


def rows(n: int = N) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64)


def cosines(query: Tensor, key: Tensor, t: float) -> Tensor:
    return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / t


def agree(ours: Any, dense: Any, *leaves: Tensor) -> None:
    results = []
    for function in (ours, dense):
        inputs = [x.detach().requires_grad_() for x in leaves]
        value = function(*inputs)
        results.append([value, *torch.autograd.grad(value, inputs)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_the_logits_of_a_sampled_softmax_are_corrected_by_log_q(page: dict[str, Any]) -> None:
    probability = torch.softmax(torch.randn(N, dtype=torch.float64), 0)

    def dense(query: Tensor, key: Tensor) -> Tensor:
        return F.cross_entropy(cosines(query, key, 0.05) - probability.log(), torch.arange(N))

    agree(lambda q, k: page["corrected"](q, k, probability), dense, rows(), rows())


def test_the_positive_may_stay_uncorrected(page: dict[str, Any]) -> None:
    probability = torch.softmax(torch.randn(N, dtype=torch.float64), 0)

    def dense(query: Tensor, key: Tensor) -> Tensor:
        correction = (probability * (N - 1)).log().expand(N, N) * (1 - torch.eye(N, dtype=torch.float64))
        return F.cross_entropy(cosines(query, key, 0.05) - correction, torch.arange(N))

    item = torch.arange(N)
    agree(lambda q, k: page["corrected_negatives"](q, k, probability, item), dense, rows(), rows())


def test_both_corrections_estimate_the_softmax_over_all_items(page: dict[str, Any]) -> None:
    """The first but for a constant, which is the logarithm of how many keys there are; without one it is far off."""
    items, probability = rows(60), torch.softmax(torch.linspace(0, 5, 60, dtype=torch.float64), 0)
    drawn = torch.multinomial(probability, 4000, replacement=True)
    query = items[drawn] + 2 * rows(len(drawn))
    key, q = items[drawn], probability[drawn]
    truth = F.cross_entropy(cosines(query, items, 0.3), drawn)
    first = page["corrected"](query, key, q, temperature=0.3)
    plain = page["info_nce"](query, key, temperature=0.3)
    second = page["corrected_negatives"](query, key, q, drawn, temperature=0.3)
    s = cosines(query, items, 0.3).exp()  # a row's sum, each draw of which is exp(s_j) / q_j, has this standard error
    spread = ((s.square() / probability).sum(1) / s.sum(1).square() - 1).sqrt().mean() / len(drawn) ** 0.5
    assert abs(second - truth) < 3 * spread < 0.25  # by which the others are far off
    assert abs(first - truth) > 0.5
    assert abs(plain - truth) > 0.5
    gradients = []
    for loss in (
        lambda x: F.cross_entropy(cosines(x, items, 0.3), drawn),
        lambda x: page["corrected"](x, key, q, temperature=0.3),
        lambda x: page["corrected_negatives"](x, key, q, drawn, temperature=0.3),
        lambda x: page["info_nce"](x, key, temperature=0.3),
    ):
        x = query.detach().requires_grad_()
        gradients.append(torch.autograd.grad(loss(x), x)[0])
    errors = [((g - gradients[0]).norm() / gradients[0].norm()).item() for g in gradients[1:]]
    assert errors[1] < 0.1 < errors[2], errors


@pytest.mark.parametrize("both", [False, True])
def test_a_bias_of_squared_norms_makes_distances(page: dict[str, Any], both: bool) -> None:
    def dense(query: Tensor, key: Tensor) -> Tensor:
        logits, index = -(torch.cdist(query, key) ** 2) / (2 * 0.5), torch.arange(N)
        loss = F.cross_entropy(logits, index)
        return (loss + F.cross_entropy(logits.T, index)) / 2 if both else loss

    agree(page["euclidean_both" if both else "euclidean"], dense, rows(), rows())


def test_padded_rows_change_nothing(page: dict[str, Any]) -> None:
    there = torch.rand(N) < 0.7

    def dense(query: Tensor, key: Tensor) -> Tensor:
        return F.cross_entropy(cosines(query[there], key[there], 0.05), torch.arange(int(there.sum())))

    agree(lambda q, k: page["padded"](q, k, there), dense, rows(), rows())


def test_a_key_with_the_logarithm_of_its_count_is_as_many_keys(page: dict[str, Any]) -> None:
    m = 9
    which = torch.cat([torch.arange(m), torch.randint(m, (N - m,))])
    count = torch.bincount(which)

    def dense(query: Tensor, key: Tensor) -> Tensor:
        return F.cross_entropy(cosines(query, key[which], 0.05), torch.arange(N))

    agree(lambda q, k: page["without_copies"](q, k, count, which), dense, rows(), rows(m))
