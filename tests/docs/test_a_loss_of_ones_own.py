"""The losses that docs/own-loss.md builds equal their dense forms in float64, and so do their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.documentation import blocks
from torch import Tensor

N, D, CLASSES = 40, 12, 5


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for code in blocks("docs/own-loss.md"):
        exec(code, names)
    return names


def logits(query: Tensor, key: Tensor, temperature: Any) -> Tensor:
    return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / temperature


def focal(query: Tensor, key: Tensor, temperature: Any, gamma: float) -> Tensor:
    p = torch.softmax(logits(query, key, temperature), dim=1).diagonal()
    return (-((1 - p) ** gamma) * torch.log(p)).mean()


def margin(query: Tensor, key: Tensor, temperature: Any, margin: float) -> Tensor:
    scores = logits(query, key, 1) - margin * torch.eye(len(query), dtype=query.dtype)
    index = torch.arange(len(query))
    return (F.cross_entropy(scores / temperature, index) + F.cross_entropy(scores.T / temperature, index)) / 2


def decoupled(query: Tensor, key: Tensor, labels: Tensor, temperature: Any, spread: float) -> Tensor:
    scores = logits(query, key, temperature)
    negatives = scores.masked_fill(labels[:, None] == labels, -torch.inf)
    counts = (labels[:, None] != labels).any(1)
    rows = spread * torch.logsumexp(negatives[counts], dim=1) - scores.diagonal()[counts]
    return rows.mean()


def case(name: str) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    """Return the dense form, what lies between the embeddings and the temperature, and the options."""
    return {
        "focal_info_nce": (focal, (), {"gamma": 1.5}),
        "margin_info_nce": (margin, (), {"margin": 0.3}),
        "decoupled_loss": (decoupled, (torch.arange(N) % CLASSES,), {"spread": 0.7}),
    }[name]


def compared(page: dict[str, Any], name: str, dtype: torch.dtype, t: float = 0.2) -> list[tuple[Tensor, Tensor]]:
    """Return the loss and its gradients, beside those of the dense form of the same values in float64."""
    torch.manual_seed(0)
    query = torch.randn(N, D, dtype=torch.float64)
    inputs = [query, query + torch.randn(N, D, dtype=torch.float64), torch.tensor([t], dtype=torch.float64)]
    inputs = [x.to(dtype) for x in inputs]
    dense, between, options = case(name)
    results = []
    for function, kind in ((page[name], dtype), (dense, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        value = function(leaves[0], leaves[1], *between, leaves[2], **options)
        results.append([value, *torch.autograd.grad(value, leaves)])
    return list(zip(*results, strict=True))


NAMES = ["focal_info_nce", "margin_info_nce", "decoupled_loss"]


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_equals_its_dense_form(page: dict[str, Any], name: str) -> None:
    for ours, dense in compared(page, name, torch.float64):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_in_float32_is_as_accurate_as_the_librarys(page: dict[str, Any], name: str) -> None:
    for ours, dense in compared(page, name, torch.float32):
        error = torch.linalg.vector_norm(ours.double() - dense) / torch.linalg.vector_norm(dense)
        assert error < 1e-5, (name, error)


def test_a_small_focal_loss_keeps_its_digits(page: dict[str, Any]) -> None:
    torch.manual_seed(0)
    query = torch.randn(N, 64, dtype=torch.float64)
    key = query + 0.1 * torch.randn(N, 64, dtype=torch.float64)
    exact = page["focal_info_nce"](query, key, 0.03).item()
    assert 0 < exact < 1e-12
    got = page["focal_info_nce"](query.float(), key.float(), 0.03).item()
    assert got == pytest.approx(exact, rel=1e-4)
    p = torch.softmax(logits(query.float(), key.float(), 0.03), dim=1).diagonal()
    assert not torch.log(p).any()  # what the page warns of


def test_a_row_whose_class_is_everyone_has_no_gradient(page: dict[str, Any]) -> None:
    query, key = (torch.randn(6, D, requires_grad=True) for _ in range(2))
    value = page["decoupled_loss"](query, key, torch.zeros(6, dtype=torch.long))
    gradients = torch.autograd.grad(value, (query, key))
    assert value == 0
    assert not any(g.any() for g in gradients)


def test_a_focal_loss_without_negatives_has_no_gradient(page: dict[str, Any]) -> None:
    query, key = (torch.randn(1, D, requires_grad=True) for _ in range(2))
    value = page["focal_info_nce"](query, key, gamma=0.5)
    gradients = torch.autograd.grad(value, (query, key))
    assert value == 0
    assert not any(g.any() for g in gradients)


def test_the_statistics_are_those_of_the_table() -> None:
    import fused_infonce

    query, key = torch.randn(2, 9, D, dtype=torch.float64)
    rows = fused_infonce.statistics(query, key, temperature=0.3)
    scores = logits(query, key, 0.3)
    negatives = scores.masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)
    p = torch.softmax(negatives, dim=1)
    torch.testing.assert_close(rows.pos, scores.diagonal())
    torch.testing.assert_close(rows.neg, torch.logsumexp(negatives, dim=1))
    torch.testing.assert_close(rows.mean, (p * scores).sum(1))
    torch.testing.assert_close(rows.maximum, negatives.amax(1))
    torch.testing.assert_close(rows.scale, 1 / torch.exp(negatives - negatives.amax(1, keepdim=True)).sum(1))
    alone = fused_infonce.statistics(query[:1], key[:1], temperature=0.3)
    torch.testing.assert_close(alone.pos, scores[0, :1])
    assert [x.item() for x in alone[1:]] == [-torch.inf, 0, -torch.inf, 0]
