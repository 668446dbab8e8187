"""MACL against dense code, at low temperatures and where softmaxes saturate; and its temperature by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import model_aware as oracle
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
from support.ranks import succeeded

from fused_infonce import (
    Distributed,
    MACLLoss,
    decoupled_info_nce,
    decoupled_nt_xent,
    model_aware_info_nce,
    model_aware_nt_xent,
)
from fused_infonce.backends.row_losses import balanced, infonce
from fused_infonce.distributed.loopback import Loopback
from fused_infonce.temperature import alignment_temperature

N = 6


@cases(valid, pairs=True, together=True, **FACTORS, alpha=[0.0, 0.7], threshold=[0.0, 0.2], weight=[False, True])
def test_values_and_gradients_are_those_of_dense_code(backend, case):
    inputs, options = make_call(N, 5, 3, 3, **{name: case[name] for name in FACTORS})
    options |= {name: case[name] for name in ("alpha", "threshold")}
    if case["weight"]:
        inputs["weight"] = torch.rand(N, dtype=torch.float64)
    inputs = on(DEVICE[backend], inputs)
    names = [name for name, x in inputs.items() if differentiable(x)]
    fixed = {name: x for name, x in inputs.items() if name not in names}
    tensors = [inputs[name].requires_grad_() for name in names]

    def call(function, **more):
        return lambda *x: function(**dict(zip(names, x, strict=True)), **fixed, **options, **more)

    for got, want in both([call(model_aware_info_nce, backend=backend), call(oracle.model_aware_info_nce)], tensors):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@cases(reduction=["mean", "none"], temperature=["float", "per row"], normalize=[True, False], pairs=True)
def test_values_and_gradients_of_views_are_those_of_dense_code(backend, reduction, temperature, normalize):
    tensors = [torch.randn(4, 3, dtype=torch.float64, device=DEVICE[backend]) for _ in range(2)]
    if temperature == "per row":
        tensors.append(0.3 + torch.rand(8, dtype=torch.float64, device=DEVICE[backend]))
    tensors = [x.requires_grad_() for x in tensors]

    def call(function, **options):
        return lambda a, b, t=0.4: function(a, b, t, reduction, alpha=0.3, normalize=normalize, **options)

    for got, want in both([call(model_aware_nt_xent, backend=backend), call(oracle.model_aware_nt_xent)], tensors):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@both_backends
@pytest.mark.parametrize("form", ["keys", "views"])
def test_its_gradient_is_that_of_the_decoupled_loss_at_its_temperature(backend, form):
    """Of finite differences, since the decoupled loss has no part without a gradient; the temperature's too."""
    a, b = (torch.randn(5, 3, dtype=torch.float64, device=DEVICE[backend]) for _ in range(2))
    t = torch.tensor(0.4, dtype=torch.float64, device=DEVICE[backend])
    a, b, t = (x.requires_grad_() for x in (a, b, t))
    both_forms = {"keys": (model_aware_info_nce, decoupled_info_nce), "views": (model_aware_nt_xent, decoupled_nt_xent)}
    ours, dcl = both_forms[form]
    factor = alignment_temperature(a, b, 1.0, 0.5).detach()
    got = ours(a, b, temperature=t, backend=backend)
    want = dcl(a, b, temperature=t * factor, backend=backend)
    assert got >= 1
    for x, y in zip(torch.autograd.grad(got, (a, b, t)), torch.autograd.grad(want, (a, b, t)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


@cases(dtype=[torch.float32, torch.bfloat16], t=[0.01, 0.05, 1.0], kind=["tight", "loose"], pairs=True)
def test_losses_and_gradients_keep_the_bounds_of_infonce(backend, dtype, t, kind):
    """Where 1 - P is 1e-30 too, which the softmax itself has not."""
    n, d = (45, 24) if backend == "torch" else (18, 16)
    inputs = [x.to(dtype) for x in embeddings(kind, n, d)[:2]] + [torch.full((n,), t)]
    inputs = [x.to(DEVICE[backend]).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    got = model_aware_info_nce(*inputs[:2], temperature=inputs[2], symmetric=True, backend=backend)
    want = oracle.model_aware_info_nce(*exact[:2], temperature=exact[2], symmetric=True)
    loss_bound, gradient_bound = bounds(dtype, t)
    assert error(got, want) <= loss_bound
    *rows, dt = zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, exact), strict=True)
    assert all(error(*pair) <= gradient_bound for pair in rows)
    assert error(*dt) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infonce_over_its_slope_is_exact_at_every_size(dtype):
    """From its series and its asymptote, where neither overflows nor cancels."""
    x = torch.tensor([-800.0, -100.0, -30.0, -5.0, -0.1, 0.0, 0.1, 5.0, 30.0, 100.0, 800.0], dtype=dtype)
    exact = x.double()
    e = torch.exp(-exact.abs())
    want = torch.where(exact > 0, (1 + e) * infonce(exact), (1 + e) * torch.log1p(e) / e)
    want = torch.where(e < 1e-12, torch.where(exact > 0, (1 + e) * infonce(exact), 1 + e / 2), want)
    leaf = x.clone().requires_grad_()
    got = balanced(leaf)
    torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=0)
    (slope,) = torch.autograd.grad(got.sum(), leaf)
    assert torch.equal(slope, torch.ones_like(slope))
    nothing = torch.tensor([-torch.inf, torch.nan], dtype=dtype, requires_grad=True)
    got = balanced(nothing)
    assert got[0] == 0
    assert got[1].isnan()
    assert torch.autograd.grad(got[0], nothing)[0][0] == 0


