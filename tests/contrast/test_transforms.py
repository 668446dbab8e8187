"""What `torch.func`, `torch.autograd.functional` and TorchScript make of a loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import func

import fused_infonce
from fused_infonce import FusedInfoNCELoss, info_nce

N, D = 6, 5


def dense(query, key):
    return F.cross_entropy(F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / 0.1, torch.arange(len(query)))


def reference(query, key):
    return info_nce(query, key, backend="reference")


TRANSFORMS = {
    "grad": func.grad,
    "grad_and_value": lambda loss: lambda *x: func.grad_and_value(loss)(*x)[0],
    "jacrev": func.jacrev,
    "hessian": func.hessian,
    "vjp": lambda loss: lambda *x: func.vjp(loss, *x)[1](torch.ones(()).double())[0],
    "vmap": lambda loss: lambda query, key: func.vmap(loss, (0, None))(torch.stack([query, 2 * key]), key),
    "vmap of grad": lambda loss: lambda query, key: func.vmap(func.grad(loss))(query[None], key[None]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_need_the_reference_and_say_so(name):
    inputs = torch.randn(2, N, D, dtype=torch.float64)
    want = TRANSFORMS[name](dense)(*inputs)
    torch.testing.assert_close(TRANSFORMS[name](reference)(*inputs), want)
    for loss in (info_nce, FusedInfoNCELoss(reduction="sum"), FusedInfoNCELoss(symmetric=True)):
        with pytest.raises(RuntimeError, match=r"torch\.func .* need backend='reference'"):
            TRANSFORMS[name](loss)(*inputs)


MAPPED = {
    "temperature": torch.tensor([0.05, 0.5], dtype=torch.float64),
    "temperature of rows": torch.rand(2, N, dtype=torch.float64) + 0.1,
    "weight": torch.rand(2, N, dtype=torch.float64),
    "target": torch.tensor([[0, 1, 2, 3, 4, 5], [5, -100, 0, 1, 1, 2]]),
    "key_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [1, 1, 2, 2, 3, 3]]),
}


@pytest.mark.parametrize("name", MAPPED)
def test_an_option_may_be_mapped(name):
    query, key = torch.randn(2, N, D, dtype=torch.float64)
    option = name.split()[0]

    def loss(value):
        return info_nce(query, key, **{option: value}, backend="reference")

    want = torch.stack([loss(value) for value in MAPPED[name]])
    torch.testing.assert_close(func.vmap(loss)(MAPPED[name]), want)
    if MAPPED[name].is_floating_point():
        want = torch.stack([func.grad(loss)(value) for value in MAPPED[name]])
        torch.testing.assert_close(func.vmap(func.grad(loss))(MAPPED[name]), want)


def test_functional_call_works():
    loss = FusedInfoNCELoss(learnable_temperature=True)
    query, key = torch.randn(2, N, D)
    scale = torch.ones(1, requires_grad=True)
    value = func.functional_call(loss, {"logit_scale": scale}, (query, key))
    torch.testing.assert_close(value, info_nce(query, key, temperature=torch.exp(-scale)))
    assert torch.autograd.grad(value, scale)[0] != 0


def test_autograd_functional_jacobian_works():
    query, key = torch.randn(2, N, D, dtype=torch.float64)
    got = torch.autograd.functional.jacobian(lambda x: info_nce(x, key), query)
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(lambda x: dense(x, key), query))


@pytest.mark.parametrize("name", ["FusedInfoNCELoss", "NTXentLoss", "SupConLoss", "ClipLoss", "SigLipLoss", "DCLLoss"])
def test_torchscript_is_refused_with_the_way_out(name):
    with pytest.raises(TypeError, match=rf"{name} .*torch\.compile"):
        torch.jit.script(getattr(fused_infonce, name)())


def test_a_model_that_holds_a_loss_is_refused_by_torchscript_too():
    model = torch.nn.Sequential(torch.nn.Linear(D, D), FusedInfoNCELoss())
    with pytest.raises(TypeError, match=r"FusedInfoNCELoss .*torch\.compile"):
        torch.jit.script(model)
