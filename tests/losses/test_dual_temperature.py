"""InfoNCE with dual temperature against dense code and the authors' formula, at low temperatures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import dual_temperature as oracle
from support.helpers import (
    DEVICE,
    FACTORS,
    both,
    both_backends,
    bounds,
    cases,
    differentiable,
    embeddings,
    error,
    make_call,
    on,
    valid,
)

from fused_infonce import DualTemperatureLoss, dual_temperature_info_nce, info_nce

N = 6


@cases(valid, pairs=True, together=True, **FACTORS, inter=["number", "rows"], weight=[False, True])
def test_values_and_gradients_are_those_of_dense_code(backend, case):
    inputs, options = make_call(N, 5, 3, 3, **{name: case[name] for name in FACTORS})
    inter = 0.9 if case["inter"] == "number" else torch.linspace(0.2, 2, N, dtype=torch.float64)
    options["inter_temperature"] = inter if isinstance(inter, float) else inter.to(DEVICE[backend])
    if case["weight"]:
        inputs["weight"] = torch.rand(N, dtype=torch.float64)
    inputs = on(DEVICE[backend], inputs)
    names = [name for name, x in inputs.items() if differentiable(x)]
    fixed = {name: x for name, x in inputs.items() if name not in names}
    tensors = [inputs[name].requires_grad_() for name in names]

    def call(function, **more):
        return lambda *x: function(**dict(zip(names, x, strict=True)), **fixed, **options, **more)

    ours, truth = call(dual_temperature_info_nce, backend=backend), call(oracle.dual_temperature_info_nce)
    for got, want in both([ours, truth], tensors):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def authors(query, key, temperature, times):
    """The formula as the authors' code has it, on softmaxes of unit rows, with a multiple as the second temperature."""
    logits = query @ key.T
    mine = torch.arange(len(query))
    within, between = (torch.softmax(logits / t, 1)[mine, mine] for t in (temperature, temperature * times))
    ratio = ((1 - between) / (1 - within)).detach()
    return (ratio * F.cross_entropy(logits / temperature, mine, reduction="none")).mean()


def test_values_and_gradients_are_those_of_the_authors():
    inputs = [x.requires_grad_() for x in embeddings("loose", 20, 6)[:2]]

    def ours(query, key):
        return dual_temperature_info_nce(query, key, temperature=0.1, inter_temperature=1.0, normalize=False)

    for got, want in both([ours, lambda query, key: authors(query, key, 0.1, 10)], inputs):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@cases(dtype=[torch.float32, torch.bfloat16], t=[0.01, 0.05, 1.0], kind=["tight", "loose"], pairs=True)
def test_losses_and_gradients_keep_the_bounds_of_infonce(backend, dtype, t, kind):
    """Where 1 - P is 1e-30 at the lower temperature, and a quotient of softmaxes has no digits."""
    n, d = (45, 24) if backend == "torch" else (18, 16)
    inputs = [x.to(dtype) for x in embeddings(kind, n, d)[:2]] + [torch.full((n,), t)]
    inputs = [x.to(DEVICE[backend]).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    options = {"inter_temperature": 10 * t, "symmetric": True}
    got = dual_temperature_info_nce(*inputs[:2], temperature=inputs[2], **options, backend=backend)
    want = oracle.dual_temperature_info_nce(*exact[:2], temperature=exact[2], **options)
    loss_bound, gradient_bound = bounds(dtype, t)
    assert error(got, want) <= loss_bound
    *rows, dt = zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, exact), strict=True)
    assert all(error(*pair) <= gradient_bound for pair in rows)
    assert error(*dt) <= 1e-4


@both_backends
def test_at_one_temperature_it_is_infonce(backend):
    """Whose gradients, the temperature's too, are those of finite differences."""
    inputs = [torch.randn(5, 3, dtype=torch.float64, device=DEVICE[backend]) for _ in range(2)]
    t = 0.3 + torch.rand(5, dtype=torch.float64, device=DEVICE[backend])
    tensors, options = [x.requires_grad_() for x in (*inputs, t)], {"symmetric": True, "backend": backend}

    def ours(q, k, t):
        return dual_temperature_info_nce(q, k, temperature=t, inter_temperature=t.detach(), **options)

    def plain(q, k, t):
        return info_nce(q, k, temperature=t, **options)

    for got, want in both([ours, plain], tensors):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@both_backends
def test_rows_without_negatives_have_loss_0_and_no_gradient(backend):
    a, b = (torch.randn(4, 3, dtype=torch.float64, device=DEVICE[backend], requires_grad=True) for _ in range(2))
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE[backend])
    loss = dual_temperature_info_nce(a, b, key_ids=ids, symmetric=True, reduction="none", backend=backend)
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient in torch.autograd.grad(loss.sum(), (a, b)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_module_equals_function():
    a, b, c = (torch.randn(6, 5) for _ in range(3))
    options = {"inter_temperature": 0.7, "in_batch_negatives": True, "symmetric": True, "reduction": "none"}
    rows = {"key_ids": torch.arange(6) % 3, "weight": torch.rand(6)}
    got = DualTemperatureLoss(0.2, **options)(a, b, c, **rows)
    assert torch.equal(got, dual_temperature_info_nce(a, b, c, 0.2, **options, **rows))
    shown = "DualTemperatureLoss(temperature=0.1, reduction='mean', inter_temperature=0.5)"
    assert repr(DualTemperatureLoss(inter_temperature=0.5)) == shown


ROWS = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"inter_temperature": 0}, ValueError, "inter_temperature must be positive and finite"),
        ({"inter_temperature": torch.ones(3)}, ValueError, "inter_temperature must be a number, a one-element tensor"),
        ({"inter_temperature": None}, TypeError, "inter_temperature must be a number"),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite"),
        ({"positive_key": ROWS[1:]}, ValueError, "positive_key must have 4 rows"),
    ],
)
def test_a_bad_argument_is_refused(bad, kind, message):
    with pytest.raises(kind, match=message):
        dual_temperature_info_nce(**({"query": ROWS, "positive_key": ROWS} | bad))


def test_a_module_does_not_hold_a_temperature_that_it_would_not_train():
    with pytest.raises(ValueError, match="inter_temperature gets no gradient and cannot be trained"):
        DualTemperatureLoss(inter_temperature=torch.tensor(1.0, requires_grad=True))
