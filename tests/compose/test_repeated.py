"""Calls like an earlier one skip its checks: they return what they would have returned, and raise what they would."""

from __future__ import annotations

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from support.helpers import forget_plans
from torch import nn
from torch.autograd import forward_ad

from fused_infonce import ClipLoss, FusedInfoNCELoss, NTXentLoss, clip_loss, explain, info_nce, nt_xent
from fused_infonce.backends import registry
from fused_infonce.compose import repeated

N, D = 6, 4
# calls that differ from the first in one fact each, and of which none may be taken for another
CALLS = {
    "one": lambda x, y: info_nce(x, y, temperature=0.5),
    "another temperature": lambda x, y: info_nce(x, y, temperature=0.25),
    "a whole temperature": lambda x, y: info_nce(x, y, temperature=1),
    "the same as a fraction": lambda x, y: info_nce(x, y, temperature=1.0),
    "by its place": lambda x, y: info_nce(x, y, None, 0.5),
    "both directions": lambda x, y: info_nce(x, y, temperature=0.5, symmetric=True),
    "a sum": lambda x, y: info_nce(x, y, temperature=0.5, reduction="sum"),
    "rows": lambda x, y: info_nce(x, y, temperature=0.5, reduction="none").sum(),
    "given rows": lambda x, y: info_nce(x, y, temperature=0.5, normalize=False),
    "a margin": lambda x, y: info_nce(x, y, temperature=0.5, margin=0.1),
    "smoothed": lambda x, y: info_nce(x, y, temperature=0.5, label_smoothing=0.1),
    "negatives": lambda x, y: info_nce(x, y, y.flip(0), temperature=0.5),
    "weights": lambda x, y: info_nce(x, y, temperature=0.5, weight=torch.arange(len(x)).to(x)),
    "a tensor": lambda x, y: info_nce(x, y, temperature=torch.tensor(0.5)),
    "a workspace": lambda x, y: info_nce(x, y, temperature=0.5, workspace_limit=2**17),
    "the reference": lambda x, y: info_nce(x, y, temperature=0.5, backend="reference"),
    "views": lambda x, y: nt_xent(x, y, 0.5),
    "given views": lambda x, y: nt_xent(x, y, 0.5, normalize=False),
    "three views": lambda x, y: nt_xent(x, y, 0.5, more_views=[y.flip(1)]),
    "clip": lambda x, y: clip_loss(x, y, 2.0),
    "clip with a bias": lambda x, y: clip_loss(x, y, 2.0, 0.5),
    "a module": FusedInfoNCELoss(0.5),
    "a module of both": FusedInfoNCELoss(0.5, symmetric=True),
    "a module of views": NTXentLoss(0.5),
    "a module that learns": ClipLoss(learnable_temperature=True),
    "a module that records": FusedInfoNCELoss(0.5, record=True),
}
KINDS = {  # of rows
    "plain": lambda x: x,
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "more": lambda x: torch.cat([x, x + 1]),
    "longer": lambda x: torch.cat([x, x + 1], 1),
    "double": lambda x: x.double(),
    "half": lambda x: x.bfloat16(),
    "a parameter": nn.Parameter,
}


def outcome(call, x, y):
    """Return the loss and the gradients of a call."""
    loss = call(x, y)
    inputs = [z for z in (x, y) if z.requires_grad]
    return [loss.detach(), *(torch.autograd.grad(loss, inputs) if inputs else [])]


def test_every_call_returns_what_it_does_alone():
    x, y = torch.randn(2, N, D)
    every = list(itertools.product(CALLS.values(), KINDS.values(), KINDS.values()))
    every = [(call, a(x), b(y)) for call, a, b in every if a(x).shape == b(y).shape and a(x).dtype == b(y).dtype]
    alone = []
    for call, a, b in every:
        forget_plans()
        alone.append(outcome(call, a, b))
    forget_plans()
    for _ in range(3):  # made once, remembered, and repeated
        for (call, a, b), want in zip(every, alone, strict=True):
            assert all(map(torch.equal, outcome(call, a, b), want))
    assert sum(isinstance(found, repeated.Repeat) for found in repeated.remembered.values()) > 50


