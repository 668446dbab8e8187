"""Weights of rows and label smoothing: against dense code, finite differences and torch's cross entropy."""

import pytest
import torch
import torch.nn.functional as F
from support.helpers import (
    DEVICE,
    FACTORS,
    TRITON,
    both_backends,
    cases,
    check,
    error,
    evaluate,
    make_call,
    on,
    oracle,
    valid,
)

from fused_infonce import FusedInfoNCELoss, info_nce

N = 7
WEIGHTS = {"weight": [None, "constant", "learnable"], "smoothing": [0.0, 0.3]}


def some(case):
    return valid(case) and (case["weight"] is not None or case["smoothing"] > 0)


@cases(some, pairs=True, together=True, **FACTORS, **WEIGHTS)
def test_equals_dense_code(backend, case):
    inputs, options = make_call(N, 9, 5, 3, **{name: case[name] for name in FACTORS})
    options |= {"label_smoothing": case["smoothing"]}
    if case["weight"] is not None:
        (inputs if case["weight"] == "learnable" else options)["weight"] = torch.rand(N, dtype=torch.float64)
        (inputs | options)["weight"][2] = 0
    upstream = torch.rand(N, dtype=torch.float64) + 0.5 if case["reduction"] == "none" else None
    want = oracle(inputs, upstream, **options)
    if isinstance(options.get("weight"), torch.Tensor):
        options["weight"] = options["weight"].to(DEVICE[backend])
    upstream = None if upstream is None else upstream.to(DEVICE[backend])
    loss, gradients = evaluate(info_nce, on(DEVICE[backend], inputs), upstream, backend=backend, **options)
    torch.testing.assert_close(loss.cpu(), want[0], rtol=1e-10, atol=1e-12)
    for name, gradient in want[1].items():
        assert gradients[name] is not None, name
        torch.testing.assert_close(gradients[name].cpu(), gradient, rtol=1e-9, atol=1e-11)


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_weights_and_smoothing_are_those_of_finite_differences(backend, reduction, symmetric):
    device = DEVICE[backend]
    query, key = (torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    t = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.rand(4, dtype=torch.float64, device=device, requires_grad=True)
    options = {"reduction": reduction, "symmetric": symmetric, "label_smoothing": 0.2, "backend": backend}
    f = lambda q, k, t, w: info_nce(q, k, temperature=t, weight=w, **options)  # noqa: E731
    assert torch.autograd.gradcheck(f, (query, key, t, w), fast_mode=backend == "triton")


@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
def test_smoothing_is_that_of_cross_entropy(eps):
    query, key, target = torch.randn(N, 5), torch.randn(9, 5), torch.randint(9, (N,))
    target[1] = -100
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.2
    got = info_nce(query, key, temperature=0.2, target=target, label_smoothing=eps)
    torch.testing.assert_close(got, F.cross_entropy(logits, target, label_smoothing=eps))


def test_a_weighted_mean_is_over_the_sum_of_weights():
    query, key, w = torch.randn(N, 5), torch.randn(N, 5), torch.rand(N)
    rows = info_nce(query, key, reduction="none")
    torch.testing.assert_close(info_nce(query, key, weight=w), (rows * w).sum() / w.sum())
    torch.testing.assert_close(info_nce(query, key, weight=w, reduction="sum"), (rows * w).sum())
    torch.testing.assert_close(info_nce(query, key, weight=w, reduction="none"), rows * w)
    assert info_nce(query, key, weight=torch.zeros(N)).isnan()
    torch.testing.assert_close(FusedInfoNCELoss()(query, key, weight=w), info_nce(query, key, weight=w))


@pytest.mark.parametrize("backend", ["torch", TRITON, "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", ["weight", "target"])
def test_the_value_of_a_row_that_does_not_count_is_0_even_where_it_is_nan(backend, smoothing, reduction, how):
    query, key = (torch.randn(N, 5, device=DEVICE.get(backend), requires_grad=True) for _ in range(2))
    out = torch.arange(N, device=query.device) == 2
    given = {"weight": 1.0 - out.float()} if how == "weight" else {"target": torch.arange(N).to(out).where(~out, -100)}
    options = given | {"reduction": reduction, "label_smoothing": smoothing, "backend": backend}
    lost = query.masked_fill(out[:, None], torch.nan)
    loss = info_nce(lost, key, **options)
    torch.testing.assert_close(loss, info_nce(query, key, **options))
    gradients = torch.autograd.grad(loss.sum(), (query, key))
    assert gradients[1].isnan().all()  # which the documentation says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [0.02, 0.1, 1.0])
def test_smoothed_losses_keep_the_bounds_of_infonce(dtype, t):
    query = torch.randn(64, 32)
    key = query + torch.randn(64, 32)
    inputs = {"query": query.to(dtype), "positive_key": key.to(dtype), "temperature": torch.tensor(t)}
    for eps in (0.1, 1.0):
        check("torch", inputs, label_smoothing=eps)


@pytest.mark.parametrize("negative_mode", ["unpaired", "paired"])
def test_smoothing_under_autocast_is_that_of_the_rounded_inputs(negative_mode):
    shapes = {
        "query": (16, 8),
        "positive_key": (16, 8),
        "negative_keys": (16, 3, 8) if negative_mode == "paired" else (5, 8),
    }
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    options = {"temperature": 0.1, "label_smoothing": 0.5, "negative_mode": negative_mode}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(**inputs, **options)
    rounded = {name: x.bfloat16() for name, x in inputs.items()}
    torch.testing.assert_close(loss, info_nce(**rounded, **options), rtol=1e-5, atol=0)


def test_both_directions_with_negatives_apart_are_rounded_once():
    """Two problems, whose 16-bit gradients autograd would add after rounding each."""
    rows = [torch.randn(256, 64) + 3 * torch.randn(64) for _ in range(2)] + [torch.randn(64, 64)]
    names = ("query", "positive_key", "negative_keys")
    inputs = {name: x.bfloat16() for name, x in zip(names, rows, strict=True)}
    options = {"symmetric": True, "normalize": False, "temperature": 8.0}
    want = oracle(inputs, **options)
    _, gradients = evaluate(info_nce, inputs, **options)
    for name, gradient in want[1].items():
        assert error(gradients[name], gradient) <= 2.5e-3, name


BAD = {
    "a short weight": (
        {"weight": torch.ones(N - 1)},
        ValueError,
        r"weight must be .* of shape \(7,\), got shape \(6,\)",
    ),
    "a negative weight": ({"weight": torch.full((N,), -1.0)}, ValueError, "weight must not be negative"),
    "an infinite weight": (
        {"weight": torch.full((N,), torch.inf)},
        ValueError,
        "not be negative, and finite",
    ),
    "integers": ({"weight": torch.ones(N, dtype=torch.int64)}, TypeError, "weight must be a floating tensor"),
    "a list": ({"weight": [1.0] * N}, TypeError, "weight must be a floating tensor.*got list"),
    "too smooth": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "no number": ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got str"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_weight_or_smoothing_is_refused(name):
    options, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        info_nce(torch.randn(N, 4), torch.randn(N, 4), **options)
