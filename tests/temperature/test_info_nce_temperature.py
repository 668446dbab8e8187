"""The temperature: a number, a tensor, a schedule, one value per row, or learnt."""

import math

import numpy as np
import pytest
import torch
from oracles import info_nce as dense
from support.helpers import DEVICE, both_backends, error, evaluate, on, oracle, two

from fused_infonce import FusedInfoNCELoss, info_nce


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)], ids=str)
def test_a_tensor_of_any_shape_and_dtype_gets_its_gradient(backend, dtype, shape):
    inputs = {"query": torch.randn(6, 4), "positive_key": torch.randn(6, 4), "temperature": torch.rand(shape) / 4 + 0.1}
    inputs["temperature"] = inputs["temperature"].to(dtype)
    want = oracle(inputs)
    loss, gradients = evaluate(info_nce, on(DEVICE[backend], inputs), backend=backend)
    assert loss.dtype == torch.float32
    assert gradients["temperature"].dtype == dtype
    assert gradients["temperature"].shape == shape
    assert error(loss, want[0]) <= 1e-5
    rounding = torch.finfo(dtype).eps / 2
    assert error(gradients["temperature"], want[1]["temperature"]) <= 1e-4 + rounding


def test_temperature_may_be_a_parameter_of_the_users():
    """How info-nce-pytorch is made to learn it; and it may be assigned over."""
    query, key = torch.randn(2, 6, 4)
    loss = FusedInfoNCELoss(temperature=torch.nn.Parameter(torch.tensor(0.2)))
    loss(query, key).backward()
    assert [p.grad is not None for p in loss.parameters()] == [True]
    assert "0.2" in repr(loss)
    loss.temperature = 0.3
    assert (loss.temperature, list(loss.parameters())) == (0.3, [])
    loss.temperature = torch.nn.Parameter(torch.tensor(0.4))
    assert len(list(loss.parameters())) == 1


def test_temperature_may_be_a_numpy_number():
    query, key = torch.randn(2, 6, 4)
    assert torch.equal(info_nce(query, key, temperature=np.float32(0.25)), info_nce(query, key, temperature=0.25))


def test_an_assigned_temperature_holds_from_the_next_call():
    query, key = two()
    loss = FusedInfoNCELoss(0.5)
    for t in (0.5, 0.2, torch.tensor(0.1), torch.rand(6) + 0.1):
        loss.temperature = t
        assert loss.temperature is t or loss.temperature == t
        assert torch.equal(loss(query, key), info_nce(query, key, temperature=t))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be positive"):
            loss.temperature = bad
    with pytest.raises(TypeError, match="temperature must be"):
        loss.temperature = "0.1"
    with pytest.raises(ValueError, match="temperature must be positive"):
        FusedInfoNCELoss(-1.0)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_temperature_of_one_call_leaves_the_modules_alone(learnable):
    query, key = two()
    loss = FusedInfoNCELoss(0.5, learnable_temperature=learnable)
    before = loss(query, key)
    t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.equal(loss(query, key, temperature=0.1), info_nce(query, key, temperature=0.1))
    loss(query, key, temperature=t).backward()
    assert t.grad
    assert loss.logit_scale is None or loss.logit_scale.grad is None
    assert torch.equal(loss(query, key), before)


@both_backends
def test_a_learnable_temperature_trains_and_may_be_assigned(backend):
    query, key = two(backend=backend)
    loss = FusedInfoNCELoss(0.5, learnable_temperature=True, backend=backend).to(query.device)
    assert [name for name, _ in loss.named_parameters()] == ["logit_scale"]
    assert loss.logit_scale.shape == (1,)
    assert loss.logit_scale.dtype == torch.float32
    assert loss.logit_scale.item() == pytest.approx(math.log(2), abs=1e-7)
    assert torch.as_tensor(loss.temperature).item() == pytest.approx(0.5, rel=1e-6)
    torch.testing.assert_close(
        loss(query, key), info_nce(query, key, temperature=0.5, backend=backend), rtol=1e-6, atol=0
    )

    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    before = loss(query, key)
    before.backward()
    scale = loss.logit_scale.detach().clone().requires_grad_()
    expected = dense.info_nce(query, key, temperature=torch.exp(-scale))
    (gradient,) = torch.autograd.grad(expected, scale)
    torch.testing.assert_close(loss.logit_scale.grad, gradient, rtol=1e-4, atol=0)
    optimizer.step()
    assert loss.logit_scale != scale
    assert loss(query, key) < before

    parameter = loss.logit_scale
    for t in (0.05, torch.tensor([0.07])):
        loss.temperature = t
        assert loss.logit_scale is parameter
        assert loss.temperature.item() == pytest.approx(float(t), rel=1e-6)
    for bad, kind in ((torch.ones(6), TypeError), (0.0, ValueError), (-0.1, ValueError)):
        with pytest.raises(kind):
            loss.temperature = bad
    assert loss.temperature.item() == pytest.approx(0.07, rel=1e-6)


def test_the_clamp_holds_the_scale_and_not_the_loss():
    query, key = two()
    loss = FusedInfoNCELoss(learnable_temperature=True, max_logit_scale=100.0)
    loss.temperature = 0.001
    free = loss(query, key)
    torch.testing.assert_close(free, info_nce(query, key, temperature=0.001), rtol=1e-5, atol=0)  # no clamp inside
    free.backward()
    assert loss.logit_scale.grad
    loss.clamp_logit_scale_()
    assert loss.logit_scale.item() == pytest.approx(math.log(100), rel=1e-6)
    assert loss.logit_scale.requires_grad
    loss.temperature = 0.5
    loss.clamp_logit_scale_()
    assert torch.as_tensor(loss.temperature).item() == pytest.approx(0.5, rel=1e-6)
    for without in (FusedInfoNCELoss(), FusedInfoNCELoss(learnable_temperature=True)):
        with pytest.raises(RuntimeError, match="max_logit_scale"):
            without.clamp_logit_scale_()
    with pytest.raises(ValueError, match="learnable_temperature"):
        FusedInfoNCELoss(max_logit_scale=100.0)
    with pytest.raises(ValueError, match="max_logit_scale must be positive"):
        FusedInfoNCELoss(learnable_temperature=True, max_logit_scale=-1.0)
