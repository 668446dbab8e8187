"""The plan of few launches on the Triton backend: loss and gradients against float64, and what it is chosen for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import decoupled as dense_decoupled
from oracles import info_nce as dense_info_nce
from oracles import views
from support.helpers import DEVICE, TRITON, Inputs, bounds, embeddings, error, loss_scale, watch_plans
from torch import Tensor

from fused_infonce import checks, decoupled_info_nce, explain, info_nce, nt_xent
from fused_infonce.backends import plan, registry

KINDS = ("one direction", "both", "self-similarity")
device = pytest.mark.parametrize("device", [pytest.param(DEVICE["triton"], marks=TRITON.marks)])
kinds = pytest.mark.parametrize("kind", KINDS)


def ours(kind: str, a: Tensor, b: Tensor, t: float | Tensor, **options: Any) -> Tensor:
    if kind == "self-similarity":
        return nt_xent(a, b, t, backend="triton", **options)
    return info_nce(a, b, temperature=t, symmetric=kind == "both", backend="triton", **options)


def truth(kind: str, a: Tensor, b: Tensor, t: float | Tensor, **options: Any) -> Tensor:
    if kind == "self-similarity":
        return views.nt_xent(a, b, temperature=t, **options)
    return dense_info_nce.info_nce(a, b, temperature=t, symmetric=kind == "both", **options)


def check(kind: str, a: Tensor, b: Tensor, t: float, device: str, **options: Any) -> None:
    """Assert the bounds of a loss of `a` and `b`, in their dtype, and of a temperature that has a gradient."""
    dtype = a.dtype
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    exact = [x.double().requires_grad_() for x in (a, b, torch.tensor(t, dtype=stats))]
    want = truth(kind, *exact, **options)
    slopes = torch.autograd.grad(want, exact)
    scale = loss_scale(dtype, slopes[:2])
    inputs = [x.to(device).requires_grad_() for x in (a, b, torch.tensor(t, dtype=stats))]
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    loss = ours(kind, *inputs, **on_device)
    grads = torch.autograd.grad(loss, inputs, torch.full_like(loss, scale))
    of_loss, of_rows = bounds(dtype, t)
    assert error(loss, want) <= of_loss
    for grad, slope in zip(grads[:2], slopes[:2], strict=True):
        assert grad.dtype == dtype
        assert error(grad.double() / scale, slope) <= of_rows
    assert error(grads[2] / scale, slopes[2]) <= (1e-10 if dtype == torch.float64 else 1e-4)


@device
@kinds
@pytest.mark.parametrize(
    ("dtype", "pairs", "t", "n", "d"),
    [
        (torch.bfloat16, "tight", 0.05, 33, 40),
        (torch.bfloat16, "loose", 0.01, 40, 17),
        (torch.bfloat16, "cone_98", 0.1, 64, 32),
        (torch.float16, "cone_90", 0.02, 33, 40),
        (torch.float16, "medium", 1.0, 40, 17),
        (torch.float32, "tight", 0.1, 40, 17),
        (torch.float32, "loose", 0.01, 64, 32),
        (torch.float64, "cone_98", 0.05, 33, 40),
    ],
    ids=str,
)
def test_losses_and_gradients_keep_the_bounds(
    kind: str, dtype: torch.dtype, pairs: str, t: float, n: int, d: int, device: str, monkeypatch
) -> None:
    """At temperatures whose exponentials fit and do not, with ragged rows and lengths."""
    plans = watch_plans(monkeypatch)
    a, b, _ = embeddings(pairs, n, d)
    check(kind, a.to(dtype), b.to(dtype), t, device)
    assert {chosen.name for chosen in plans} == {"dense"}


@pytest.mark.interpreter
@kinds
def test_tiles_that_tensor_cores_multiply_in_tf32(kind: str, precision, monkeypatch) -> None:
    """A GPU's, over ragged rows and lengths, of which the interpreter makes float32 products."""
    from fused_infonce.backends.triton import dense, tiles

    monkeypatch.setattr(tiles, "architecture", lambda _: "sm_90")
    precision("high")
    monkeypatch.setattr(dense, "KINDS", {})
    a, b, _ = embeddings("loose", 75, 140)
    check(kind, a.float(), b.float(), 0.05, "cpu")
    ((*_, kind_of_call),) = dense.KINDS.values()
    assert "tf32" in kind_of_call.rest
    assert kind_of_call.grid[0] == -(-75 * (1 + (kind == "self-similarity")) // 16)


@device
@kinds
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_finite_differences(kind: str, reduction: str, device: str) -> None:
    a, b = (torch.randn(5, 4, dtype=torch.float64, device=device).requires_grad_() for _ in range(2))
    t = torch.tensor(0.3, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: ours(kind, *x, reduction=reduction), (a, b, t), fast_mode=True)


@device
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum", "normalize": False},
        {"weight": torch.arange(80.0)[::2] % 3, "reduction": "sum"},
        {"weight": torch.arange(40.0) % 3},
        {"query_ids": torch.arange(40) % 7, "key_ids": torch.arange(40) % 9},
        {"margin": 0.3, "weight": torch.arange(40.0) % 3},
    ],
    ids=["not normalised", "weights apart", "weights", "ids", "a margin"],
)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_options_of_calls(kind: str, options: dict[str, Any], device: str, monkeypatch) -> None:
    plans = watch_plans(monkeypatch)
    a, b = torch.randn(40, 20), torch.randn(40, 20)
    if "normalize" in options:
        a, b = a / 4, b / 4
    for dtype in (torch.bfloat16, torch.float64):
        check(kind, a.to(dtype), b.to(dtype), 0.1, device, **options)
    assert {chosen.name for chosen in plans} == {"dense"}


