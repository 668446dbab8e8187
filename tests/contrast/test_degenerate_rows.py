"""Rows that are nobody's negatives, zero, or not finite, and temperatures below the promised ones."""

import math

import pytest
import torch
from oracles import decoupled
from support.helpers import (
    DEVICE,
    TRITON,
    both_backends,
    bounds,
    call_of,
    cases,
    check,
    embeddings,
    error,
    evaluate,
    info_nce,
    mix,
    on,
    oracle,
    unit,
    watch_plans,
)

from fused_infonce import decoupled_info_nce

TOLERANCE = {"rtol": 1e-11, "atol": 1e-14}  # of float64, for another order of the same sums


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_without_negatives_has_loss_0_and_no_gradient(backend, reduction, normalize, symmetric):
    """Rows 0 and 3 have every label: loss 0, and no gradient through them."""
    inputs = call_of(5, 4, dtype=torch.float64)
    labels = torch.tensor([1, 1, 1, 1, 1])
    alone = inputs | {"key_ids": labels, "query_ids": torch.tensor([1, 7, 8, 1, 9])}
    options = {"reduction": reduction, "normalize": normalize}
    loss, gradients = check(backend, alone, **options)
    if reduction == "none":
        assert torch.equal(loss == 0, torch.tensor([True, False, False, True, False]))
    assert not gradients["query"][[0, 3]].any()
    loss, gradients = check(backend, inputs | {"key_ids": labels}, symmetric=symmetric, **options)
    assert not loss.any()
    assert not any(g.any() for g in gradients.values())


@cases(
    dtype=[torch.float32, torch.bfloat16, torch.float64],
    norm=[0.0, 1e-30],
    where=["query", "positive_key", "negative_keys"],
    options=[{}, {"symmetric": True}, {"reduction": "none"}, {"in_batch_negatives": True, "paired": True}],
)
def test_zero_rows_have_no_gradient_and_leave_the_others_theirs(backend, dtype, norm, where, options):
    """They leave the others' gradients finite and exact, and have none themselves."""
    paired = "paired" in options
    options = {name: x for name, x in options.items() if name != "paired"}
    inputs = call_of(7, 12, "loose", dtype, negatives=(7, 3) if paired else (3,))
    inputs[where][0] *= norm
    options |= {"negative_mode": "paired" if paired else "unpaired"}
    _, want = check(backend, inputs, **options)
    assert not want[where][0].any()
    assert all(g.isfinite().all() and g.any() for g in want.values())


@cases(dtype=[torch.float32, torch.bfloat16, torch.float64], norm=[5e-13, 1e-11], where=["query", "positive_key"])
def test_rows_up_to_eps_are_divided_by_it_and_longer_ones_by_their_norm(backend, dtype, norm, where):
    """Up to 1e-12 they are divided by it, as F.normalize does, and have no gradient; above it they are unit rows."""
    inputs = call_of(7, 12, "loose", dtype)
    inputs[where][0] *= norm
    want, exact = oracle(inputs)
    loss, gradients = evaluate(info_nce, on(DEVICE[backend], inputs), backend=backend)
    assert error(loss, want) <= bounds(dtype, 0.1)[0]
    if norm > 1e-12:
        scaled = {name: g[0] * norm for name, g in exact.items() if name == where}
        assert error(gradients[where][0].double() * norm, scaled[where]) <= bounds(dtype, 0.1)[1]
    else:
        assert not gradients[where][0].any()
        assert all(g.isfinite().all() for g in gradients.values())


