"""Biases of any size in the one-pass plans of a GPU, where none is read, against dense code in float64."""

from __future__ import annotations

import math

import pytest
import torch
from oracles.clip import clip_loss as dense_clip_loss
from oracles.info_nce import info_nce as dense_info_nce
from support.helpers import error, every_pair

from fused_infonce import contrast, explain, info_nce
from fused_infonce.backends import plan
from fused_infonce.functional import clip_loss

N, D, H = 97, 24, 3
pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    """Chunks of a few rows and no lower bound on D; no bias is read, and tiles on the diagonal are apart."""
    launch = pytest.importorskip("fused_infonce.backends.triton.launch", exc_type=ImportError)
    monkeypatch.setattr(launch, "PEELED", 1)
    for name in ("GPU_SCORES_DIM", "GPU_ONEPASS_DIM", "GPU_ONEPASS_ROWS"):
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
AT = [(1 / 64, *case) for case in CASES]  # a wider range of cosines is the harder case
AT += [(0.05, *case) for case in CASES if case[1] == "10"]
NAMES = ("key_bias", "negative_bias", "image_bias", "text_bias")


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
    biases = {k: v.to(exact) for k, v in options.items() if k in NAMES}
    return [x.to(dtype).requires_grad_() for x in rows], options | biases


def keeps_the_bounds(function, dense, rows, options, learned, temperature):
    """Compare a call in one pass, and its gradients, with dense code in float64; learned: whether biases have some."""
    options = {k: v.requires_grad_(learned) if k in NAMES else v for k, v in options.items()}
    with contrast.explaining() as plans:
        function(*rows, **options, backend="triton")
    assert [p.name for p in plans] == ["onepass"]
    loss = function(*rows, **options, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in rows]
    of_dense = {k: v.detach().double().requires_grad_(learned) if k in NAMES else v for k, v in options.items()}
    of_dense.pop("workspace_limit", None)
    truth = dense(*exact, **of_dense)
    bound = 1e-5 * max(1, 0.05 / temperature)
    assert error(loss, truth) <= bound
    bound = 5e-3 if rows[0].dtype == torch.bfloat16 else bound
    biases = [name for name in NAMES if learned and name in options]
    grads = torch.autograd.grad(loss, [*rows, *map(options.get, biases)])
    true_grads = torch.autograd.grad(truth, [*exact, *map(of_dense.get, biases)])
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert error(grad, true_grad) <= bound


@every_pair(at=AT, dtype=[torch.bfloat16, torch.float32], learned=[False, True])
def test_biases_of_any_size_keep_the_bounds(at, dtype, learned):
    temperature, name, kind = at
    rows, options = call_of(name, kind, dtype)
    keeps_the_bounds(info_nce, dense_info_nce, rows, options | {"temperature": temperature}, learned, temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_biases_of_both_sides(dtype):
    image = torch.randn(N, D)
    rows = [x.to(dtype).requires_grad_() for x in (image, image + torch.randn(N, D))]
    options = {"logit_scale": 64.0, "normalize": True, "image_bias": BIASES["10"](N), "text_bias": BIASES["45"](N)}
    keeps_the_bounds(clip_loss, dense_clip_loss, rows, options, True, 1 / 64)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_a_bias_is_exact_where_little_is_left_of_it(symmetric, compiled):
    """At a temperature of 1 the probabilities of rows in a cone are alike: what a key gets as a negative, and what it
    gets as a positive, differ by a hundredth, of which a probability rounded to 16 bits would lose a fifth."""
    torch._dynamo.reset()
    query = torch.randn(N, 64) + 7 * torch.randn(64)
    rows = [x.bfloat16().requires_grad_() for x in (query, query + torch.randn(N, 64))]
    bias = torch.zeros(N, requires_grad=True)

    def loss(query, key, bias):
        options = {"symmetric": symmetric, "key_bias": bias, "workspace_limit": None if symmetric else 2**16}
        return info_nce(query, key, temperature=1.0, backend="triton", **options)

    made = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    grads = torch.autograd.grad(made(*rows, bias), [*rows, bias])
    exact = [x.detach().double().requires_grad_() for x in (*rows, bias)]
    truth = dense_info_nce(*exact[:2], temperature=1.0, symmetric=symmetric, key_bias=exact[2])
    for grad, true_grad in zip(grads, torch.autograd.grad(truth, exact), strict=True):
        assert error(grad, true_grad) <= 5e-3
    if not compiled:
        again = torch.autograd.grad(made(*rows, bias), [*rows, bias])
        assert all(map(torch.equal, grads, again))


@pytest.mark.parametrize("kind", ["one", "both", "more", "paired"])
def test_gradients_are_those_of_finite_differences(kind):
    shapes, options = {"more": ([(3, 4)], {}), "paired": ([(6, 2, 4)], {"negative_mode": "paired"})}.get(kind, ([], {}))
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (6, 4), *shapes)]
    biases = [3 * torch.randn(*x.shape[:-1], dtype=torch.float64) for x in inputs[1:]]
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options |= {"symmetric": kind == "both", "in_batch_negatives": True if shapes else None, "backend": "triton"}

    def loss(t, *tensors):
        rows, biases = tensors[: len(inputs)], tensors[len(inputs) :]
        named = dict(zip(NAMES, biases, strict=False))
        assert [p.name for p in explain(*rows, temperature=t, **options, **named)] == ["onepass"]
        return info_nce(*rows, temperature=t, **options, **named)

    arguments = (t, *inputs, *(bias.requires_grad_() for bias in biases))
    assert torch.autograd.gradcheck(loss, arguments, fast_mode=True)


@pytest.mark.parametrize("biased", [False, True])
def test_both_directions_of_16_bit_rows_compile(biased):
    torch._dynamo.reset()
    rows = [torch.randn(9, D).bfloat16().requires_grad_() for _ in range(2)]
    options = {"key_bias": 10 * torch.randn(9)} if biased else {}

    def loss(query, key):
        return info_nce(query, key, temperature=0.1, symmetric=True, backend="triton", **options)

    made = [f(*rows) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(made[1], made[0])
    for x, y in zip(*(torch.autograd.grad(value, rows) for value in made), strict=True):
        assert error(y, x) <= 5e-3
