"""SupCon: positives by labels or by a mask, without the matrix of all pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import views as dense
from support.helpers import DEVICE, INTERPRETED, PAIRS, both_backends, bounds, cases, error, evaluate, mix, unit
from support.memory import MIB, PeakMemory
from torch import Tensor

from fused_infonce import SupConLoss, nt_xent, sup_con

N, D = 6, 5
LABELS = torch.tensor([0, 1, 0, 2, 1, 1])  # 2 is a singleton
POSITIVES = ["views", "labels", "mask", "asymmetric", "weights"]


def positives(kind: str, n: int = N) -> dict[str, Tensor]:
    labels = LABELS.repeat(-(-n // N))[:n]
    if kind == "views":
        return {}
    if kind == "labels":
        return {"labels": labels}
    if kind == "mask":
        return {"mask": labels[:, None] == labels}
    mask = torch.rand(n, n) < 0.4
    mask[0] = False  # an anchor without positives, but another's positive
    mask[1, 0] = True
    return {"mask": mask if kind == "asymmetric" else mask * torch.rand(n, n, dtype=torch.float64)}


def paper(features: Tensor, mask: Tensor, t: float, base: float = 0.07, one: bool = False) -> Tensor:
    """Eq. 2 of Khosla et al., anchor by anchor and positive by positive; a loss for each anchor."""
    n, views = features.shape[:2]
    z = [F.normalize(features[i, v], dim=0) for v in range(views) for i in range(n)]
    sample = [i for _ in range(views) for i in range(n)]
    losses = []
    for i in range(n if one else len(z)):
        denominator = sum((z[i] @ z[a] / t).exp() for a in range(len(z)) if a != i)
        total, cardinality = 0 * z[i].sum(), 0.0
        for p in range(len(z)):
            weight = float(mask[sample[i], sample[p]])
            if p != i and weight:
                total = total + weight * ((z[i] @ z[p] / t).exp() / denominator).log()
                cardinality += weight
        losses.append(-(t / base) * total / (cardinality or 1))
    return torch.stack(losses)


@cases(kind=POSITIVES, views=[1, 2, 3], mode=["all", "one"], pairs=True)
def test_equals_the_papers_formula(backend: str, kind: str, views: int, mode: str) -> None:
    features = torch.randn(N, views, D, dtype=torch.float64, requires_grad=True)
    given = positives(kind)
    labels = given.get("labels", torch.arange(N))
    mask = given.get("mask", labels[:, None] == labels)
    rows = paper(features, mask, 0.3, 0.1, mode == "one")
    weights = torch.linspace(1, 2, len(rows), dtype=torch.float64)
    (want,) = torch.autograd.grad((weights * rows).sum(), features)
    for function, more in ((sup_con, {"backend": backend}), (dense.sup_con, {})):
        device = DEVICE[backend]
        arguments = {key: x.to(device) for key, x in given.items()} | more
        got = function(features.to(device), **arguments, temperature=0.3, contrast_mode=mode, base_temperature=0.1,
                      reduction="none")  # fmt: skip
        assert error(got, rows) <= 1e-12
        assert error(torch.autograd.grad((weights.to(device) * got).sum(), features)[0], want) <= 1e-10
        for reduction, whole in (("mean", rows.mean()), ("sum", rows.sum())):
            reduced = function(features.to(device), **arguments, temperature=0.3, contrast_mode=mode,
                              base_temperature=0.1, reduction=reduction)  # fmt: skip
            assert error(reduced, whole) <= 1e-12


@cases(
    kind=POSITIVES, views=[1, 2, 3], mode=["all", "one"], normalize=[True, False], reduction=["mean", "sum", "none"],
    pairs=True,
)  # fmt: skip
def test_gradients_are_those_of_finite_differences(
    backend: str, kind: str, views: int, mode: str, normalize: bool, reduction: str
) -> None:
    device = DEVICE[backend]
    features = torch.randn(N, views, D, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    given = {key: x.to(device) for key, x in positives(kind).items()}
    assert torch.autograd.gradcheck(
        lambda x, t: sup_con(x, **given, temperature=t, contrast_mode=mode, base_temperature=None, normalize=normalize,
                             reduction=reduction, backend=backend),
        (features, t), fast_mode=True,
    )  # fmt: skip


@both_backends
@pytest.mark.parametrize("kind", ["views", "labels"])
def test_the_factor_is_a_constant(backend: str, kind: str) -> None:
    """With t / base_temperature in the graph, a learned temperature would shrink the loss by shrinking the factor."""
    inputs = {"features": torch.randn(N, 2, D), "temperature": torch.tensor(0.3), **positives(kind)}
    inputs = {key: x.to(DEVICE[backend]) for key, x in inputs.items()}
    loss, gradients = evaluate(sup_con, inputs, base_temperature=0.1, backend=backend)
    plain, want = evaluate(sup_con, inputs, base_temperature=None, backend=backend)
    torch.testing.assert_close(loss, 3 * plain)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, 3 * want[name])


@cases(
    pairs_are=["tight", "loose"],
    t=[1.0, 0.07, 0.02, 0.01],
    dtype=[torch.float32, torch.bfloat16],
    kind=["views", "labels", "asymmetric"],
    views=[2, 3],
)
def test_losses_and_gradients_keep_the_bounds_of_infonce(
    backend: str, pairs_are: str, t: float, dtype: torch.dtype, kind: str, views: int
) -> None:
    """The truth is dense code in float64."""
    n, d = 18, 32
    given = positives(kind, n)
    centre = unit(n, d)
    if kind != "views":
        centre = centre[LABELS.repeat(n // N)]
    features = torch.stack([mix(centre, unit(n, d), PAIRS[pairs_are]) for _ in range(views)], dim=1).to(dtype)
    inputs = {"features": features, "temperature": torch.tensor(t), **given}
    exact = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    want = evaluate(dense.sup_con, exact)
    device = DEVICE[backend]
    loss, gradients = evaluate(sup_con, {key: x.to(device) for key, x in inputs.items()}, backend=backend)
    assert gradients["features"].dtype == dtype
    loss_bound, gradient_bound = bounds(dtype, t, n)
    assert error(loss, want[0]) <= loss_bound
    assert error(gradients["features"], want[1]["features"]) <= gradient_bound
    assert error(gradients["temperature"], want[1]["temperature"]) <= 1e-4


@pytest.mark.parametrize("single", ["views", "one", "labels", "mask"])
def test_single_positives_lose_nothing(single: str) -> None:
    """A loss of 1e-20, where a logsumexp less the positive is 0."""
    n = 8
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    features = torch.stack([q, mix(q, unit(n, n), 0.99)], dim=1).float()
    given, mode = {}, "one" if single == "one" else "all"
    if single in ("labels", "mask"):  # V = 1: the other sample of a class is the only positive
        features, labels = features.transpose(0, 1).reshape(2 * n, 1, n), torch.arange(2 * n) % n
        given = {"labels": labels} if single == "labels" else {"mask": labels[:, None] == labels}
    want = evaluate(dense.sup_con, {"features": features.double()}, temperature=0.02, contrast_mode=mode, **given)
    got = evaluate(sup_con, {"features": features}, temperature=0.02, contrast_mode=mode, **given)
    assert 1e-30 < want[0] < 1e-8
    assert error(got[0], want[0]) <= 2.5e-5
    assert error(got[1]["features"], want[1]["features"]) <= 2.5e-5


@both_backends
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_labels_equal_their_mask(backend: str, views: int, mask_dtype: torch.dtype) -> None:
    features, labels = torch.randn(N, views, D, device=DEVICE[backend]), LABELS.to(DEVICE[backend])
    mask = (labels[:, None] == labels).to(mask_dtype)
    rows = [
        sup_con(features, **given, reduction="none", backend=backend)
        for given in ({"labels": labels}, {"labels": labels[:, None] - 7}, {"mask": mask})
    ]
    torch.testing.assert_close(rows[1], rows[0])
    torch.testing.assert_close(rows[2], rows[0])


def test_without_positives_the_loss_is_zero() -> None:
    features = torch.randn(N, 1, D, requires_grad=True)
    rows = sup_con(features, labels=LABELS, reduction="none")
    assert rows[3] == 0
    assert (rows[[0, 1, 2, 4, 5]] > 0).all()
    torch.testing.assert_close(sup_con(features, labels=LABELS), rows.mean())
    for loss in (sup_con(features), sup_con(features[:1], labels=LABELS[:1]), sup_con(features, mask=torch.eye(N))):
        assert loss == 0
        assert not torch.autograd.grad(loss, features)[0].any()


def test_two_views_alone_are_nt_xent() -> None:
    features = torch.randn(N, 2, D)
    loss = sup_con(features, temperature=0.2, base_temperature=0.1, reduction="none")
    torch.testing.assert_close(loss, 2 * nt_xent(features[:, 0], features[:, 1], 0.2, "none"))


@both_backends
@pytest.mark.parametrize("views", [2, 3])
def test_zero_rows_have_no_gradient(backend: str, views: int) -> None:
    features = torch.randn(N, views, D, device=DEVICE[backend])
    features[2, 1] = 0
    features.requires_grad_()
    loss = sup_con(features, labels=LABELS.to(features.device), backend=backend)
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient.isfinite().all()
    assert not gradient[2, 1].any()
    assert gradient[2, 0].any()


@pytest.mark.parametrize("given", [{}, {"labels": torch.empty(0, dtype=torch.long)}, {"mask": torch.empty(0, 0)}])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("views", [2, 3])
def test_no_samples_give_nan_as_mean_and_0_as_sum(backend: str, given: dict[str, Tensor], views: int) -> None:
    empty = torch.empty(0, views, D, requires_grad=True)
    assert sup_con(empty, **given, backend=backend).isnan()
    assert sup_con(empty, **given, reduction="sum", backend=backend) == 0
    assert sup_con(empty, **given, reduction="none", backend=backend).shape == (0,)


def test_nan_is_not_swallowed() -> None:
    features = torch.randn(N, 2, D)
    features[3, 0, 0] = math.nan
    assert sup_con(features, labels=LABELS, reduction="none").isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_rows_and_nothing_else(dtype: torch.dtype) -> None:
    """The loss of the rows as the products see them; the gradient of float32 rows in float32."""
    features = torch.randn(12, 3, 16)
    labels = torch.arange(12) % 4
    want = evaluate(dense.sup_con, {"features": features.to(dtype).double()}, labels=labels)
    with torch.autocast("cpu", dtype):
        loss, gradients = evaluate(sup_con, {"features": features}, labels=labels)
    assert loss.dtype == torch.float32
    assert gradients["features"].dtype == torch.float32
    assert error(loss, want[0]) <= 1e-5
    assert error(gradients["features"], want[1]["features"]) <= 5e-3


GOOD = torch.randn(4, 2, 3)
EYE = torch.eye(4)
BAD: dict[str, Any] = {
    "a list": ({"features": [1.0]}, TypeError, "features must be a tensor"),
    "two dimensions": ({"features": GOOD[:, 0]}, ValueError, "features must have at least 3 dimensions"),
    "no views": ({"features": GOOD[:, :0]}, ValueError, "features must have at least one view"),
    "integers": ({"features": GOOD.long()}, TypeError, "features must be float16"),
    "both": ({"labels": torch.arange(4), "mask": EYE}, ValueError, "labels and mask both"),
    "labels' number": ({"labels": torch.arange(3)}, ValueError, r"labels must have shape \(4,\)"),
    "labels' shape": (
        {"labels": torch.zeros(4, 2).long()},
        ValueError,
        r"one integer a sample, shape \(4,\)",
    ),
    "labels' dtype": ({"labels": torch.rand(4)}, TypeError, "labels must be an integer tensor"),
    "labels' type": ({"labels": [0, 1, 2, 3]}, TypeError, "labels must be an integer tensor"),
    "mask's shape": ({"mask": torch.eye(3)}, ValueError, r"mask must have shape \(4, 4\)"),
    "mask's type": ({"mask": 1}, TypeError, "mask must be a tensor"),
    "mask's dtype": ({"mask": EYE.to(torch.complex64)}, TypeError, "mask must be bool, integers or floats"),
    "negative mask": ({"mask": -EYE}, ValueError, "mask must not be negative"),
    "mask's NaN": ({"mask": EYE * math.nan}, ValueError, "mask must not be negative, and finite"),
    "mask's gradient": ({"mask": EYE.clone().requires_grad_()}, ValueError, "mask must not require a gradient"),
    "mode": ({"contrast_mode": "two"}, ValueError, "contrast_mode must be one of 'all', 'one', got 'two'"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    "temperature's type": ({"temperature": "0.1"}, TypeError, "temperature must be a number"),
    "per row": ({"temperature": torch.ones(8)}, ValueError, "temperature must be a number or a one-element tensor"),
    "base": ({"base_temperature": -1.0}, ValueError, "base_temperature must be positive"),
    "base's type": ({"base_temperature": "0.07"}, TypeError, "base_temperature must be a number"),
    "workspace": ({"workspace_limit": 0}, ValueError, "workspace_limit must be a number of bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused(name: str) -> None:
    arguments, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        sup_con(**{"features": GOOD, **arguments})
    options = {key: x for key, x in arguments.items() if key not in ("features", "labels", "mask")}
    given = {key: x for key, x in arguments.items() if key not in options}
    with pytest.raises(kind, match=message):
        SupConLoss(**options)(**{"features": GOOD, **given})


def test_module_equals_function() -> None:
    features = torch.randn(N, 2, D, 3, requires_grad=True)  # further dimensions are flattened
    t = torch.nn.Parameter(torch.tensor(0.2))
    loss = SupConLoss(t, contrast_mode="one", base_temperature=0.1, reduction="none")
    assert [*loss.parameters()] == [t]
    assert torch.equal(loss(features, LABELS), sup_con(features.flatten(2), LABELS, None, t, "one", 0.1, "none"))
    loss(features, mask=torch.eye(N)).sum().backward()
    assert t.grad.isfinite()
    assert "contrast_mode='one'" in repr(loss)


@pytest.mark.parametrize(("kind", "views"), [("views", 3), ("mask", 2), ("weights", 1)])
def test_compiled_equals_eager(kind: str, views: int) -> None:
    torch._dynamo.reset()
    features, given = torch.randn(N, views, D, requires_grad=True), positives(kind)
    loss = SupConLoss(torch.tensor(0.1, requires_grad=True))
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(features, **given)
        results.append((value, *torch.autograd.grad(value, (features, loss.temperature), materialize_grads=True)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="measured where the torch backend runs by itself: in CPU runs")
def test_memory_of_512_embeddings_in_64_classes() -> None:
    features, labels = torch.randn(512, 1, 128, requires_grad=True), torch.arange(512) % 64
    with PeakMemory() as memory:
        sup_con(features, labels).backward()
    assert memory.peak <= 50 * MIB
    assert features.grad.any()


@pytest.mark.parametrize("mode", ["all", "one"])
def test_memory_does_not_grow_with_pairs(mode: str) -> None:
    n, d = 4096, 32
    features, labels = torch.randn(n, 2, d, requires_grad=True), torch.arange(n) % 64
    with PeakMemory() as memory:
        sup_con(features, labels, contrast_mode=mode, workspace_limit=MIB).backward()
    assert memory.peak <= MIB + 20 * features.nbytes
    assert memory.peak <= (2 * n) ** 2 * 4 / 16
