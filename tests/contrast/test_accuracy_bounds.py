"""Loss and gradients within the promised bounds of dense code in float64, for the inputs that break other losses."""

import pytest
import torch
import torch.nn.functional as F
from oracles.info_nce import info_nce as dense_info_nce
from support.helpers import (
    COMPILED,
    CONES,
    DEVICE,
    KINDS,
    MANY_ROWS,
    both_backends,
    bounds,
    cases,
    check,
    embeddings,
    error,
    evaluate,
    every_pair,
    on,
    oracle,
    stretch,
    watch_plans,
)  # fmt: skip

from fused_infonce import info_nce
from fused_infonce.backends import plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = [0.01, 0.02, 0.05, 0.2, 1.0]
SIZE = {"torch": (512, 64), "triton": (1024, 128) if COMPILED else (64, 32)}
SMALLEST_LOSS = 1e-30  # below it nothing is promised
PAIRED_QUERIES = {"torch": 512, "triton": 1024 if COMPILED else 12}  # the interpreter takes 0.1 s for each


def inputs_of(backend, kind, dtype, temperature, normalize=True, negatives=()):
    """Query, key and negatives in `dtype`, and the temperature in float32."""
    n, d = SIZE[backend]
    if len(negatives) == 2:
        n = PAIRED_QUERIES[backend]
        negatives = (n, negatives[1])
    rows = embeddings(kind, n, d, *negatives)
    low, high = (0.1, 10) if normalize else (0.8, 1.25)
    rows = [None if x is None else stretch(x, low, high).to(dtype) for x in rows]
    inputs = dict(zip(("query", "positive_key", "negative_keys"), rows, strict=True))
    inputs["temperature"] = torch.tensor(temperature)
    return {name: x for name, x in inputs.items() if x is not None}


@cases(kind=KINDS, temperature=TEMPERATURES, normalize=[True, False], dtype=DTYPES)
def test_the_default_call_keeps_the_bounds(backend, dtype, kind, temperature, normalize, monkeypatch):
    monkeypatch.setattr(plan, "DENSE", 0)
    loss, _ = check(backend, inputs_of(backend, kind, dtype, temperature, normalize), normalize=normalize)
    assert loss >= SMALLEST_LOSS  # else the case says nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [t for t in TEMPERATURES if t >= 0.02])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_whose_scores_are_held_at_once_keep_the_bounds(kind, temperature, symmetric, dtype, monkeypatch):
    """The plan that holds all scores at once."""
    plans = watch_plans(monkeypatch)
    check("torch", inputs_of("torch", kind, dtype, temperature), symmetric=symmetric)
    assert {p.name for p in plans} == {"dense"} or dtype == torch.float16


@every_pair(kind=KINDS, temperature=[0.01, 0.02, 0.05], dtype=[torch.bfloat16, torch.float32])
def test_many_rows_keep_the_bounds_at_low_temperatures(kind, temperature, dtype):
    """The size at which 16-bit inputs are held to a loss error of 1e-5 whatever the temperature."""
    rows = [x.to(dtype) for x in embeddings(kind, MANY_ROWS, 256)[:2]]
    check("torch", {"query": rows[0], "positive_key": rows[1], "temperature": torch.tensor(temperature)})


OPTIONS = {
    "symmetric": {"symmetric": True},
    "none": {"reduction": "none"},
    "symmetric none": {"symmetric": True, "reduction": "none"},
    "unpaired": {"negatives": (40,)},
    "paired": {"negatives": (0, 9), "negative_mode": "paired"},
    "unpaired and in-batch": {"negatives": (40,), "in_batch_negatives": True},
    "paired and in-batch": {"negatives": (0, 9), "negative_mode": "paired", "in_batch_negatives": True},
    "symmetric and unpaired": {"negatives": (40,), "symmetric": True},
    "symmetric, paired, in-batch": {
        "negatives": (0, 9), "negative_mode": "paired", "symmetric": True, "in_batch_negatives": True,
    },
    "workspace": {"workspace_limit": 20_000},
}  # fmt: skip


@cases(
    pairs="torch",
    option=list(OPTIONS),
    rows=[("medium", True), ("cone_98", True), ("cone_90", False)],
    temperature=[0.01, 0.1],
    dtype=DTYPES,
)
def test_every_option_keeps_the_bounds(backend, option, rows, temperature, dtype):
    (kind, normalize), options = rows, dict(OPTIONS[option])
    inputs = inputs_of(backend, kind, dtype, temperature, normalize, options.pop("negatives", ()))
    weights = torch.rand(len(inputs["query"])) if options.get("reduction") == "none" else None
    loss, _ = check(backend, inputs, weights, normalize=normalize, **options)
    assert loss.mean() >= SMALLEST_LOSS


