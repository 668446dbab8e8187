"""Biases in calls: autocast, compilation, modules, queries that are the keys, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from oracles.info_nce import info_nce as dense_info_nce
from support.helpers import (
    DEVICE,
    TRITON,
    elsewhere,
    error,
    evaluate,
    on,
)  # fmt: skip

from fused_infonce import ClipLoss, DCLLoss, FusedInfoNCELoss, GroupedInfoNCELoss, MoCoLoss, MultipleNegativesLoss
from fused_infonce.backends import plan
from fused_infonce.functional import (
    clip_loss,
    decoupled_info_nce,
    grouped_info_nce,
    info_nce,
    moco_loss,
    multiple_negatives,
)

ALL = pytest.mark.parametrize("backend", ["torch", "reference", TRITON])
NAMES = {"torch": "torch", "reference": "torch", "triton": "triton"}  # of the devices
N, D = 6, 5


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def device_of(backend: str) -> str:
    return DEVICE[NAMES[backend]]


def test_autocast_leaves_biases_as_they_are():
    """Rows are cast, and the gradient of a bias of float32 is what it is for rows of bfloat16."""
    inputs = {"query": torch.randn(N, D), "positive_key": torch.randn(N, D), "key_bias": 10 * torch.randn(N)}
    narrow = {name: x if name == "key_bias" else x.bfloat16() for name, x in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads = evaluate(info_nce, inputs)
    want, exact = evaluate(info_nce, narrow)
    assert loss == want
    assert torch.equal(grads["key_bias"], exact["key_bias"])


def test_the_reference_is_differentiable_twice_in_a_bias():
    query, key, bias = (x.requires_grad_() for x in (rows(3, 2), rows(3, 2), rows(3)))
    assert torch.autograd.gradgradcheck(
        lambda query, key, bias: info_nce(query, key, temperature=0.7, key_bias=bias, backend="reference"),
        (query, key, bias),
    )
    by_transform = torch.func.grad(lambda b: info_nce(query, key, key_bias=b, backend="reference"))(bias)
    torch.testing.assert_close(by_transform, torch.autograd.grad(info_nce(query, key, key_bias=bias), bias)[0])


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize(("symmetric", "reduction"), [(True, "mean"), (False, "none")])
def test_a_compiled_call_equals_an_eager_one(backend, symmetric, reduction):
    device = device_of(backend)
    inputs = {"query": torch.randn(8, D), "positive_key": torch.randn(8, D), "key_bias": torch.randn(8)}

    def function(query, positive_key, key_bias):
        return info_nce(
            query, positive_key, key_bias=key_bias, symmetric=symmetric, reduction=reduction, backend=backend
        ).sum()

    eager = evaluate(function, on(device, inputs))
    compiled = evaluate(torch.compile(function, fullgraph=True, backend="eager"), on(device, inputs))
    for name, x in eager[1].items():
        torch.testing.assert_close(compiled[1][name], x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled[0], eager[0])


def test_modules_pass_biases_on():
    """Each module with a bias gives its function's value, which differs from that without."""
    query, key, bias = rows(N, D), rows(N, D), rows(N)
    every = [
        (FusedInfoNCELoss(), (query, key), info_nce, {"key_bias": bias, "positive_bias": False}),
        (DCLLoss(negatives="keys"), (query, key), decoupled_info_nce, {"key_bias": bias, "positive_bias": False}),
        (GroupedInfoNCELoss(1), (query, key), lambda *x, **o: grouped_info_nce(*x, 1, **o), {"key_bias": bias}),
        (ClipLoss(), (query, key, 3.0), clip_loss, {"text_bias": bias, "image_bias": rows(N)}),
        (ClipLoss(temperature=0.5), (query, key), lambda *x, **o: clip_loss(*x, 2.0, **o), {"text_bias": bias}),
        (MultipleNegativesLoss(), (query, [key]), multiple_negatives, {"key_bias": bias[None], "positive_bias": False}),
    ]
    for module, call, function, biases in every:
        assert module(*call, **biases) == function(*call, **biases) != module(*call)
    loss = MoCoLoss(D, queue_size=8).double()
    biases = {"key_bias": bias, "negative_bias": rows(8)}
    want = moco_loss(query, key, loss.queue, **biases)
    assert loss(query, key, enqueue=False, **biases) == want != loss(query, key)


@ALL
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_queries_that_are_the_keys_have_the_gradients_of_both(backend, reduction):
    x, bias = rows(N, D).requires_grad_(), rows(N).requires_grad_()
    options = {"reduction": reduction, "temperature": 0.5, "key_bias": bias}
    want = torch.autograd.grad(dense_info_nce(x, x, **options).sum(), (x, bias))
    here = x.detach().to(device_of(backend)).requires_grad_()
    options["key_bias"] = bias.detach().to(device_of(backend)).requires_grad_()
    loss = info_nce(here, here, backend=backend, **options).sum()
    for got, exact in zip(torch.autograd.grad(loss, (here, options["key_bias"])), want, strict=True):
        assert error(got, exact) <= 1e-10