def test_the_temperature_is_that_of_the_paper():
    a, b = (torch.randn(9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    got = alignment_temperature(a, b, t, alpha=0.6, threshold=0.3)
    factor = 1 + 0.6 * (F.cosine_similarity(a, b).mean() - 0.3)
    torch.testing.assert_close(got, 0.1 * factor)
    assert got.shape == ()
    (slope,) = torch.autograd.grad(got, t)  # and none of the embeddings
    torch.testing.assert_close(slope, factor.detach())
    rows = torch.rand(9, dtype=torch.float64) + 0.1
    torch.testing.assert_close(alignment_temperature(a, b, rows, 0.6, 0.3), rows * factor)
    assert torch.autograd.gradcheck(lambda t: alignment_temperature(a, b, t, 0.6, 0.3), t)
    half = alignment_temperature(a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), alignment_temperature(a.bfloat16().double(), b.bfloat16().double()))
    torch.testing.assert_close(alignment_temperature(a[:0], b[:0], 0.25), torch.tensor(0.25, dtype=torch.float64))


@pytest.mark.parametrize("counts", [[3, 2, 4], [5, 0, 1]])
def test_ranks_have_the_temperature_of_all_pairs(counts):
    a, b = torch.randn(2, sum(counts), 4, dtype=torch.float64)
    parts = list(zip(a.split(counts), b.split(counts), strict=True))

    def work(communicator):
        return alignment_temperature(*parts[communicator.rank], 0.2, distributed=Distributed(communicator))

    found = succeeded(Loopback(len(counts), 20).run(work))
    assert all(torch.equal(x, found[0]) for x in found)
    torch.testing.assert_close(found[0], alignment_temperature(a, b, 0.2))


def test_a_temperature_that_would_not_be_positive_is_refused():
    a = torch.randn(4, 3)
    with pytest.raises(ValueError, match="the factor of the temperature must stay positive"):
        alignment_temperature(a, -a, alpha=1.0, threshold=0.5)
    with pytest.raises(ValueError, match="the factor of the temperature must stay positive"):
        model_aware_info_nce(a, -a, alpha=1.0, threshold=0.5)
    nan = a.clone()
    nan[0] = torch.nan
    assert model_aware_info_nce(a, nan).isnan()


def test_module_equals_function():
    a, b, c = (torch.randn(6, 5) for _ in range(3))
    got = MACLLoss(0.2, alpha=0.3, threshold=0.1, reduction="none")(a, b)
    assert torch.equal(got, model_aware_nt_xent(a, b, 0.2, "none", alpha=0.3, threshold=0.1))
    options = {"in_batch_negatives": True, "symmetric": True, "negative_mode": "unpaired"}
    rows = {"key_ids": torch.arange(6) % 3, "weight": torch.rand(6)}
    got = MACLLoss(0.3, negatives="keys", **options)(a, b, c, **rows)
    assert torch.equal(got, model_aware_info_nce(a, b, c, 0.3, **options, **rows))
    assert repr(MACLLoss(alpha=0.2)) == "MACLLoss(temperature=0.1, reduction='mean', alpha=0.2)"


ROWS = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ({"threshold": -0.5}, ValueError, r"threshold must be in \[0, 1\], got -0.5"),
        ({"alpha": "0.5"}, TypeError, "alpha must be a number"),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite"),
        ({"positive_key": ROWS[1:]}, ValueError, "positive_key must have 4 rows"),
    ],
)
def test_a_bad_argument_is_refused(bad, kind, message):
    for function in (model_aware_info_nce, alignment_temperature):
        with pytest.raises(kind, match=message):
            function(**({"query": ROWS, "positive_key": ROWS} | bad))
    with pytest.raises(ValueError, match="options of negatives='keys'"):
        MACLLoss(symmetric=True)