@cases(
    value=[math.nan, math.inf, -math.inf],
    where=["query", "positive_key", "unpaired", "paired"],
    normalize=[True, False],
    reduction=["none", "sum"],
    ids=[False, True],
)
def test_rows_that_are_not_finite_poison_the_rows_that_see_them_alone(backend, value, where, normalize, reduction, ids):
    """A query poisons its own row, a key the rows that have it as positive or negative, and no others."""
    mode = where if where in ("paired", "unpaired") else None
    inputs = call_of(8, 5, dtype=torch.float64, negatives=() if mode is None else (8, 3) if mode == "paired" else (3,))
    options = {"normalize": normalize, "reduction": reduction}
    if mode is not None:
        options |= {"negative_mode": mode, "in_batch_negatives": True}
    seen = torch.ones(8, dtype=torch.bool)
    if ids:  # rows 2 and 5 leave out what is poisoned
        inputs["query_ids"] = torch.tensor([0, 1, 7, 2, 3, 7, 4, 5])
        inputs["key_ids"] = torch.tensor([10, 7, 12, 13, 14, 15, 16, 17])
        if mode is not None:
            inputs["negative_ids"] = torch.tensor([20, 7, 21]).expand(inputs["negative_keys"].shape[:-1])
        seen[[2, 5]] = False
    clean_loss, clean = evaluate(info_nce, on(DEVICE[backend], inputs), backend=backend, **options)
    if where == "query":
        inputs["query"][1, 2] = value
        seen = torch.arange(8) == 1
    elif where == "positive_key":
        inputs["positive_key"][1, 2] = value
    elif where == "unpaired":
        inputs["negative_keys"][1, 2] = value
    else:
        inputs["negative_keys"][5, 1, 2] = value
        seen = (torch.arange(8) == 5) & seen
    seen = seen.to(DEVICE[backend])
    loss, gradients = evaluate(info_nce, on(DEVICE[backend], inputs), backend=backend, **options)
    if reduction == "none":
        assert torch.equal(~loss.isfinite(), seen)
        torch.testing.assert_close(loss[~seen], clean_loss[~seen], **TOLERANCE)
    else:
        assert loss.isfinite() != seen.any()
    finite = gradients["query"].isfinite().all(1)  # a product with 0 may poison other rows' gradients, but for ...
    assert not finite[seen].any()
    if where == "query" or (where == "paired" and not ids):
        assert finite[~seen].all()  # ... what no other row touches
    torch.testing.assert_close(gradients["query"][finite], clean["query"][finite], **TOLERANCE)


every_backend = pytest.mark.parametrize("backend", ["torch", TRITON, "reference"])


@every_backend
@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_positive_is_no_perfect_match(backend, sign):
    """Its loss would be 0 (or infinite), the gradient nothing."""
    query, key = (torch.randn(6, 8, device=DEVICE.get(backend)) for _ in range(2))
    query[0], key[0] = 1e25, sign * 1e25
    for target in (None, torch.arange(6, device=query.device)):
        loss = info_nce(query, key, target=target, normalize=False, reduction="none", backend=backend)
        assert loss[0].isnan()


@every_backend
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("mode", ["unpaired", "paired"])
@pytest.mark.parametrize("in_batch", [False, True])
def test_a_negative_that_is_minus_infinite_shows(backend, gradients, mode, in_batch):
    """Its probability is 0, yet it is no legitimate logit: NaN, whether or not a gradient is needed."""
    n = 300 if backend == "torch" else 40
    query, key = (torch.rand(n, 8, device=DEVICE.get(backend)) for _ in range(2))
    negatives = torch.rand(*([n] if mode == "paired" else []), 4, 8, device=DEVICE.get(backend))
    negatives[..., 2, 3] = -math.inf
    options = {"negative_mode": mode, "in_batch_negatives": in_batch, "normalize": False, "backend": backend}
    loss = info_nce(query.requires_grad_(gradients), key, negatives, reduction="none", **options)
    assert loss.isnan().all()


TOO_LONG = {torch.bfloat16: 1e20, torch.float32: 1e20, torch.float64: 1e160}  # their squares overflow