@cases(kind=KINDS, symmetric=[False, True], dtype=DTYPES)
def test_a_temperature_per_row_keeps_the_bounds(backend, kind, symmetric, dtype):
    inputs = inputs_of(backend, kind, dtype, 1.0)
    inputs["temperature"] = torch.logspace(-2, 0, len(inputs["query"]))[torch.randperm(len(inputs["query"]))]
    check(backend, inputs, symmetric=symmetric)


@cases(dtype=DTYPES, temperature=[0.01, 0.1], reduction=["mean", "none"])
def test_many_queries_for_few_keys_keep_the_bounds(backend, dtype, temperature, reduction):
    inputs = inputs_of(backend, "medium", dtype, temperature)
    n, m = len(inputs["query"]), len(inputs["positive_key"]) // 3
    inputs["positive_key"] = inputs["positive_key"][:m]
    inputs["query"] = torch.cat([inputs["query"][:m]] * 3 + [inputs["query"][: n - 3 * m]])
    target = torch.arange(n) % m
    target[::7] = -100
    check(backend, inputs | {"target": target}, torch.rand(n) if reduction == "none" else None, reduction=reduction)


@cases(dtype=DTYPES, norm=[1e-3, 30.0])
def test_norms_far_from_one_keep_the_bounds(backend, dtype, norm):
    """They cancel where rows are normalised; raw rows have them in their logits."""
    inputs = inputs_of(backend, "medium", dtype, 0.1)
    scaled = inputs | {name: (inputs[name] * norm) for name in ("query", "positive_key")}
    check(backend, scaled)
    check(backend, scaled | {"temperature": torch.tensor(max(norm**2, 1.0) / 10)}, normalize=False)


@cases(option=["default", "symmetric", "none"], norm=[8.0, 30.0], kind=["loose", "cone_90"])
def test_large_logits_cost_no_more_than_float32_scores_do(backend, option, norm, kind, monkeypatch):
    """Dot products of long rows, logits of 640 to 9000: what float32 scores cost cannot be avoided, but a logsumexp of
    that size has lost digits that a softmax needs."""
    monkeypatch.setattr(plan, "DENSE", 0)
    options = {"default": {}, "symmetric": {"symmetric": True}, "none": {"reduction": "none"}}[option]
    inputs = inputs_of(backend, kind, torch.float32, 0.1, normalize=False)
    inputs |= {name: (inputs[name] * norm) for name in ("query", "positive_key")}
    weights = torch.rand(len(inputs["query"])) if option == "none" else None
    _, want = oracle(inputs, weights, normalize=False, **options)
    _, dense = evaluate(dense_info_nce, inputs, weights, normalize=False, **options)
    _, got = evaluate(info_nce, on(DEVICE[backend], inputs), weights, backend=backend, normalize=False, **options)
    for name in ("query", "positive_key"):
        assert error(got[name], want[name]) <= 2 * error(dense[name], want[name]) + 1e-6, name


@both_backends
def test_a_loss_scale_overflows_nothing_where_a_negative_is_far_ahead(backend):
    """The loss of such a row is its margin, of which exp times a usual loss scale is no float32."""
    margin = 79
    rows = torch.eye(2, device=DEVICE[backend])
    inputs = {"query": rows, "positive_key": rows.flip(0)}
    scale = torch.full((2,), 2.0**16)
    want, got = (
        evaluate(info_nce, inputs, upstream, temperature=1 / margin, reduction="none", backend=backend)
        for upstream in (None, scale)
    )
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], want[1][name] * 2**16) for name in inputs)
    assert got[1]["query"].abs().max() == margin * 2**16


@both_backends
@pytest.mark.parametrize("kind", CONES)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
def test_rounding_the_gradient_alone_costs_most_of_its_error(backend, kind, normalize):
    """The gradient of a cone is a small difference of long rows, so the bound of 5e-3 has room for few other errors."""
    inputs = inputs_of(backend, kind, torch.bfloat16, 0.05, normalize)
    _, want = check(backend, inputs, normalize=normalize)
    rounding = error(want["query"].bfloat16(), want["query"])
    _, got = evaluate(info_nce, on(DEVICE[backend], inputs), backend=backend, normalize=normalize)
    assert rounding < error(got["query"], want["query"]) < 3 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_dense_loss_breaks_these_bounds(dtype):
    """So the bounds ask for something: log-softmax of all logits in the inputs' dtype fails them."""
    inputs = inputs_of("torch", "tight", dtype, 0.02)
    unit_rows = [F.normalize(inputs[name], dim=-1) for name in ("query", "positive_key")]
    logits = unit_rows[0] @ unit_rows[1].T / inputs["temperature"].to(dtype)
    dense = F.cross_entropy(logits, torch.arange(len(logits)))
    want = dense_info_nce(**{name: x.double() for name, x in inputs.items()})
    assert error(dense, want) > 100 * bounds(dtype, 0.02)[0]
    assert error(info_nce(**inputs), want) <= bounds(dtype, 0.02)[0]
