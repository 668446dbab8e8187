"""Every loss trains with a temperature that is learned, in whichever of four ways it is held, for three steps."""

from __future__ import annotations

import copy
import inspect
import math
from contextlib import nullcontext

import pytest
import torch
from support.examples import from_example
from support.helpers import DEVICE, TRITON
from torch import nn
from torch.utils._pytree import tree_map_only

import fused_infonce
from fused_infonce import (
    ClipLoss,
    DCLLoss,
    DebiasedLoss,
    DistillationLoss,
    FusedInfoNCELoss,
    GroupedInfoNCELoss,
    GuidedInfoNCELoss,
    MatryoshkaLoss,
    MoCoLoss,
    MultipleNegativesLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)

N, D = 6, 8


def rows(*shape):
    return torch.randn(*shape, D)


# name -> (the module, given its temperature; its inputs)
LOSSES = {
    "ClipLoss": (lambda **t: ClipLoss(normalize=True, **t), lambda: (rows(N), rows(N))),
    "DCLLoss": (lambda **t: DCLLoss(sigma=0.5, **t), lambda: (rows(N), rows(N))),
    "DCLLoss of keys": (lambda **t: DCLLoss(negatives="keys", **t), lambda: (rows(N), rows(N), rows(3))),
    "DebiasedLoss": (DebiasedLoss, lambda: (rows(N), rows(N))),
    "DistillationLoss": (
        lambda **t: DistillationLoss(alpha=0.5, symmetric=True, temperature_squared=True, **t),
        lambda: (rows(N), rows(N), rows(N), rows(N)),
    ),
    "FusedInfoNCELoss": (FusedInfoNCELoss, lambda: (rows(N), rows(N))),
    "GroupedInfoNCELoss": (
        lambda **t: GroupedInfoNCELoss(3, distillation="kl_div", **t),
        lambda: (rows(N), rows(3 * N), torch.randn(N, 3)),
    ),
    "GuidedInfoNCELoss": (lambda **t: GuidedInfoNCELoss(contrast_keys=True, **t), lambda: (rows(N), rows(N), rows(5))),
    "MatryoshkaLoss": (lambda **t: MatryoshkaLoss(FusedInfoNCELoss(**t), [D, D // 2]), lambda: (rows(N), rows(N))),
    "MoCoLoss": (lambda **t: MoCoLoss(D, queue_size=10, **t), lambda: (rows(N), rows(N))),
    "MultipleNegativesLoss": (
        lambda **t: MultipleNegativesLoss(hardness="all_negatives", hardness_strength=2.0, **t),
        lambda: (rows(N), rows(2, N)),
    ),
    "NTXentLoss": (NTXentLoss, lambda: (rows(N), rows(N), rows(N))),
    "SigLipLoss": (lambda **t: SigLipLoss(normalize=True, bias=-2.0, **t), lambda: (rows(N), rows(N))),
    "SupConLoss": (SupConLoss, lambda: (rows(N, 2), torch.arange(N) % 3)),
    "SupConLoss of views": (SupConLoss, lambda: (rows(N, 2),)),
}
# A loss that has no entry is made and called as in the example of its docstring.
CLASSES = {name for name in fused_infonce.__all__ if name.endswith("Loss")}
MISSING = sorted(CLASSES - {name.partition(" ")[0] for name in LOSSES})
LOSSES |= {name: from_example(getattr(fused_infonce, name)) for name in MISSING}
every_loss = pytest.mark.parametrize("name", LOSSES)
START = 0.3


class ExpOfScale(nn.Module):
    """A temperature with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-math.log(START)))

    def forward(self):
        return torch.exp(-self.scale)


def holders(how):
    """Return the options that make a temperature of 0.3 learnable, and the user's own parameter that is learned."""
    if how == "learnable":
        return {"temperature": START, "learnable_temperature": True}, None
    if how == "callable":
        scale = nn.Parameter(torch.full((1,), -math.log(START)))
        return {"temperature": lambda: torch.exp(-scale)}, scale
    if how == "module":
        module = ExpOfScale()
        return {"temperature": module}, module.scale
    parameter = nn.Parameter(torch.tensor(START))
    return {"temperature": parameter}, parameter


def train(name, how, backend="torch", compiled=False, steps=3):
    """Return the losses of the steps and the values that the learned parameter took."""
    torch.manual_seed(0)
    make, inputs = LOSSES[name]
    options, learned = holders(how)
    loss = make(**options).to(DEVICE[backend])
    for module in loss.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    if learned is None:
        (learned,) = (p for n, p in loss.named_parameters() if n.endswith("logit_scale"))
    elif how == "callable":
        assert not list(loss.parameters())
    else:
        assert [id(p) for p in loss.parameters()] == [id(learned)]
    x = tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE[backend]), inputs())
    width = x[0].shape[-1]
    model = nn.Linear(width, width).to(DEVICE[backend])
    optimizer = torch.optim.SGD([*model.parameters(), learned], lr=0.02)

    def run(first, *others):
        return loss(model(first), *others)

    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    values, scales = [], [learned.detach().clone()]
    for step in range(steps):
        again = compiled and step > 0  # with other tensors, for which nothing may be compiled anew
        with torch.compiler.set_stance("fail_on_recompile") if again else nullcontext():
            value = run(*tree_map_only(torch.Tensor, torch.clone, x))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.detach())
        scales.append(learned.detach().clone())
    return torch.stack(values), torch.stack(scales).flatten()


