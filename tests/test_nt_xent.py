"""NT-Xent: half of a symmetric score matrix gives what all of it gives."""

from __future__ import annotations

import pytest
import torch

from fused_infonce import NTXentLoss, nt_xent, plan, reference


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(value.double() - truth) / torch.linalg.vector_norm(truth)).item()


def views(n: int, d: int, noise: float, dtype: torch.dtype) -> list[torch.Tensor]:
    a = torch.randn(n, d)
    return [x.to(dtype).requires_grad_() for x in (a, a + noise * torch.randn(n, d))]


def with_gradients(loss, inputs: list[torch.Tensor], *args, **kwargs) -> list[torch.Tensor]:
    value = loss(*inputs, *args, **kwargs)
    weights = torch.linspace(1, 2, value.numel(), dtype=torch.float64).reshape(value.shape).to(value.dtype)
    return [value, *torch.autograd.grad((value * weights).sum(), inputs)]


BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [8, 1024])  # rows of a block: several blocks, and one
@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bounds(backend: str, side: int, temperature: float, dtype: torch.dtype, monkeypatch) -> None:
    for name in ("TRIANGULAR_ROWS", "TRIANGULAR_SIDE"):
        monkeypatch.setattr(plan, name, side)
    monkeypatch.setattr(plan, "DENSE_SELF", 0 if side == 8 else plan.DENSE_SELF)
    monkeypatch.setattr(plan, "STREAMING_DIM", 64 if side == 1024 else 16)  # on the Triton backend: both plans
    inputs = views(13, 24, 1.0, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for reduction in ("mean", "none"):
        value, *grads = with_gradients(nt_xent, inputs, temperature, reduction, backend=backend)
        true_value, *true_grads = with_gradients(reference.nt_xent, exact, temperature, reduction)
        fp32 = 1e-5 * max(1, 0.05 / temperature)
        bound = {torch.bfloat16: 5e-3, torch.float32: fp32, torch.float64: 1e-11}[dtype]
        assert relative(value, true_value) <= min(bound, fp32)
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert grad.dtype == dtype
            assert relative(grad, true_grad) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck(backend: str, per_row: bool, monkeypatch) -> None:
    monkeypatch.setattr(plan, "TRIANGULAR_ROWS", 4)
    monkeypatch.setattr(plan, "DENSE_SELF", 0)
    a, b = views(5, 3, 1.0, torch.float64)
    t = (0.2 + 0.1 * torch.rand(10 if per_row else 1, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: nt_xent(x[0], x[1], x[2], backend=backend), (a, b, t), fast_mode=True)


def test_plan_is_triangular_on_the_torch_backend() -> None:
    chosen = plan.choose(
        backend="torch", device="cpu", n=8192, m=8192, d=768, itemsize=4, acc_itemsize=4,
        gradients=True, columns=False, self_similar=True, reduced=True, per_row=False, plain=True, limit=2**26,
        bounded=True,
    )  # fmt: skip
    assert (chosen.name, chosen.flops) == ("triangular", 4)


def test_empty_and_bad_input() -> None:
    empty = torch.empty(0, 4)
    assert nt_xent(empty, empty).isnan()
    assert nt_xent(empty, empty, reduction="sum") == 0
    with pytest.raises(ValueError, match=r"view_b must have shape \(3, 4\)"):
        nt_xent(torch.randn(3, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="temperature must be positive"):
        NTXentLoss(temperature=-0.5)


def test_module_equals_function() -> None:
    a, b = views(6, 4, 1.0, torch.float32)
    assert torch.equal(NTXentLoss(0.3, "none")(a, b), nt_xent(a, b, 0.3, "none"))
