"""NT-Xent: half of a symmetric score matrix gives what all of it gives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from oracles import views as dense
from support.helpers import DEVICE, bounds, cases, mix, unit
from support.memory import MIB, PeakMemory

from fused_infonce import NTXentLoss, nt_xent
from fused_infonce.backends import plan


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
def test_losses_and_gradients_of_two_views_keep_the_bounds_of_infonce(
    backend: str, side: int, temperature: float, dtype: torch.dtype, monkeypatch
) -> None:
    for name in ("TRIANGULAR_ROWS", "TRIANGULAR_SIDE"):
        monkeypatch.setattr(plan, name, side)
    monkeypatch.setattr(plan, "DENSE_SELF", 0 if side == 8 else plan.DENSE_SELF)
    monkeypatch.setattr(plan, "STREAMING_DIM", 64 if side == 1024 else 16)  # on the Triton backend: both plans
    inputs = views(13, 24, 1.0, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for reduction in ("mean", "none"):
        value, *grads = with_gradients(nt_xent, inputs, temperature, reduction, backend=backend)
        true_value, *true_grads = with_gradients(dense.nt_xent, exact, temperature, reduction)
        fp32 = 1e-5 * max(1, 0.05 / temperature)
        bound = {torch.bfloat16: 5e-3, torch.float32: fp32, torch.float64: 1e-11}[dtype]
        assert relative(value, true_value) <= min(bound, fp32)
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert grad.dtype == dtype
            assert relative(grad, true_grad) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_row", [False, True])
def test_gradients_of_two_views_are_those_of_finite_differences(backend: str, per_row: bool, monkeypatch) -> None:
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


def test_no_rows_give_nan_as_mean_and_a_bad_argument_is_refused() -> None:
    empty = torch.empty(0, 4)
    assert nt_xent(empty, empty).isnan()
    assert nt_xent(empty, empty, reduction="sum") == 0
    with pytest.raises(ValueError, match=r"view_b must have shape \(3, 4\)"):
        nt_xent(torch.randn(3, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="temperature must be positive"):
        NTXentLoss(temperature=-0.5)


def test_module_equals_function() -> None:
    a, b = views(6, 4, 1.0, torch.float32)
    assert torch.equal(NTXentLoss(0.3, reduction="none")(a, b), nt_xent(a, b, 0.3, "none"))
    more = [a + b, a - b]
    assert torch.equal(NTXentLoss(0.3)(a, b, *more), nt_xent(a, b, 0.3, more_views=more))


def many_views(count: int, n: int, d: int, cosine: float, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    centre = unit(n, d)
    return [mix(centre, unit(n, d), cosine).to(dtype).requires_grad_() for _ in range(count)]


def of_views(views, temperature, reduction="mean", **options):
    return nt_xent(views[0], views[1], temperature, reduction, more_views=views[2:], **options)


def truth_of(views, temperature, reduction="mean"):
    return dense.nt_xent(views[0], views[1], temperature, reduction, more_views=views[2:])


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_of_views_against_the_other_samples(backend: str, count: int) -> None:
    """Row by row and pair by pair."""
    n, t = 4, 0.2
    views = many_views(count, n, 5, 0.7)
    want = []
    for a in range(count):
        for i in range(n):
            others = sum((views[a][i] @ x[j] / t).exp() for x in views for j in range(n) if j != i)
            positives = [(views[a][i] @ views[b][i] / t).exp() for b in range(count) if b != a]
            want.append(-sum((p / (p + others)).log() for p in positives) / (count - 1))
    rows = torch.stack(want)
    torch.testing.assert_close(of_views(views, t, "none", backend=backend), rows)
    torch.testing.assert_close(of_views(views, t, "sum", backend=backend), rows.sum())
    mean = of_views(views, t, backend=backend)
    torch.testing.assert_close(mean, rows.mean())
    torch.testing.assert_close(truth_of(views, t, "none"), rows)
    exact = torch.autograd.grad(truth_of(views, t), views)
    for got, wanted in zip(torch.autograd.grad(mean, views), exact, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cosine", [0.92, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.02, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_and_gradients_of_three_views_keep_the_bounds_of_infonce(
    backend: str, cosine: float, temperature: float, dtype: torch.dtype
) -> None:
    inputs = many_views(3, 16, 32, cosine, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for reduction in ("mean", "none"):
        results = []
        for views, function in ((inputs, partial(of_views, backend=backend)), (exact, truth_of)):
            t = torch.tensor(temperature, dtype=torch.float64 if views is exact else torch.float32, requires_grad=True)
            value = function(views, t, reduction)
            weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
            results.append((value, *torch.autograd.grad((value * weights).sum(), [t, *views])))
        (value, dt, *grads), (true_value, true_dt, *true_grads) = results
        loss_bound, gradient_bound = bounds(dtype, temperature, 16)
        assert relative(value, true_value) <= loss_bound
        assert relative(dt, true_dt) <= 1e-4
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert grad.dtype == dtype
            assert relative(grad, true_grad) <= gradient_bound


@cases(pairs=True, normalize=[True, False], reduction=["mean", "sum", "none"], per_row=[False, True])
def test_gradients_of_three_views_are_those_of_finite_differences(
    backend: str, normalize: bool, reduction: str, per_row: bool
) -> None:
    where = {"dtype": torch.float64, "device": DEVICE[backend]}
    views = [torch.randn(4, 3, **where, requires_grad=True) for _ in range(3)]
    t = (0.4 + 0.1 * torch.rand(12 if per_row else 1, **where)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t, *views: of_views(views, t, reduction, normalize=normalize, backend=backend), (t, *views),
        fast_mode=True,
    )  # fmt: skip


def test_three_views_of_no_samples_or_of_one_have_nothing_to_compare() -> None:
    empty = [torch.empty(0, 4)] * 3
    assert of_views(empty, 0.1).isnan()
    assert of_views(empty, 0.1, "sum") == 0
    alone = [torch.randn(1, 4, requires_grad=True) for _ in range(3)]  # one sample has no negatives
    loss = of_views(alone, 0.1)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, alone))


def test_a_zero_row_among_three_views_has_no_gradient_and_a_nan_is_not_swallowed() -> None:
    views = [torch.randn(5, 4) for _ in range(3)]
    views[1][2] = 0
    views = [x.requires_grad_() for x in views]
    gradient = torch.autograd.grad(of_views(views, 0.1), views)[1]
    assert not gradient[2].any()
    assert gradient.isfinite().all()
    views[1].data[2] = torch.nan
    assert of_views(views, 0.1, "none").isnan().all()


def test_a_bad_view_is_refused_by_name() -> None:
    a = torch.randn(3, 4)
    for views, kind, message in (
        (a, TypeError, "more_views must be a sequence of tensors"),
        (None, TypeError, "more_views must be a sequence of tensors"),
        ([a, a[:2]], ValueError, r"more_views\[1\] must have shape \(3, 4\)"),
        ([a[0]], ValueError, r"more_views\[0\] must have 2 dimensions"),
        ([a.double()], TypeError, r"more_views\[0\] must be torch.float32"),
        ([3], TypeError, r"more_views\[0\] must be a tensor"),
    ):
        with pytest.raises(kind, match=message):
            nt_xent(a, a, more_views=views)
    with pytest.raises(ValueError, match=r"one value per row, shape \(9,\)"):
        nt_xent(a, a, torch.ones(6), more_views=[a])


def test_autocast_rounds_three_views_and_nothing_else() -> None:
    inputs = [x.detach().requires_grad_() for x in many_views(3, 12, 16, 0.7, torch.float32)]
    exact = [x.detach().bfloat16().double().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        value = of_views(inputs, 0.1)
    truth = truth_of(exact, 0.1)
    assert relative(value, truth) <= 1e-5
    pairs = (torch.autograd.grad(value, inputs), torch.autograd.grad(truth, exact))
    for got, want in zip(*pairs, strict=True):
        assert got.dtype == torch.float32
        assert relative(got, want) <= 5e-3


def test_memory_of_three_views_is_the_limit_and_a_few_times_the_rows() -> None:
    views = [torch.randn(2048, 32, requires_grad=True) for _ in range(3)]
    with PeakMemory() as memory:
        of_views(views, 0.1, workspace_limit=MIB).backward()
    assert memory.peak <= MIB + 20 * 3 * views[0].nbytes


def test_a_temperature_may_be_assigned() -> None:
    loss = NTXentLoss(torch.nn.Parameter(torch.tensor(0.3)))
    assert len(list(loss.parameters())) == 1
    a, b = views(6, 4, 1.0, torch.float32)
    loss.temperature = 0.2
    assert not list(loss.parameters())
    assert torch.equal(loss(a, b), nt_xent(a, b, 0.2))
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss.temperature = -1


@pytest.mark.parametrize(("inputs", "products"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_autocast_to_the_other_16_bit_dtype(inputs: str, products: str) -> None:
    a, b = views(6, 4, 1.0, getattr(torch, inputs))
    with torch.autocast("cpu", dtype=getattr(torch, products)):
        loss = nt_xent(a, b, 0.5)
    a, b = (x.to(getattr(torch, products)) for x in (a, b))
    torch.testing.assert_close(loss, nt_xent(a, b, 0.5), rtol=1e-5, atol=0)
