"""Gradients of a learned temperature, factors that must carry none, autocast, and compiled schedules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.helpers import DEVICE, both_backends, two
from torch import nn

from fused_infonce import (
    ClipLoss,
    DistillationLoss,
    FusedInfoNCELoss,
    NTXentLoss,
    SupConLoss,
    clip_loss,
    distilled_info_nce,
    info_nce,
    nt_xent,
    sup_con,
)
from fused_infonce.compat import supcontrast

GRADCHECKED = {"clip": ClipLoss, "nt_xent": NTXentLoss}  # test_gradients.py has FusedInfoNCELoss


@both_backends
@pytest.mark.parametrize("make", GRADCHECKED.values(), ids=GRADCHECKED)
def test_the_gradient_of_the_scale_is_that_of_finite_differences(make, backend):
    loss = make(temperature=0.4, learnable_temperature=True, normalize=True, backend=backend)
    loss = loss.to(DEVICE[backend]).double()
    query, key = two(4, 3, backend)
    assert torch.autograd.gradcheck(
        lambda scale, q: torch.func.functional_call(loss, {"logit_scale": scale}, (q, key)),
        (loss.logit_scale.detach().clone().requires_grad_(), query.requires_grad_()),
        fast_mode=backend != "torch",
    )


@both_backends
@pytest.mark.parametrize("shape", [(5,), (5, 1)], ids=str)
def test_a_temperature_per_row_is_learned_as_a_parameter_or_by_a_callable(shape, backend):
    query, key = (x.float() for x in two(5, 3, backend))
    start = (torch.rand(shape) / 4 + 0.1).to(query.device)
    parameter, scale = nn.Parameter(start.clone()), nn.Parameter(-start.log())
    for make in (lambda t: FusedInfoNCELoss(t, backend=backend), lambda t: ClipLoss(temperature=t, backend=backend)):
        parameter.grad = scale.grad = None
        held, called = make(parameter), make(lambda: torch.exp(-scale))
        for loss in (held, called):
            loss(query, key).backward()
        assert parameter.grad.shape == shape  # type: ignore[attr-defined, union-attr]
        assert parameter.grad.ne(0).all()  # type: ignore[attr-defined, union-attr]
        torch.testing.assert_close(scale.grad, -start * parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "held",
    [
        {"temperature": 0.5},
        {"temperature": 0.5, "learnable_temperature": True},
        {"temperature": lambda: 1 / 0},
        {"temperature": nn.Parameter(torch.tensor(0.5))},
    ],
    ids=["number", "learnable", "callable", "parameter"],
)
def test_the_temperature_of_a_call_wins(held):
    query, key = two()
    loss = FusedInfoNCELoss(**held)
    for t in (0.1, torch.tensor(0.2), torch.rand(6) + 0.1, torch.tensor(0.3, requires_grad=True)):
        value = loss(query, key, temperature=t)
        assert torch.equal(value, info_nce(query, key, temperature=t))
        assert value.requires_grad == (isinstance(t, torch.Tensor) and t.requires_grad)
    value.backward()
    assert all(p.grad is None for p in loss.parameters())


@pytest.mark.parametrize("make", [FusedInfoNCELoss, ClipLoss, NTXentLoss, SupConLoss])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_scale_keeps_its_dtype(make, dtype):
    loss = make(temperature=0.2, learnable_temperature=True, normalize=True)
    rows = torch.randn(2, 8, 16).to(dtype).float()  # rounded beforehand, so that only the scale could be
    inputs = (rows.transpose(0, 1),) if make is SupConLoss else tuple(rows)
    loss(*inputs).backward()
    exact = loss.logit_scale.grad.clone()
    loss.logit_scale.grad = None
    with torch.autocast("cpu", dtype=dtype):
        value = loss(*inputs)
        assert loss.temperature.dtype == torch.float32
    value.backward()
    assert value.dtype == loss.logit_scale.grad.dtype == torch.float32
    torch.testing.assert_close(loss.logit_scale.grad, exact, rtol=1e-3, atol=0)


def pairs(n=64, d=16, classes=None):
    """Return unit rows and their noisy pairs, in classes or all apart, whose best temperature is well inside (0, 1)."""
    x = F.normalize(torch.randn(classes or n, d), dim=-1)
    x = x.repeat(n // len(x), 1)
    return x, F.normalize(x + 0.3 * torch.randn(n, d), dim=-1)


@pytest.mark.parametrize("labels", [None, torch.arange(64) % 16], ids=["views", "labels"])
@pytest.mark.parametrize("base", [0.07, None])
def test_sup_con_learns_a_temperature_that_does_not_vanish(base, labels):
    """The factor t / t_base rewards t -> 0 if it has a gradient: 0.1 falls to nothing in tens of steps."""
    features = torch.stack(pairs(classes=None if labels is None else 16), dim=1)
    t = torch.tensor(0.1, requires_grad=True)
    scale = 0.1 / base if base else 1.0
    (gradient,) = torch.autograd.grad(sup_con(features, labels, temperature=t, base_temperature=base), t)
    (bare,) = torch.autograd.grad(sup_con(features, labels, temperature=t, base_temperature=None), t)
    torch.testing.assert_close(gradient, scale * bare)

    loss = SupConLoss(0.1, base_temperature=base, learnable_temperature=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(120):
        optimizer.zero_grad()
        loss(features, labels).backward()
        optimizer.step()
    best = min(torch.logspace(-3, 0, 100).tolist(), key=lambda t: sup_con(features, labels, None, t, "all", None))
    assert 0.01 < best < 0.9
    assert loss.temperature.item() == pytest.approx(best, rel=0.1)


def test_the_squared_temperature_of_a_distillation_has_no_gradient():
    query, key = pairs()
    t = torch.tensor(0.2, requires_grad=True)
    shared = {"teacher_scores": torch.randn(64, 64), "temperature": t}
    plain, squared = (
        torch.autograd.grad(distilled_info_nce(query, key, temperature_squared=square, **shared), t)[0]
        for square in (False, True)
    )
    torch.testing.assert_close(squared, 0.04 * plain)
    loss = DistillationLoss(0.2, temperature_squared=True, learnable_temperature=True)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss(query, key, teacher_scores=5 * query @ key.T).backward()
        optimizer.step()
    assert loss.temperature.item() == pytest.approx(0.2, rel=0.05)  # the teacher's


def dense_sup_con(features, t, base):
    """SupContrast's formula for two views without labels, with the gradient through the factor that it has."""
    x = torch.cat(torch.unbind(features, dim=1))
    logits = (x @ x.T / t).fill_diagonal_(-math.inf)
    target = torch.arange(len(x)).roll(len(x) // 2)
    return t / base * F.cross_entropy(logits, target)


def test_the_drop_in_keeps_the_originals_gradient():
    features = torch.stack(pairs(8), dim=1).double()
    got, want = torch.tensor([0.1, 0.1], dtype=torch.float64, requires_grad=True).unbind()
    (gradient,) = torch.autograd.grad(supcontrast.SupConLoss(got)(features), got)
    (exact,) = torch.autograd.grad(dense_sup_con(features, want, 0.07), want)
    torch.testing.assert_close(gradient, exact)
    held = supcontrast.SupConLoss(nn.Parameter(torch.tensor(0.1, dtype=torch.float64)))
    assert list(held.state_dict()) == ["temperature"]
    for _ in range(2):  # the graph is made anew
        held.zero_grad()
        held(features).backward()
    torch.testing.assert_close(held.temperature.grad, exact)


def test_clip_is_called_without_a_scale_and_with_the_users():
    """open_clip's signature, whose scale is exponentiated; the module's is its logarithm, as CLIP's is."""
    image, text = (x.requires_grad_() for x in pairs(16))
    learned = ClipLoss(learnable_temperature=True, max_logit_scale=100)
    value = learned(image, text)
    torch.testing.assert_close(value, clip_loss(image, text, learned.logit_scale.exp()))
    value.backward()
    (got,) = torch.autograd.grad(clip_loss(image, text, learned.logit_scale.exp()), learned.logit_scale)
    torch.testing.assert_close(learned.logit_scale.grad, got)
    users = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    for loss in (ClipLoss(), learned):
        users.grad = learned.logit_scale.grad = None
        loss(image, text, users.exp()).backward()
        torch.testing.assert_close(users.grad, got[0])
        assert learned.logit_scale.grad is None


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager")


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("how", ["assigned", "called"])
def test_a_schedule_compiles_once_or_twice(kind, how):
    """An assignment between calls, or a callable whose answer changes: more steps than dynamo would recompile."""
    query, key = two()
    now = [kind(0.5)]
    loss = FusedInfoNCELoss(0.5 if how == "assigned" else lambda: now[0])
    run = compiled(loss)
    for step in range(torch._dynamo.config.recompile_limit + 4):
        now[0] = kind(0.5 - 0.02 * step)
        if how == "assigned":
            loss.temperature = now[0]
        torch.testing.assert_close(run(query, key), info_nce(query, key, temperature=now[0]))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_an_assignment_may_be_compiled_too(kind, learnable):
    query, key = two()
    loss = FusedInfoNCELoss(0.5, learnable_temperature=learnable)

    def step(t):
        loss.temperature = t
        return loss(query, key)

    run = compiled(step)
    for t in (0.5, 0.4, 0.3):
        torch.testing.assert_close(run(kind(t)), info_nce(query, key, temperature=t), rtol=1e-6, atol=0)
        assert float(loss.temperature.detach() if learnable else loss.temperature) == pytest.approx(t)


def test_kinds_may_change_between_compiled_calls():
    query, key = two()
    loss = FusedInfoNCELoss(0.5)
    run = compiled(loss)
    for held in (torch.tensor(0.4), nn.Parameter(torch.tensor(0.3)), lambda: 0.2, 0.1):
        loss.temperature = held
        torch.testing.assert_close(run(query, key), info_nce(query, key, temperature=loss.temperature))


def test_a_learned_scale_is_clamped_between_compiled_steps():
    query, key = two()
    loss = NTXentLoss(0.01, learnable_temperature=True, max_logit_scale=100)
    loss.temperature = 0.005
    run = compiled(loss)
    torch.testing.assert_close(run(query, key), nt_xent(query, key, 0.005), rtol=1e-4, atol=0)
    loss.clamp_logit_scale_()
    torch.testing.assert_close(run(query, key), nt_xent(query, key, 0.01), rtol=1e-4, atol=0)