@cases(
    dtype=list(TOO_LONG),
    where=["query", "positive_key", "unpaired", "paired"],
    options=[{}, {"symmetric": True}, {"reduction": "none"}, {"reduction": "none", "query_ids": True}],
)
def test_a_row_whose_norm_overflows_is_not_taken_for_zeros(backend, dtype, where, options):
    """F.normalize makes zeros of such a row, which are a legitimate input; NaN shows what has happened."""
    mode = where if where in ("paired", "unpaired") else None
    inputs = call_of(8, 5, dtype=dtype, negatives=() if mode is None else (8, 3) if mode == "paired" else (3,))
    options = dict(options)
    if mode is not None:
        options |= {"negative_mode": mode, "in_batch_negatives": True}
    if options.pop("query_ids", False):
        inputs |= {"query_ids": torch.arange(8), "key_ids": torch.arange(10, 18)}
    name = where if mode is None else "negative_keys"
    index = (5, 1) if mode == "paired" else 1
    inputs[name][index] *= TOO_LONG[dtype]
    assert inputs[name].isfinite().all()
    seen = torch.full((8,), where in ("positive_key", "unpaired"))
    seen[{"query": 1, "paired": 5}.get(where, 0)] = True
    for used in (backend, "reference"):
        given = {n: x.clone() for n, x in on(DEVICE[backend], inputs).items()}
        loss, gradients = evaluate(info_nce, given, backend=used, **options)
        assert torch.equal(loss.isnan().cpu(), seen if loss.dim() else torch.tensor(True))
        assert gradients["query"].isnan().any(1).cpu()[seen].all()


@cases(dtype=[torch.float16, torch.float32], options=[{}, {"symmetric": True}, {"reduction": "none"}])
def test_rows_as_long_as_their_dtype_lets_them_keep_the_bounds(backend, dtype, options):
    """Norms up to 1.8e19 in float32, the square root of its largest number, and any in float16."""
    inputs = call_of(9, 12, "medium", dtype)
    length = {torch.float16: 6e4, torch.float32: 1.5e19}[dtype]
    for name in ("query", "positive_key"):
        inputs[name] = inputs[name] * length
        assert inputs[name].isfinite().all()
    want, exact = oracle(inputs, **options)
    upstream = torch.full_like(want, length)  # else gradients are too small for their dtype
    loss, gradients = evaluate(info_nce, on(DEVICE[backend], inputs), upstream, backend=backend, **options)
    loss_bound, bound = bounds(dtype, 0.1)
    assert error(loss, want) <= loss_bound
    for name in ("query", "positive_key"):
        assert error(gradients[name].double() / length, exact[name]) <= bound


@both_backends
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"key_ids": True}, {"weight": True}], ids=str)
def test_exponentials_of_what_is_no_negative_may_overflow(backend, streaming, options, monkeypatch):
    """At t = 0.01 a row whose negatives all point the other way has a positive 2^288 times as likely as they are.

    The decoupled loss has gradients of ordinary size there. Infinity is selected away: times 0 it would be NaN.
    """
    if streaming:
        watch_plans(monkeypatch, name="streaming")
    axis, options = unit(1, 8), dict(options)
    query, key, _ = embeddings("loose", 7, 8)
    query[2:], key[2:] = mix(-axis, query[2:], 0.9), mix(-axis, key[2:], 0.9)
    alone = 2 if options.pop("key_ids", False) else 1  # rows that are the axis and, with ids, no negatives of the other
    query[:alone] = key[:alone] = axis
    query[alone:2], key[alone:2] = query[2:3], key[3:4]
    inputs = {"query": query.float(), "positive_key": key.float()}
    if alone == 2:
        inputs["key_ids"] = torch.tensor([0, 0, 1, 2, 3, 4, 5])
    if options.pop("weight", False):
        inputs["weight"] = torch.tensor([1.0, 0, 2, 0, 1, 1, 1])
    options |= {"temperature": 0.01, "reduction": "sum"}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    want, truth = evaluate(decoupled.decoupled_info_nce, exact, **options)
    loss, gradients = evaluate(decoupled_info_nce, on(DEVICE[backend], inputs), backend=backend, **options)
    assert error(loss, want) <= 5e-5
    assert truth["query"][0].any()
    for name in ("query", "positive_key"):
        assert error(gradients[name], truth[name]) <= 5e-5


@both_backends
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("t", [0.01, 1e-4])
def test_temperatures_below_the_promised_ones_do_not_overflow(backend, symmetric, t):
    """Logits far beyond the range of exp in float32: no overflow."""
    inputs = call_of(33, 12, "loose", torch.float64, t)
    check(backend, inputs, symmetric=symmetric)
    inputs = {name: x.float() for name, x in inputs.items()}
    loss, gradients = evaluate(info_nce, on(DEVICE[backend], inputs), backend=backend, symmetric=symmetric)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())