@device
@pytest.mark.parametrize("kind", KINDS[:2])
def test_rows_may_have_temperatures_of_their_own(kind: str, device: str) -> None:
    a, b = (torch.randn(37, 16, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.02, 0.4, 37, dtype=torch.float64)
    exact = [x.clone().requires_grad_() for x in (a, b, t)]
    inputs = [x.to(device).requires_grad_() for x in (a, b, t)]
    loss, want = ours(kind, *inputs), truth(kind, *exact)
    assert error(loss, want) <= 1e-12
    for grad, slope in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, exact), strict=True):
        assert error(grad, slope) <= 1e-10


@device
@pytest.mark.parametrize("shape", [(), (1,), (40,)], ids=str)
@pytest.mark.parametrize("bad", [0.0, -0.1, torch.nan, torch.inf])
def test_a_temperature_that_is_not_read_is_nan_where_it_is_bad(
    shape: tuple[int, ...], bad: float, device: str, monkeypatch
) -> None:
    """As on a GPU, where kernels see to it; a good one gives what one does that is read."""
    a, b = (torch.randn(40, 24, device=device) for _ in range(2))

    def run(value: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (a, b, value)]
        loss = ours("both" if shape == () else "one direction", *inputs)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    t = torch.full(shape, 0.1, device=device)
    want = run(t)
    monkeypatch.setattr(checks, "values_are_free", lambda _: False)
    for x, y in zip(run(t), want, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y)
    t.view(-1)[:1] = bad
    assert all(x.isnan().any() for x in run(t))


@device
def test_the_decoupled_loss(device: str, monkeypatch) -> None:
    plans = watch_plans(monkeypatch)
    inputs = [torch.randn(40, 24, dtype=torch.float64, device=device).requires_grad_() for _ in range(2)]
    exact = [x.detach().cpu().requires_grad_() for x in inputs]
    loss = decoupled_info_nce(*inputs, temperature=0.02, backend="triton")
    want = dense_decoupled.decoupled_info_nce(*exact, temperature=0.02)
    assert error(loss, want) <= 1e-12
    for grad, slope in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, exact), strict=True):
        assert error(grad, slope) <= 1e-10
    assert {chosen.name for chosen in plans} == {"dense"}


@device
@kinds
def test_zero_rows_have_no_gradient_and_spoil_nothing(kind: str, device: str) -> None:
    a, b = (torch.randn(40, 24) for _ in range(2))
    a[3], b[5] = 0, 0
    check(kind, a, b, 0.05, device)
    inputs = [x.to(device).requires_grad_() for x in (a, b)]
    grads = torch.autograd.grad(ours(kind, *inputs, 0.05), inputs)
    assert not grads[0][3].any()
    assert not grads[1][5].any()


@device
@kinds
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
def test_rows_that_are_not_finite_are_never_swallowed(kind: str, bad: float, device: str) -> None:
    a, b = (torch.randn(40, 24, device=device) for _ in range(2))
    a[7, 3] = bad
    assert ours(kind, a, b, 0.05).isnan()


