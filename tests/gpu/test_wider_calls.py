"""Biases, several ids, masks, margins, negatives by index and several positives in compiled kernels.

Each call is held against the reference in float64, and none waits for the GPU. See conftest.py for these without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import bounds, error, evaluate
from support.stand_in import DEVICE, forbid_waiting, size
from torch import Tensor

from fused_infonce import info_nce

pytestmark = pytest.mark.usefixtures("triton_device")
N, D, H, M = size(3001, 20), size(200, 12), size(7, 3), size(5000, 30)
T = 0.1


def ids(n: int, *shape: int) -> Tensor:
    return torch.randint(max(n // 4, 2), (n, *shape), device=DEVICE)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, D, device=DEVICE)


def bias(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, device=DEVICE)


def ragged(n: int, h: int) -> Tensor:
    return torch.arange(h, device=DEVICE) < torch.randint(h + 1, (n, 1), device=DEVICE)


# what a call takes besides queries and keys: floating tensors have gradients
CALLS: dict[str, Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "a bias a key": lambda: ({"key_bias": bias(N)}, {}),
    "of both directions": lambda: ({"key_bias": bias(N)}, {"symmetric": True, "positive_bias": False}),
    "of paired negatives": lambda: (
        {"negative_keys": rows(N, H), "negative_bias": bias(N, H)},
        {"negative_mode": "paired", "in_batch_negatives": True},
    ),
    "a mask": lambda: (
        {"negative_keys": rows(N, H), "negative_mask": ragged(N, H)},
        {"negative_mode": "paired", "in_batch_negatives": True},
    ),
    "a bias in one pass": lambda: ({}, {"temperature": T, "key_bias": 15 * bias(N)}),
    "of both directions in one pass": lambda: ({}, {"temperature": T, "key_bias": 15 * bias(N), "symmetric": True}),
    "several ids": lambda: ({"key_ids": ids(N, 3)}, {"symmetric": True}),
    "of paired rows": lambda: (
        {"negative_keys": rows(N, H), "key_ids": ids(N, 2), "negative_ids": torch.randint(N, (N, H, 2), device=DEVICE)},
        {"negative_mode": "paired", "in_batch_negatives": True},
    ),
    "a margin": lambda: ({}, {"margin": 0.2}),
    "by index": lambda: (
        {"negative_keys": rows(M), "negative_index": torch.randint(-1, M, (N, H), device=DEVICE)},
        {"in_batch_negatives": True},
    ),
    "several positives": lambda: ({"target": torch.randint(N, (N, 3), device=DEVICE)}, {"positives": "each"}),
}


@pytest.fixture
def no_synchronisation():
    yield lambda: forbid_waiting(True)
    forbid_waiting(False)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_losses_and_gradients_keep_the_bounds_without_waiting(name, dtype, no_synchronisation):
    more, options = CALLS[name]()
    inputs = {"query": rows(N), "positive_key": rows(N), "temperature": torch.tensor(T, device=DEVICE), **more}
    inputs = {n: x for n, x in inputs.items() if n not in options}
    vectors = ("temperature", "key_bias", "negative_bias")
    inputs = {n: x.to(dtype) if x.is_floating_point() and n not in vectors else x for n, x in inputs.items()}
    evaluate(info_nce, inputs, backend="triton", **options)  # compiles
    no_synchronisation()
    loss, gradients = evaluate(info_nce, inputs, backend="triton", **options)
    forbid_waiting(False)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    want, truth = evaluate(info_nce, exact, backend="reference", **options)
    of_loss, of_gradients = bounds(dtype, T, N)
    assert error(loss, want) <= of_loss
    for n, gradient in truth.items():
        assert error(gradients[n], gradient) <= (1e-4 if n == "temperature" else of_gradients), n


def test_positives_by_ids_wait_once():
    """For how many pairs there are; the losses are those of the reference."""
    query, key, names = rows(N), rows(N), ids(N)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        inputs = {"query": query.to(dtype), "positive_key": key.to(dtype)}
        results.append(evaluate(info_nce, inputs, temperature=T, positive_ids=names, positives="all", backend=backend))
    (loss, gradients), (want, truth) = results
    assert error(loss, want) <= 1e-5
    for name, gradient in truth.items():
        assert error(gradients[name], gradient) <= 1e-5, name
