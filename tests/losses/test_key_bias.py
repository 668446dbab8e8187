"""A bias a key: every loss that takes one against dense code, on every backend and plan, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.clip import clip_loss as dense_clip
from oracles.decoupled import decoupled_info_nce as dense_decoupled
from oracles.grouped import grouped_info_nce as dense_grouped
from oracles.info_nce import info_nce as dense_info_nce
from oracles.moco import moco_loss as dense_moco
from oracles.multiple_negatives import multiple_negatives as dense_ranking
from support.helpers import (
    DEVICE,
    TRITON,
    assert_close,
    cases,
    check,
    embeddings,
    error,
    evaluate,
    make_call,
    on,
    valid,
    watch_plans,
)  # fmt: skip

import fused_infonce
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
D = 5


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def device_of(backend: str) -> str:
    return DEVICE[NAMES[backend]]


def agree(function, dense, inputs, backend, **options) -> torch.Tensor:
    """Assert that values and all gradients are those of dense code, and return the value."""
    want = evaluate(dense, inputs, **options)
    got = evaluate(function, on(device_of(backend), inputs), backend=backend, **options)
    assert error(got[0], want[0]) <= 1e-12
    for name, gradient in want[1].items():
        found = got[1][name]
        gradient, found = (torch.zeros(()) if x is None else x for x in (gradient, found))
        assert error(found, gradient) <= 1e-10, name
    return got[0]


def biases_of(inputs, positive, left_out=False):
    """Return biases of a call's keys and negatives, a third of the negatives' -inf with `left_out`."""
    biases = {"key_bias": 2 * rows(len(inputs["positive_key"]))}
    if "negative_keys" in inputs:
        bias = 2 * rows(*inputs["negative_keys"].shape[:-1])
        biases["negative_bias"] = bias.masked_fill(torch.rand(bias.shape) < left_out / 3, -math.inf)
    return biases, {"positive_bias": positive}


FACTORS = {
    "normalize": [True, False],
    "temperature": ["float", "scalar", "per row"],
    "negatives": [None, "unpaired", "paired"],
    "in_batch": [None, True],
    "symmetric": [False, True],
    "target": [False, True],
    "ids": [None, "keys", "queries and keys", "queries and negatives"],
    "reduction": ["mean", "none"],
    "positive": [True, False],
    "weight": [False, True],
    "plan": ["dense", "blocks"],
}


def accepted(case):
    call = {name: value for name, value in case.items() if name not in ("positive", "weight", "plan")}
    pointless = not case["positive"] and case["negatives"] and not case["in_batch"]
    return valid(call) and not pointless


@cases(accepted, pairs=True, together=True, **FACTORS)
def test_every_pair_of_options_equals_dense_code(backend, case, monkeypatch):
    positive, weight, blocks = case.pop("positive"), case.pop("weight"), case.pop("plan") == "blocks"
    if blocks and backend == "torch":
        monkeypatch.setattr(plan, "DENSE", 0)
    inputs, options = make_call(9, 7, D, 4, **case)
    biases, option = biases_of(inputs, positive, left_out=True)
    biases |= {"weight": torch.rand(9, dtype=torch.float64)} if weight else {}
    limit = {"workspace_limit": 500} if blocks else {}
    backends = [backend] if backend == "triton" or blocks else [backend, "reference"]
    for each in backends:
        agree(
            lambda **call: info_nce(**call, **limit), dense_info_nce, inputs | biases, each, **options, **option
        )  # fmt: skip


PLANS = [  # exponentials fit as they are at t = 0.5, and do not at 0.001; rows with temperatures of their own need two
    (name, symmetric, t)
    for name in ("dense", "onepass", "workspace")
    for symmetric in (False, True)
    for t in (0.5, 0.001, "per row")
    if not (name == "onepass" and symmetric and t != 0.5) and not (name == "dense" and t == "per row")
]


@pytest.mark.parametrize(("name", "symmetric", "temperature"), PLANS)
def test_every_plan_of_the_torch_backend_equals_dense_code(name, symmetric, temperature, monkeypatch):
    n = 9
    t = 0.3 + torch.rand(n) if temperature == "per row" else torch.tensor(temperature)
    inputs = {"query": rows(n, D), "positive_key": rows(n, D), "key_bias": rows(n), "temperature": t.double()}
    height = {"dense": n, "onepass": n if symmetric else 4, "workspace": 4}[name]
    plans = watch_plans(monkeypatch, name=name, rows=height, cols=n if name == "dense" else 5)
    agree(info_nce, dense_info_nce, inputs, "torch", symmetric=symmetric)
    assert [p.name for p in plans] == [name]
    assert plans[0].bounded == (temperature != 0.001)


def grouped(**call):
    return grouped_info_nce(group_size=3, **call)


def ranking(function, **options):
    def call(query, positives, hard, key_bias, **more):
        return function(query, [positives, hard], key_bias=key_bias, **options, **more)

    return call


def pair(names, shapes):
    return {name: rows(*shape) for name, shape in zip(names, shapes, strict=True)}


N = 6
QUERIES_AND_NEGATIVES = ("query", "positive_key", "negative_keys", "key_bias", "negative_bias")
CALLS = {
    "decoupled": (
        decoupled_info_nce, dense_decoupled,
        pair(QUERIES_AND_NEGATIVES, [(N, D), (N, D), (4, D), (N,), (4,)]),
        [
            {"symmetric": symmetric, "positive_bias": positive, "in_batch_negatives": True}
            for symmetric in (False, True)
            for positive in (True, False)
        ],
    ),
    "clip": (
        clip_loss, dense_clip,
        pair(("image_features", "text_features", "image_bias", "text_bias"), [(N, D), (N, D), (N,), (N,)])
        | {"logit_scale": torch.tensor(2.0, dtype=torch.float64)},
        [
            {"normalize": x, "positive_bias": p, "reduction": r}
            for x, p, r in [(True, True, "mean"), (False, True, "none"), (True, False, "sum")]
        ],
    ),
    "grouped": (
        grouped, lambda **call: dense_grouped(group_size=3, **call),
        pair(("query", "passages", "key_bias"), [(N, D), (3 * N, D), (3 * N,)]),
        [
            {"in_batch_negatives": in_batch, "positive_bias": positive, "temperature": 0.5}
            for in_batch in (True, False)
            for positive in (True, False)
        ],
    ),
    "moco": (
        moco_loss, dense_moco,
        pair(("query", "key", "queue", "key_bias", "negative_bias"), [(N, D), (N, D), (D, 7), (N,), (7,)]),
        [{"temperature": 0.5}, {"temperature": 0.5, "reduction": "none", "normalize": False}],
    ),
}  # fmt: skip


@ALL
@pytest.mark.parametrize("name", CALLS)
def test_every_loss_equals_dense_code(backend, name):
    function, dense, inputs, every = CALLS[name]
    for options in every[:2] if backend == "triton" else every:
        agree(function, dense, inputs, backend, **options)


JOINT = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SOFTMAXES = [(("query_to_doc",), "joint"), (JOINT, "joint"), (("query_to_doc", "doc_to_query"), "per_direction")]


@ALL
@pytest.mark.parametrize("softmax", SOFTMAXES, ids=str)
@pytest.mark.parametrize("positive", [True, False])
def test_multiple_negatives_equals_dense_code(backend, softmax, positive):
    directions, partition = softmax
    inputs = pair(("query", "positives", "hard", "key_bias"), [(N, D), (N, D), (N, D), (2, N)])
    inputs["key_bias"][1, 2] = -math.inf
    options = {"directions": directions, "partition": partition, "positive_bias": positive, "temperature": 0.5}
    agree(ranking(multiple_negatives, **options), ranking(dense_ranking, **options), inputs, backend)
    spare = inputs | {"positives": rows(N + 2, D), "hard": rows(N + 2, D), "key_bias": rows(2, N + 2)}
    options |= {"offset": 1, "all_queries": rows(N + 2, D).requires_grad_()}
    on_device = options | {"all_queries": options["all_queries"].to(device_of(backend))}
    got = ranking(multiple_negatives, backend=backend, **on_device)(**on(device_of(backend), spare))
    assert error(got, ranking(dense_ranking, **options)(**spare)) <= 1e-12


def test_documents_alone_with_a_bias_are_not_taken_for_self_similar_rows():
    query, document, bias = rows(N, D), rows(N, D), rows(1, N)
    options = {"directions": ("query_to_doc", "doc_to_doc"), "key_bias": bias}
    got = multiple_negatives(query, [document], **options)
    assert error(got, dense_ranking(query, [document], **options)) <= 1e-12


@ALL
@pytest.mark.parametrize("columns", [False, True])
def test_statistics_have_the_bias_in_all_but_the_mean(backend, columns):
    """With biases of -|k|^2 / 2t and raw rows, logits are squared distances: each field from its definition."""
    device, n, t = device_of(backend), 7, 0.8
    query, key, bias = rows(n, D), rows(n, D), rows(n)
    query, key, bias = query.to(device), key.to(device), bias.to(device)
    found = fused_infonce.statistics(query, key, temperature=t, normalize=False, key_bias=bias, columns=columns,
                                     backend=backend)  # fmt: skip
    found = found if columns else (found,)
    raw = query @ key.T / t
    for stats, logits, mean_of in zip(found, [raw + bias, raw.T], [raw, raw.T], strict=False):
        own = torch.eye(n, dtype=torch.bool, device=device)
        others = logits.masked_fill(own, -math.inf)
        p = torch.softmax(others, 1)
        want = logits.diagonal(), others.logsumexp(1), (p * mean_of).sum(1), others.amax(1)
        for ours, truth in zip(stats, want, strict=False):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mode", ["unpaired", "paired"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_those_of_finite_differences(symmetric, mode, reduction):
    call = [rows(5, 3), rows(5, 3), rows(5, 2, 3) if mode == "paired" else rows(2, 3), rows(5), None]
    call[4] = rows(*call[2].shape[:-1])
    t = torch.tensor(0.6, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (*call, t)]

    def function(query, key, negative, key_bias, negative_bias, t):
        return info_nce(
            query, key, negative, t, reduction, mode, in_batch_negatives=True, symmetric=symmetric, key_bias=key_bias,
            negative_bias=negative_bias,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, inputs)


BOUNDED = [("torch", torch.bfloat16, 256), ("torch", torch.float16, 256), ("torch", torch.float32, 256)]
BOUNDED += [pytest.param("triton", dtype, 40, marks=TRITON.marks) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("backend", "dtype", "n"), BOUNDED)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_bias_of_10_keeps_the_bounds_of_16_bit_rows(backend, dtype, n, symmetric, monkeypatch):
    monkeypatch.setattr(plan, "DENSE", 0)
    for t in (0.05, 0.2) if backend == "torch" else (0.05,):
        query, key, _ = embeddings("medium", n, 32)
        inputs = {"query": query.to(dtype), "positive_key": key.to(dtype), "temperature": torch.tensor(t)}
        inputs["key_bias"] = 10 * (2 * torch.rand(n) - 1)
        check(backend, inputs, symmetric=symmetric)


@ALL
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_a_bias_of_minus_infinity_leaves_a_key_out(backend, normalize, mode):
    """The value is that of a call without the key, and its gradients are 0."""
    device, shape = device_of(backend), (3, D) if mode == "unpaired" else (N, 3, D)
    inputs = pair(("query", "positive_key", "negative_keys"), [(N, D), (N + 2, D), shape])
    inputs |= {"key_bias": rows(N + 2), "negative_bias": rows(*shape[:-1]), "temperature": torch.tensor(0.5).double()}
    inputs["key_bias"][-2:] = inputs["negative_bias"][..., 1] = -math.inf
    inputs["positive_key"][-1] = 0  # as padding is
    target = torch.arange(N, device=device)
    options = {"in_batch_negatives": True, "negative_mode": mode, "normalize": normalize, "target": target}
    loss, grads = evaluate(info_nce, on(device, inputs), backend=backend, **options)
    kept = {name: x[:N] if name in ("positive_key", "key_bias") else x for name, x in inputs.items()}
    kept["negative_keys"] = kept["negative_keys"][..., [0, 2], :]
    kept["negative_bias"] = kept["negative_bias"][..., [0, 2]]
    alone, alone_grads = evaluate(info_nce, on(device, kept), backend=backend, **options)
    assert error(loss, alone) <= 1e-12
    for name in ("query", "temperature"):
        assert error(grads[name], alone_grads[name]) <= 1e-10
    for name, x in grads.items():
        assert x.isfinite().all(), name
    of_left_out = [grads[name][-2:] for name in ("positive_key", "key_bias")]
    of_left_out += [grads["negative_keys"][..., 1, :], grads["negative_bias"][..., 1]]
    assert not any(x.any() for x in of_left_out)


@ALL
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_whose_negatives_are_all_left_out_has_no_loss(backend, reduction):
    device = device_of(backend)
    inputs = pair(("query", "positive_key", "negative_keys"), [(N, D), (N, D), (N, 3, D)])
    inputs |= {"negative_bias": rows(N, 3), "temperature": torch.tensor(0.5, dtype=torch.float64)}
    inputs["negative_bias"][2] = -math.inf
    inputs, options = on(device, inputs), {"negative_mode": "paired", "backend": backend}
    query, key, negatives = (inputs[name] for name in ("query", "positive_key", "negative_keys"))
    found = fused_infonce.statistics(query, key, negatives, negative_bias=inputs["negative_bias"], **options)
    assert found.neg[2] == -math.inf
    assert found.mean[2] == 0
    loss, grads = evaluate(info_nce, inputs, reduction=reduction, **options)
    assert reduction == "mean" or loss[2] == 0
    assert all(x.isfinite().all() for x in grads.values())
    assert not any(grads[name][2].any() for name in ("query", "negative_bias", "negative_keys"))


@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 2), st.floats(0, 30), st.booleans(), st.booleans(),
    st.integers(40, 3000), st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=20)
def test_any_shape_and_size_of_biases_equals_dense_code(n, m, t, size, normalize, positive, limit, seed):
    torch.manual_seed(seed)
    inputs = {"query": rows(n, D), "positive_key": rows(m, D), "key_bias": size * rows(m)}
    inputs["target"] = torch.randint(m, (n,))
    left_out = torch.rand(m) < 0.2
    left_out[inputs["target"]] = False
    inputs["key_bias"][left_out] = -math.inf
    for temperature in (t, torch.full((n,), t, dtype=torch.float64)):
        call = inputs | ({"temperature": temperature} if isinstance(temperature, torch.Tensor) else {})
        options = {"normalize": normalize, "positive_bias": positive} | ({} if len(call) > 4 else {"temperature": t})
        want = evaluate(dense_info_nce, call, **options)
        got = evaluate(info_nce, call, workspace_limit=limit, **options)
        assert_close(got, want, torch.float64, 1.0)


@ALL
def test_a_bias_alone_may_have_a_gradient(backend):
    inputs = pair(QUERIES_AND_NEGATIVES, [(N, D), (N, D), (4, D), (N,), (4,)])
    _, want = evaluate(dense_info_nce, inputs, in_batch_negatives=True)
    for reduction, scale in (("mean", N), ("none", 1)):  # the oracle's is a mean
        here = on(device_of(backend), inputs)
        biases = [here.pop(name).requires_grad_() for name in ("key_bias", "negative_bias")]
        loss = info_nce(**here, key_bias=biases[0], negative_bias=biases[1], in_batch_negatives=True,
                        reduction=reduction, backend=backend)  # fmt: skip
        for got, name in zip(torch.autograd.grad(loss.sum(), biases), ("key_bias", "negative_bias"), strict=True):
            assert error(got * scale / N, want[name]) <= 1e-10
    moco = pair(("query", "key", "queue", "key_bias"), [(N, D), (N, D), (D, 7), (N,)])
    want = evaluate(dense_moco, moco)[1]["key_bias"]
    moco = on(device_of(backend), moco)
    moco["key_bias"].requires_grad_()
    assert error(torch.autograd.grad(moco_loss(**moco, backend=backend), moco["key_bias"])[0], want) <= 1e-10


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("limit", [None, 32 * 64 * 8])
def test_blocks_of_several_tiles_equal_dense_code(backend, limit):
    """The gradient of a bias is added over tiles and over blocks of tiles."""
    inputs = pair(QUERIES_AND_NEGATIVES, [(40, 4), (40, 4), (70, 4), (40,), (70,)])
    inputs |= {"temperature": 0.3 + torch.rand(40).double()}
    agree(
        lambda **call: info_nce(workspace_limit=limit, **call), dense_info_nce, inputs, backend,
        in_batch_negatives=limit is not None, symmetric=limit is not None,
    )  # fmt: skip
    inputs["negative_bias"][::3] = -math.inf
    agree(info_nce, dense_info_nce, inputs, backend)


@ALL
@pytest.mark.parametrize("few", [False, True])
def test_a_positive_far_above_its_hard_negatives_leaves_them_their_gradients(backend, few, monkeypatch):
    """Of a probability of e^-45, which over a sum of exponentials of e^60 would be below float32."""
    monkeypatch.setattr(plan, "DENSE", 2**18 if few else 0)
    query = embeddings("tight", 40, 16)[0]
    inputs = {"query": query} | {name: query + 0.05 * rows(40, 16) for name in ("positive_key", "negative_keys")}
    inputs = {name: x.float() for name, x in inputs.items()} | {"key_bias": torch.full((40,), 45.0)}
    options = {"temperature": 1 / 60, "in_batch_negatives": False}
    want = evaluate(dense_info_nce, {name: x.double() for name, x in inputs.items()}, **options)
    got = evaluate(info_nce, on(device_of(backend), inputs), backend=backend, **options)
    assert want[0] < 1e-17
    assert error(got[0], want[0]) <= 3e-5
    for name, gradient in want[1].items():
        assert error(got[1][name], gradient) <= 3e-5, name


def test_a_bias_may_leave_out_a_positive_that_does_not_have_it():
    inputs = {
        "query": rows(4, D),
        "positive_key": rows(4, D),
        "key_bias": torch.tensor([0.0, -math.inf, 0.0, 0.0]).double(),
    }
    for symmetric in (False, True):
        agree(info_nce, dense_info_nce, inputs, "torch", positive_bias=False, symmetric=symmetric)