@device
def test_a_row_of_weight_zero_counts_for_nothing(device: str) -> None:
    a, b = (torch.randn(40, 24, device=device) for _ in range(2))
    weight = torch.ones(40, device=device)
    weight[7] = 0
    want = ours("one direction", a, b, 0.05, weight=weight)
    a[7] = torch.nan
    torch.testing.assert_close(ours("one direction", a, b, 0.05, weight=weight), want)


@device
@kinds
def test_what_has_no_gradient_is_not_made(kind: str, device: str) -> None:
    """One side alone, the temperature alone, and nothing at all."""
    a, b = (torch.randn(40, 24, device=device) for _ in range(2))
    t = torch.tensor(0.05, device=device)
    leaves = [x.clone().requires_grad_() for x in (a, b, t)]
    value = ours(kind, *leaves)
    every = torch.autograd.grad(value, leaves)
    assert ours(kind, a, b, t) == value
    for i, grad in enumerate(every):
        inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate((a, b, t))]
        (alone,) = torch.autograd.grad(ours(kind, *inputs), [inputs[i]])
        torch.testing.assert_close(alone, grad)


@device
@kinds
def test_calls_repeat_to_the_bit_and_backwards_may_repeat(kind: str, device: str) -> None:
    inputs = [torch.randn(35, 20, device=device).bfloat16().requires_grad_() for _ in range(2)]
    loss = ours(kind, *inputs, 0.05)
    first, again = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    other = torch.autograd.grad(ours(kind, *inputs, 0.05), inputs)
    halves = torch.autograd.grad(loss / 2, inputs)
    for x, y, z, half in zip(first, again, other, halves, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
        assert torch.equal(half * 2, x)


@device
def test_rows_of_other_strides_and_alignments_are_calls_of_another_kind(device: str) -> None:
    """Launches are remembered by what kernels are compiled for: nothing of an earlier call is used for another."""
    wide = torch.randn(40, 50, device=device)
    for rows in (wide[:, :24], wide[:, 1:25], wide[:, 1:26], wide[::2, :24], wide[:, :24].clone()):
        exact = rows.cpu().double()
        other = rows.flip(1)
        want = truth("one direction", exact, other.cpu().double(), 0.1)
        assert error(ours("one direction", rows, other, 0.1), want) <= 1e-5


@device
def test_what_it_is_chosen_for(device: str, monkeypatch) -> None:
    a, b, more = (torch.randn(40, 24, device=device) for _ in range(3))

    def name(*inputs: Tensor, **options: Any) -> str:
        return explain(*inputs, temperature=0.05, backend="triton", **options)[0].name

    assert name(a, b) == name(a, b, symmetric=True) == name(a, b.requires_grad_()) == "dense"
    assert name(a, b, reduction="none") == "workspace"  # its gradients are known in the backward only
    assert name(a, b, more) == name(a, b, target=torch.zeros(40, dtype=torch.int64, device=device)) != "dense"
    assert name(a, b, workspace_limit=1 << 13) != "dense"
    monkeypatch.setattr(plan, "GPU_DENSE_WIDE", 40 * 40 - 1)
    registry.remembered.clear()
    assert name(a, b) != "dense"
    assert name(a.bfloat16(), b.bfloat16()) == "dense"


@device
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float16])
def test_autocast_in_float16_of_rows_beyond_its_range(query_dtype: torch.dtype, device: str) -> None:
    """Rows that are not normalised are divided by powers of two, which come back as scales."""
    size = 1e6 if query_dtype == torch.float32 else 1e3
    inputs: Inputs = {"query": (torch.randn(30, 16) * size).to(query_dtype), "key": torch.randn(30, 16) / size}
    leaves = [x.to(device).requires_grad_() for x in inputs.values()]
    with torch.autocast(device, dtype=torch.float16):
        loss = info_nce(*leaves, temperature=1.0, normalize=False, backend="triton")
    exact = [x.double().requires_grad_() for x in inputs.values()]
    want = dense_info_nce.info_nce(*exact, temperature=1.0, normalize=False)
    assert error(loss, want) <= 1e-3  # of rows rounded to float16
    for grad, slope in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, exact), strict=True):
        assert error(grad, slope) <= 5e-3