@pytest.mark.parametrize("name", ["one", "both directions", "given rows", "views", "clip", "a module of views"])
def test_a_repeated_call_is_not_made_again(name, monkeypatch):
    x, y = torch.randn(2, N, D)
    for _ in range(2):
        CALLS[name](x, y)
    monkeypatch.setattr(repeated, "_remembered", None)
    CALLS[name](x + 1, y)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["one", "both directions", "views"])
def test_a_repeated_call_stays_on_its_backend(name, monkeypatch):
    call = {"one": info_nce, "both directions": partial(info_nce, symmetric=True), "views": nt_xent}[name]
    x, y = torch.randn(2, N, D)
    first, _ = (call(x, y, temperature=0.5, backend="triton") for _ in range(2))
    monkeypatch.setattr(repeated, "value", None)  # PyTorch's
    monkeypatch.setattr(repeated, "_remembered", None)
    assert torch.equal(call(x, y, temperature=0.5, backend="triton"), first)


def test_other_values_are_other_results():
    for _ in range(3):
        x, y = torch.randn(2, N, D, dtype=torch.float64)
        dense = torch.nn.functional.cross_entropy(x @ y.T / 0.5, torch.arange(N))
        torch.testing.assert_close(info_nce(x, y, temperature=0.5, normalize=False), dense)


def test_what_is_wrong_stays_an_error():
    x, y = torch.randn(2, N, D)
    for _ in range(3):
        info_nce(x, y, temperature=1.0)
        with pytest.raises(TypeError, match="temperature"):
            info_nce(x, y, temperature=True)
        with pytest.raises(ValueError, match="temperature"):
            info_nce(x, y, temperature=float("nan"))
        with pytest.raises(ValueError, match="positive_key"):
            info_nce(x, y[1:], temperature=1.0)
        with pytest.raises(TypeError, match="positive_key"):
            info_nce(x, y.to_sparse(), temperature=1.0)
        with pytest.raises(TypeError, match="positive_key"):
            info_nce(x, torch.nested.nested_tensor(list(y)), temperature=1.0)
        with pytest.raises(TypeError, match="float64"):
            info_nce(x, y.double(), temperature=1.0)
        with pytest.raises(TypeError):
            info_nce(x, y, temperature=1.0, unheard_of=1)


def test_a_call_of_which_more_is_wanted_is_made_whole():
    x, y = torch.randn(2, N, D)
    loss = FusedInfoNCELoss(0.5)
    plain = [loss(x, y) for _ in range(3)][2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(loss(x, y), plain)
    assert [chosen.flops for chosen in explain(x, y, temperature=0.5)] == [2]
    loss.record = True
    torch.testing.assert_close(loss(x, y), plain)  # of another plan
    assert loss.recorded is not None
    with pytest.raises(RuntimeError, match="reference"):
        torch.func.grad(lambda x: info_nce(x, y, temperature=0.5))(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="reference"):
        info_nce(forward_ad.make_dual(x, y), y, temperature=0.5)


def test_gradients_are_recorded_where_they_are_wanted():
    x, y = torch.randn(2, N, D)
    x.requires_grad_()
    for _ in range(3):
        with torch.no_grad():
            assert info_nce(x, y, temperature=0.5).grad_fn is None
        with torch.inference_mode():
            assert nt_xent(x, y, 0.5).is_inference()
        assert info_nce(x, y, temperature=0.5).grad_fn is not None
        nt_xent(x, y, 0.5).backward()


def test_nothing_of_a_call_stays():
    x, y = torch.randn(2, N, D)
    held = weakref.ref(x)
    for _ in range(3):
        info_nce(x, y, temperature=0.5)
        nt_xent(x, y, 0.5)
    del x
    gc.collect()
    assert held() is None


@pytest.mark.filterwarnings("ignore")
def test_nothing_of_a_trace_stays():
    """The sizes that a trace of `torch.jit` sees are tensors: nothing made of them may serve another call."""
    x, y = torch.randn(2, N, D)
    traced = torch.jit.trace(CALLS["one"], (x, y), check_trace=False)
    assert not repeated.remembered
    assert not registry.remembered
    torch.testing.assert_close(traced(y, x), CALLS["one"](y, x))


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(repeated, "MOST", 3)
    for n in range(2, 9):
        info_nce(torch.randn(n, D), torch.randn(n, D))
        assert 0 < len(repeated.remembered) <= 3