def assert_trained(values, scales):
    assert values.isfinite().all()
    assert scales.isfinite().all()
    assert scales.diff().ne(0).all(), f"the temperature stood still: {scales.tolist()}"


def test_every_exported_loss_is_trained_here():
    exported = {name for name in fused_infonce.__all__ if name.endswith("Loss")}
    assert exported == {name.partition(" ")[0] for name in LOSSES}
    for name in exported - {"MatryoshkaLoss"}:
        parameters = inspect.signature(getattr(fused_infonce, name)).parameters
        assert {"temperature", "learnable_temperature", "max_logit_scale"} <= set(parameters), name


@every_loss
@pytest.mark.parametrize("how", ["learnable", "callable", "module", "parameter"])
def test_three_steps(name, how):
    values, scales = train(name, how)
    assert_trained(values, scales)
    if how != "parameter":  # the same step, by whichever way the scale is held
        torch.testing.assert_close(values, train(name, "learnable")[0])


@pytest.mark.parametrize("name", ["FusedInfoNCELoss", "ClipLoss"])
@pytest.mark.parametrize("backend", [TRITON])
def test_three_steps_in_kernels(name, backend):
    values, scales = train(name, "learnable", backend)
    assert_trained(values, scales)
    torch.testing.assert_close(values, train(name, "learnable")[0], rtol=1e-5, atol=1e-6)


@every_loss
def test_three_compiled_steps_are_the_eager_ones(name):
    torch._dynamo.reset()
    values, scales = train(name, "learnable", compiled=True)
    assert_trained(values, scales)
    eager = train(name, "learnable")
    torch.testing.assert_close((values, scales), eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["callable", "module", "parameter"])
def test_three_compiled_steps_of_a_temperature_of_the_users(how):
    torch._dynamo.reset()
    trained = train("FusedInfoNCELoss", how, compiled=True)
    assert_trained(*trained)
    torch.testing.assert_close(trained, train("FusedInfoNCELoss", how), rtol=1e-5, atol=1e-6)


@every_loss
def test_the_gradient_of_logit_scale_is_that_of_the_temperature(name):
    """d loss / d logit_scale = -t d loss / d t."""
    make, inputs = LOSSES[name]
    x, gradients = inputs(), []
    for how in ("learnable", "parameter"):
        torch.manual_seed(0)
        loss = make(**holders(how)[0])
        (learned,) = loss.parameters()
        copy.deepcopy(loss)(*x).backward()  # a copy's backward leaves this one alone, and its queue
        assert learned.grad is None
        loss(*x).backward()
        gradients.append(learned.grad.flatten())  # type: ignore[attr-defined, union-attr]
    torch.testing.assert_close(gradients[0], -START * gradients[1], rtol=1e-4, atol=1e-6)
