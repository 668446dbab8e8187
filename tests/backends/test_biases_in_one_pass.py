"""Biases of any size in the one-pass plans of a GPU, where none is read, against dense code in float64."""

from __future__ import annotations

import math

import pytest
import torch
from oracles.info_nce import info_nce as dense_info_nce
from support.helpers import error

from fused_infonce import explain, info_nce
from fused_infonce.backends import plan

N, D, H = 97, 24, 3
pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    """Chunks of a few rows and no lower bound on D; no bias is read, and tiles on the diagonal are apart."""
    launch = pytest.importorskip("fused_infonce.backends.triton.launch", exc_type=ImportError)
    monkeypatch.setattr(launch, "PEELED", 1)
    for name in ("GPU_BOTH_DIM", "GPU_ONEPASS_DIM", "GPU_ONEPASS_ROWS"):
        monkeypatch.setattr(plan, name, 1)
    for name in ("GPU_DENSE", "GPU_DENSE_WIDE"):
        monkeypatch.setattr(plan, name, 0)
    monkeypatch.setattr("fused_infonce.compose.biases.bound_of", lambda *biases: None)


def raised(*shape: int) -> torch.Tensor:
    """One key is 45 above the others: of its own row it is the positive, where the others' exponentials are small."""
    bias = torch.zeros(shape)
    bias[..., 1] = 45
    return bias


BIASES = {
    "10": lambda *shape: 10 * (2 * torch.rand(shape) - 1),
    "45": lambda *shape: 45 * (1 - 2.0 * (torch.rand(shape) < 0.5)),
    "one": raised,
    "all": lambda *shape: torch.randn(shape) - 200,
    "left out": lambda *shape: (5 * torch.randn(shape)).masked_fill(torch.rand(shape) < 0.3, -math.inf),
}
IDS = torch.arange(N) % 5
TARGET = torch.where(torch.arange(N) % 4 == 0, -100, torch.arange(N) * 7 % N)
CALLS = {
    "one": ([], {"key_ids": IDS, "workspace_limit": 2**16}),
    "target": ([], {"target": TARGET}),
    "both": ([], {"symmetric": True, "key_ids": IDS}),
    "in place": ([(13, D)], {}),
    "more": ([(13, D)], {"in_batch_negatives": True}),
    "paired": ([(N, H, D)], {"in_batch_negatives": True, "negative_mode": "paired"}),
}
CASES = [("one", name) for name in BIASES] + [("both", name) for name in BIASES]
CASES += [("target", "all"), ("in place", "45"), ("in place", "one"), ("more", "45"), ("paired", "45")]
CASES += [("paired", "left out")]


def call_of(name, kind, dtype):
    """Return rows and options of a call, with zero rows."""
    shapes, options = CALLS[name]
    query = torch.randn(N, D)
    rows = [query, query + torch.randn(N, D), *map(torch.randn, shapes)]
    rows[0][3], rows[1][5] = 0, 0
    options = options | {"key_bias": BIASES[kind](N)}
    if shapes:
        options["negative_bias"] = BIASES[kind](*shapes[0][:-1])
    if kind == "left out":
        options["positive_bias"] = False
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    biases = {k: v.to(exact) for k, v in options.items() if k.endswith("_bias") and k != "positive_bias"}
    return [x.to(dtype).requires_grad_() for x in rows], options | biases


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1 / 64, 0.05])
def test_biases_of_any_size_keep_the_bounds(name, kind, dtype, temperature):
    if temperature == 0.05 and kind != "10":  # a wider range of cosines is the harder case
        return
    rows, options = call_of(name, kind, dtype)
    options |= {"temperature": temperature}
    assert [p.name for p in explain(*rows, **options, backend="triton")] == ["onepass"]
    loss = info_nce(*rows, **options, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in rows]
    options = {k: v.double() if k in ("key_bias", "negative_bias") else v for k, v in options.items()}
    options.pop("workspace_limit", None)
    truth = dense_info_nce(*exact, **options)
    bound = 1e-5 * max(1, 0.05 / temperature)
    assert error(loss, truth) <= bound
    bound = 5e-3 if dtype == torch.bfloat16 else bound
    for grad, true_grad in zip(torch.autograd.grad(loss, rows), torch.autograd.grad(truth, exact), strict=True):
        assert error(grad, true_grad) <= bound


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_those_of_finite_differences(symmetric):
    inputs = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = {"key_bias": 45 * torch.randn(6, dtype=torch.float64), "symmetric": symmetric, "backend": "triton"}

    def loss(t, *rows):
        assert [p.name for p in explain(*rows, temperature=t, **options)] == ["onepass"]
        return info_nce(*rows, temperature=t, **options)

    assert torch.autograd.gradcheck(loss, (t, *inputs), fast_mode=True)


@pytest.mark.parametrize("biased", [False, True])
def test_both_directions_of_16_bit_rows_compile(biased):
    """While a call is recorded its temperature is not known to the kernels, whose 16-bit scores need a range."""
    torch._dynamo.reset()
    rows = [torch.randn(9, D).bfloat16().requires_grad_() for _ in range(2)]
    options = {"key_bias": 10 * torch.randn(9)} if biased else {}

    def loss(query, key):
        return info_nce(query, key, temperature=0.1, symmetric=True, backend="triton", **options)

    made = [f(*rows) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(made[1], made[0])
    for x, y in zip(*(torch.autograd.grad(value, rows) for value in made), strict=True):
        assert error(y, x) <= 5e-3
