"""The robust loss against dense code and finite differences, at low temperatures; where it leads a temperature."""

from __future__ import annotations

import pytest
import torch
from oracles import robust as oracle
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
    interpreted,
    make_call,
    on,
    valid,
)

from fused_infonce import RobustInfoNCELoss, robust_info_nce

N = 6


@cases(valid, pairs=True, together=True, **FACTORS, rho=[0.0, 2.0], weight=[False, True])
def test_gradients_are_those_of_finite_differences_and_of_dense_code(backend, case):
    inputs, options = make_call(N, 5, 3, 3, **{name: case[name] for name in FACTORS})
    options["rho"] = case["rho"]
    if case["weight"]:
        inputs["weight"] = torch.rand(N, dtype=torch.float64)
    inputs = on(DEVICE[backend], inputs)
    names = [name for name, x in inputs.items() if differentiable(x)]
    fixed = {name: x for name, x in inputs.items() if name not in names}
    tensors = [inputs[name].requires_grad_() for name in names]

    def call(function, **more):
        return lambda *x: function(**dict(zip(names, x, strict=True)), **fixed, **options, **more)

    ours = call(robust_info_nce, backend=backend)
    assert interpreted(backend) or torch.autograd.gradcheck(ours, tensors, fast_mode=True)
    for got, want in both([ours, call(oracle.robust_info_nce)], tensors):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@cases(dtype=[torch.float32, torch.bfloat16], t=[0.01, 0.05, 1.0], kind=["tight", "loose", "cone_90"], pairs=True)
def test_losses_and_gradients_keep_the_bounds_of_infonce(backend, dtype, t, kind):
    """Against dense code in float64 on the same numbers; the temperature's gradient within 1e-4."""
    n, d = (45, 24) if backend == "torch" else (18, 16)
    inputs = [x.to(dtype) for x in embeddings(kind, n, d)[:2]] + [torch.full((n,), t)]
    inputs = [x.to(DEVICE[backend]).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    got = robust_info_nce(*inputs[:2], temperature=inputs[2], symmetric=True, backend=backend)
    want = oracle.robust_info_nce(*exact[:2], temperature=exact[2], symmetric=True)
    assert got.dtype == torch.float32
    loss_bound, gradient_bound = bounds(dtype, t)
    assert error(got, want) <= loss_bound
    *rows, dt = zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, exact), strict=True)
    assert all(error(*pair) <= gradient_bound for pair in rows)
    assert error(*dt) <= 1e-4


def best_mean(lead, rho):
    """Return the best mean of 500 weights on the bound, softmaxes of the lead that is disturbed more and more."""
    disturbed = lead + torch.linspace(0, 1, 500, dtype=torch.float64)[:, None] * lead.std() * torch.randn(
        500, len(lead)
    )
    low, high = torch.full((500, 1), 1e-3).double(), torch.full((500, 1), 1e3).double()
    for _ in range(50):
        t = (low * high).sqrt()
        p = torch.softmax(disturbed / t, 1)
        outside = (torch.special.xlogy(p, p * len(lead))).sum(1, keepdim=True) > rho
        low, high = torch.where(outside, t, low), torch.where(outside, high, t)
    return (torch.softmax(disturbed / high, 1) @ lead).max().item()


def test_its_least_value_is_the_worst_mean_within_the_bound():
    """The duality that gives the temperature its meaning; at the minimum the divergence is rho."""
    query, key = (x[:20] for x in embeddings("loose", 20, 4)[:2])
    for rho in (0.1, 0.7, 2.0):
        t = torch.full((20,), 0.2, dtype=torch.float64, requires_grad=True)
        low, high = torch.full((20,), 1e-4).double(), torch.full((20,), 1e3).double()
        for _ in range(60):  # convex in t
            with torch.no_grad():
                t.copy_((low * high).sqrt())
            losses = robust_info_nce(query, key, temperature=t, rho=rho, reduction="none")
            (slope,) = torch.autograd.grad(losses.sum(), t)
            low, high = torch.where(slope < 0, t.detach(), low), torch.where(slope < 0, high, t.detach())
        cosines = query @ key.T
        for i in range(0, 20, 6):
            lead = (cosines[i] - cosines[i, i])[torch.arange(20) != i]
            assert losses[i].item() == pytest.approx(best_mean(lead, rho), abs=1e-9)


def test_a_learned_temperature_ends_at_one_value_from_above_and_from_below():
    query, key = (x.float() for x in embeddings("medium", 64, 16)[:2])
    ends = []
    for start in (0.6, 0.07):
        loss = RobustInfoNCELoss(start, rho=0.5, learnable_temperature=True)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        for _ in range(120):
            optimizer.zero_grad()
            loss(query, key).backward()
            optimizer.step()
        ends.append(loss.temperature.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-2)
    assert 0.07 < ends[0] < 0.6


@both_backends
def test_rows_without_negatives_have_loss_0_and_no_gradient(backend):
    a, b = (torch.randn(4, 3, dtype=torch.float64, device=DEVICE[backend], requires_grad=True) for _ in range(2))
    t = torch.full((4,), 0.2, dtype=torch.float64, device=DEVICE[backend], requires_grad=True)
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE[backend])
    loss = robust_info_nce(a, b, temperature=t, key_ids=ids, symmetric=True, reduction="none", backend=backend)
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient in torch.autograd.grad(loss.sum(), (a, b, t)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_module_equals_function():
    a, b, c = (torch.randn(6, 5) for _ in range(3))
    options = {"rho": 1.5, "in_batch_negatives": True, "symmetric": True, "reduction": "none"}
    rows = {"key_ids": torch.arange(6) % 3, "weight": torch.rand(6)}
    got = RobustInfoNCELoss(0.2, **options)(a, b, c, **rows)
    assert torch.equal(got, robust_info_nce(a, b, c, 0.2, **options, **rows))
    t = torch.rand(6) + 0.1
    assert torch.equal(RobustInfoNCELoss(0.2)(a, b, temperature=t), robust_info_nce(a, b, temperature=t))
    assert repr(RobustInfoNCELoss(rho=1.5)) == "RobustInfoNCELoss(temperature=0.1, reduction='mean', rho=1.5)"


ROWS = torch.ones(4, 3)
BAD_CALLS = [
    ({"rho": -0.1}, ValueError, "rho must not be negative, and finite, got -0.1"),
    ({"rho": torch.tensor(0.1)}, TypeError, "rho must be a number, got Tensor"),
    ({"temperature": 0}, ValueError, "temperature must be positive and finite"),
    ({"positive_key": ROWS[1:]}, ValueError, "positive_key must have 4 rows"),
    ({"key_ids": torch.zeros(4, 2).long()}, ValueError, "the robust loss counts negatives"),
    ({"weight": -torch.ones(4)}, ValueError, "weight must not be negative"),
]


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_CALLS)
def test_a_bad_argument_is_refused(bad, kind, message):
    with pytest.raises(kind, match=message):
        robust_info_nce(**({"query": ROWS, "positive_key": ROWS} | bad))