X, BIAS = rows(4, D), rows(4)
LEFT_OUT = torch.tensor([0.0, -math.inf, 0.0, 0.0])
REFUSED = {
    "shape": (lambda: info_nce(X, X, key_bias=BIAS[:3]), ValueError, r"key_bias must be .* \(4,\), got shape \(3,\)"),
    "type": (lambda: info_nce(X, X, key_bias=BIAS.long()), TypeError, "key_bias must be a floating tensor.*int64"),
    "number": (lambda: info_nce(X, X, key_bias=1.0), TypeError, "key_bias must be a floating tensor.*got float"),
    "NaN": (lambda: info_nce(X, X, key_bias=BIAS * math.nan), ValueError, "key_bias must be finite.*got nan"),
    "inf": (lambda: info_nce(X, X, key_bias=BIAS + math.inf), ValueError, "key_bias must be finite.*got inf"),
    "device": (lambda: info_nce(X, X, key_bias=elsewhere(4)), ValueError, "key_bias must be on cpu as query is"),
    "a positive left out": (
        lambda: info_nce(X, X, key_bias=LEFT_OUT), ValueError, "key_bias must not be -inf for a row's positive.*row 1",
    ),
    "a target left out": (
        lambda: info_nce(X, X, key_bias=LEFT_OUT, target=torch.tensor([0, 2, 2, 1])), ValueError, "got row 3",
    ),
    "negatives missing": (lambda: info_nce(X, X, negative_bias=BIAS), ValueError, "negative_bias .* not given"),
    "negatives' shape": (
        lambda: info_nce(X, X, X[:, None], negative_mode="paired", negative_bias=BIAS), ValueError,
        r"negative_bias must be .* \(4, 1\)",
    ),
    "nothing to take away": (lambda: info_nce(X, X, positive_bias=False), ValueError, "positive_bias=False .*key_bias"),
    "no flag": (lambda: info_nce(X, X, key_bias=BIAS, positive_bias=2), ValueError, "positive_bias must be one of"),
    "no effect": (
        lambda: info_nce(X, X, X, key_bias=BIAS, positive_bias=False), ValueError, "key_bias has no effect",
    ),
    "label smoothing": (
        lambda: info_nce(X, X, key_bias=BIAS, label_smoothing=0.1), ValueError, "label_smoothing cannot be used",
    ),
    "hardness": (
        lambda: multiple_negatives(X, [X], key_bias=BIAS[None], hardness="all_negatives", hardness_strength=1.0),
        ValueError, "key_bias cannot be used with a hardness",
    ),
    "distillation": (
        lambda: grouped_info_nce(X[:2], X, 2, key_bias=BIAS, distillation="kl_div", teacher_scores=rows(2, 2)),
        ValueError, "key_bias and positive_bias cannot be used with a distillation",
    ),
    "two views": (lambda: DCLLoss()(X, X, key_bias=BIAS), ValueError, "key_bias needs negatives='keys'"),
    "two views without": (lambda: DCLLoss()(X, X, positive_bias=False), ValueError, "positive_bias needs negatives="),
    "texts": (lambda: clip_loss(X, X, 1.0, text_bias=LEFT_OUT), ValueError, "text_bias must not be -inf"),
    "images": (lambda: clip_loss(X, X, 1.0, image_bias=BIAS[:1]), ValueError, "image_bias must be a floating tensor"),
    "clip": (lambda: clip_loss(X, X, 1.0, positive_bias=False), ValueError, "it needs image_bias or text_bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_where_values_are_not_read_a_bad_bias_makes_nan(value, monkeypatch):
    """The rows that see a key of NaN or inf are NaN; of -inf that is the row alone whose positive it is."""
    monkeypatch.setattr("fused_infonce.checks.values_are_free", lambda tensor: False)
    bias = rows(N)
    bias[2] = value
    loss = info_nce(rows(N, D), rows(N, D), key_bias=bias, reduction="none")
    assert loss.isnan().tolist() == [value != -math.inf or i == 2 for i in range(N)]


@pytest.mark.parametrize("columns", [False, True])
def test_plans_of_a_gpu_keep_their_flops(columns):
    sizes = {"backend": "triton", "device": "cuda", "n": 8192, "m": 8192, "d": 768, "itemsize": 2, "acc_itemsize": 4}
    flags = dict.fromkeys(("self_similar", "per_row"), False) | dict.fromkeys(("reduced", "plain", "joint"), True)
    sizes |= flags | {"columns": columns, "bounded": False, "scores_bounded": True, "biased": True, "limit": 1 << 30}
    assert plan.choose(**sizes, gradients=True).name == "onepass"
    assert plan.choose(**sizes, gradients=True).flops == 6
    assert plan.choose(**sizes, gradients=False).name == "forward"
    assert plan.choose(**sizes, gradients=True, learned_biases=True).flops == 6
    for more in ({"learned_biases": True, "d": 128}, {"scores_bounded": False}):
        found = plan.choose(**sizes | more, gradients=True)
        assert found.name == "workspace"
        assert "keys have biases" in found.reason
