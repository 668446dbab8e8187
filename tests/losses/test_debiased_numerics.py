"""Debiased contrastive loss at low temperatures, where its difference cancels, and at its kinks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import debiased as oracle
from oracles import info_nce as dense_info_nce
from oracles import views as dense_views
from oracles.row_lists import rows_of
from support.helpers import DEVICE, both_backends, bounds, embeddings, error

from fused_infonce import debiased_info_nce, debiased_nt_xent
from fused_infonce.backends.contract import KeySet, Problem, RowStatistics, Temperature
from fused_infonce.compose.rows import negative_sums
from fused_infonce.losses import debiased


@both_backends
@pytest.mark.parametrize("t", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("kind", ["tight", "medium", "loose"])
@pytest.mark.parametrize("views", [False, True])
def test_low_temperatures_give_what_the_papers_exponentials_give(backend, t, kind, views):
    """In float64 the paper's exponentials still fit; in float32 exp(1 / 0.01) would not. Tight pairs reach the bound,
    where the loss is as small as 1e-80."""
    n, d = (24, 16) if backend == "torch" else (10, 8)
    exact = [x.requires_grad_() for x in embeddings(kind, n, d)[:2]]
    function = debiased_nt_xent if views else debiased_info_nce

    if views:
        found = dense_views.direction(*exact, t, True)
    else:
        found = dense_info_nce.directions(*exact, temperature=t)
    estimate, floor = oracle.terms(found[0][0], 0.05)
    floors = (estimate < floor).tolist()
    want = dense_info_nce.reduced(lambda rows: oracle.loss_of(rows, 0.05), found, "none", None)
    want_grads = torch.autograd.grad(want.sum(), exact)
    moved = (x.to(DEVICE[backend]) for x in exact)
    got = function(*moved, temperature=t, reduction="none", tau_plus=0.05, backend=backend)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-7, atol=0)
    for a, b in zip(torch.autograd.grad(got.sum(), exact), want_grads, strict=True):
        assert error(a, b) <= 1e-7
    if t == 0.01 and kind == "tight":
        assert all(floors)
    if t == 0.5 and kind == "loose":
        assert not any(floors)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("t", "kind", "tau"), [(0.01, "loose", 1e-3), (0.05, "tight", 0.1), (0.2, "loose", 0.02), (1.0, "medium", 0.1)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_and_gradients_keep_the_bounds_of_infonce_where_little_cancels(backend, dtype, t, kind, tau, reduction):
    """Within the bounds of InfoNCE, times what the difference makes of rounding errors: sum / ((1 - tau+) G)."""
    n, d = (45, 24) if backend == "torch" else (18, 16)
    inputs = [x.to(DEVICE[backend], dtype).requires_grad_() for x in embeddings(kind, n, d)[:2]]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    options = {"temperature": t, "reduction": reduction, "tau_plus": tau}
    got = debiased_info_nce(*inputs, **options, backend=backend)
    want = oracle.debiased_info_nce(*exact, **options)
    factors = [1.0]
    for row in rows_of(*(x.detach() for x in exact), temperature=t):
        total, correction = row.others.exp().sum(), len(row.others) * tau * row.pos.exp()
        floor = (1 - tau) * len(row.others) * math.exp(-1 / t)
        if total - correction > floor:
            factors.append(float(total / (total - correction)))
    assert max(factors) < 20  # else the test says little
    loss_bound, gradient_bound = (max(factors) * bound for bound in bounds(torch.float32, t))
    gradient_bound = max(gradient_bound, bounds(dtype, t)[1])
    assert got.dtype == torch.float32
    assert want.min() > 1e-30 or reduction == "none"
    assert error(got, want) <= loss_bound
    scale = float(1 / want.detach().mean())  # losses of tight pairs are small
    grads = torch.autograd.grad(got, inputs, torch.full_like(got, scale))
    exact_grads = torch.autograd.grad(want, exact, torch.full_like(want, scale))
    for a, b in zip(grads, exact_grads, strict=True):
        assert a.dtype == dtype
        assert error(a, b) <= gradient_bound


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_at_equal_logits_are_finite(backend, reduction):
    device = DEVICE[backend]
    e = torch.eye(3, dtype=torch.float64, device=device)
    query, key = e[:2].clone().requires_grad_(), e[:1].repeat(2, 1)
    key[1] = e[2]
    key.requires_grad_()
    t = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    # of row 1 the positive's logit and that of its one negative are 0
    for tau in (0.0, 0.5, 1 - 1e-12):
        loss = debiased_info_nce(query, key, temperature=t, tau_plus=tau, reduction=reduction, backend=backend)
        for g in torch.autograd.grad(loss.sum(), (query, key, t)):
            assert g.isfinite().all()


def test_where_the_sum_equals_its_correction_the_bound_holds():
    """n tau+ = 1, so that y = pos - neg, which is 0 or so small that its inverse is infinite."""
    x = torch.zeros(1, dtype=torch.float64)
    problem = Problem(KeySet(x[:, None]), (KeySet(torch.zeros(3, 1).double()),), Temperature(x + 0.5))
    half = torch.full((1,), 0.5, dtype=torch.float64)
    assert negative_sums(problem, problem.inputs[1:])[1].tolist() == [2]
    for value in (0.0, 5e-324, 1e-310, -1e-310, -1.0, -800.0):
        pos, neg = x.clone().requires_grad_(), torch.tensor([value], dtype=torch.float64, requires_grad=True)
        rows = debiased._losses(problem, RowStatistics(pos, neg, x, x, x), half)
        assert rows.item() == pytest.approx(math.log1p(2 * math.exp(-2)), rel=1e-14)
        dpos, dneg = torch.autograd.grad(rows.sum(), (pos, neg))
        assert dneg == 0
        assert dpos.item() == pytest.approx(-1 / (1 + math.exp(2) / 2), rel=1e-14)


@pytest.mark.parametrize("tau_plus", [0.1, 0.5, "per row"])
@pytest.mark.parametrize("t", [0.01, 0.02])
def test_errors_in_cones_are_those_of_float32_cosines(t, tau_plus):
    """Where the sum of the negatives nearly cancels, float32 cosines in an otherwise exact computation err as much.

    In the median of several calls: a single one may have a row where rounding decides between the terms of G.
    """
    ratios = []
    for seed in range(9):
        torch.manual_seed(seed)
        q, k, _ = embeddings("cone_90", 100 + 15 * seed, 2 + seed % 6)
        tau = 0.9 * torch.rand(len(q), dtype=torch.float64) if tau_plus == "per row" else tau_plus
        leaves = [x.float().double().requires_grad_() for x in (q, k)]
        want = torch.autograd.grad(oracle.debiased_info_nce(*leaves, temperature=t, tau_plus=tau), leaves)

        narrow = [x.float().requires_grad_() for x in (q, k)]
        cosines = (F.normalize(narrow[0], dim=1) @ F.normalize(narrow[1], dim=1).T).double()
        rows = dense_info_nce.Direction(
            cosines.diagonal() / t, (cosines / t).fill_diagonal_(-torch.inf), torch.tensor(t).double()
        )
        form = torch.autograd.grad(oracle.loss_of(rows, tau).mean(), narrow)

        ours = [x.float().requires_grad_() for x in (q, k)]
        tau = tau.float() if isinstance(tau, torch.Tensor) else tau
        got = torch.autograd.grad(debiased_info_nce(*ours, temperature=t, tau_plus=tau), ours)
        ratios.append(error(torch.cat(got), torch.cat(want)) / error(torch.cat(form), torch.cat(want)))
    assert sorted(ratios)[len(ratios) // 2] <= 3, ratios
