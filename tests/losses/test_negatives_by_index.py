"""A query's own negatives by their places in a table: equal to the gathered ones, of which no tensor ever holds all."""

from __future__ import annotations

import pytest
import torch
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
    valid,
)
from support.memory import MIB, PeakMemory

import fused_infonce
from fused_infonce import FusedInfoNCELoss, checks, info_nce

N, M, H, D = 20, 9, 4, 6  # 80 uses of 9 rows: one that has most of them is summed in parts
all_backends = pytest.mark.parametrize("backend", ["torch", TRITON, "reference"])


def call(dtype: torch.dtype = torch.float64, n: int = N, m: int = M, h: int = H, d: int = D) -> dict[str, torch.Tensor]:
    """Return inputs whose lists all hold row 1 of the table, query 1's nothing else, and none its last row.

    Lists are padded: that of query 2 with nothing but padding.
    """
    inputs = {"query": torch.randn(n, d), "positive_key": torch.randn(n, d), "negative_keys": torch.randn(m, d)}
    index = torch.randint(-1, m - 1, (n, h))
    index[:, 0], index[1], index[2] = 1, 1, -1
    t = torch.tensor(0.2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return {name: x.to(dtype) for name, x in inputs.items()} | {"temperature": t, "negative_index": index}


def device_of(backend: str) -> str:
    return DEVICE.get(backend, "cpu")


@cases(valid, pairs=True, together=True, **FACTORS | {"negatives": ["unpaired"]})
def test_every_pair_of_options_is_that_of_gathered_negatives(backend, case):
    inputs, options = make_call(7, 8, 5, 3, **case)
    inputs["negative_index"] = torch.randint(-1, 3, (7, 4))
    check(backend, inputs, **options)


@all_backends
@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_of_the_table_is_the_sum_over_its_uses(backend, normalize):
    """With paired negatives as the truth: a popular row, a row twice in a list, and one that nobody uses."""
    inputs = on(device_of(backend), call())
    inputs["negative_index"] = index = torch.where(inputs["negative_index"] < 0, 5, inputs["negative_index"])
    options = {"normalize": normalize, "backend": backend}
    loss, got = evaluate(info_nce, inputs, **options)
    own = {name: x for name, x in inputs.items() if name != "negative_index"}
    own["negative_keys"] = inputs["negative_keys"][index]
    want_loss, want = evaluate(info_nce, own, negative_mode="paired", **options)
    want["negative_keys"] = torch.zeros_like(inputs["negative_keys"]).index_put_(
        (index,), want["negative_keys"], accumulate=True
    )
    assert error(loss, want_loss) <= 1e-13
    for name, gradient in want.items():
        assert error(got[name], gradient) <= 1e-12, name
    assert not got["negative_keys"][M - 1].any()
    assert got["negative_keys"].abs().sum(1)[: M - 1].all()


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_errors_stay_within_the_bounds(backend, dtype, reduction):
    """Gradients of the table are added in float32 and rounded once; `mean` makes them in the forward."""
    inputs = call(dtype, d=24)
    check(backend, inputs, torch.rand(N, dtype=torch.float64) if reduction == "none" else None, reduction=reduction)


@both_backends
def test_labels_are_smoothed_over_the_negatives_of_a_list(backend):
    inputs = call()
    inputs |= {"query_ids": torch.arange(N) % 5, "negative_ids": torch.arange(M) % 5}
    check(backend, inputs, label_smoothing=0.2, in_batch_negatives=True)
    check(backend, inputs, label_smoothing=0.2, symmetric=True, weight=torch.rand(N, dtype=torch.float64))


def test_sums_of_smoothing_are_made_of_a_few_places_at_a_time(monkeypatch):
    monkeypatch.setattr("fused_infonce.compose.own_keys.TAKEN", 2 * N * D)
    check("torch", call(h=7), label_smoothing=0.2)


@all_backends
def test_a_row_with_nothing_but_padding_has_a_loss_of_zero(backend):
    """And no gradient; rows of the table that padding might stand for, the first and the last, are NaN."""
    inputs = on(device_of(backend), call())
    inputs["negative_index"] = torch.where(inputs["negative_index"] == 0, 4, inputs["negative_index"])
    inputs["negative_keys"][[0, M - 1]] = torch.nan
    assert (inputs["negative_index"] == -1).sum() > H
    loss, gradients = evaluate(info_nce, inputs, reduction="none", backend=backend)
    assert loss[2] == 0
    assert (loss[torch.arange(N) != 2] > 0).all()
    for name in ("query", "positive_key"):
        assert gradients[name].isfinite().all(), name
        assert not gradients[name][2].any(), name
    assert gradients["negative_keys"][1 : M - 1].isfinite().all()
    statistics = fused_infonce.statistics(inputs.pop("query"), inputs.pop("positive_key"), **inputs, backend=backend)
    assert statistics.neg[2] == -torch.inf


@all_backends
def test_statistics_are_those_of_paired_negatives(backend):
    inputs = on(device_of(backend), call())
    query, key, table, t, index = inputs.values()
    index = index.clamp_min(0)
    options = {"temperature": t, "in_batch_negatives": True, "backend": backend}
    got = fused_infonce.statistics(query, key, table, negative_index=index, **options)
    want = fused_infonce.statistics(query, key, table[index], negative_mode="paired", **options)
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert error(x, y) <= 1e-13, name


@all_backends
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize(("m", "h"), [(M, 0), (0, 3), (0, 0)])
def test_no_places_or_an_empty_table_are_no_negatives(backend, m, h, in_batch):
    inputs = on(device_of(backend), call())
    inputs["negative_keys"] = inputs["negative_keys"][:m]
    inputs["negative_index"] = torch.full((N, h), -1, device=device_of(backend))
    loss, gradients = evaluate(info_nce, inputs, in_batch_negatives=in_batch, label_smoothing=0.1, backend=backend)
    assert not gradients["negative_keys"].any()
    assert gradients["negative_keys"].shape == (m, D)
    if in_batch:
        plain = {name: inputs[name] for name in ("query", "positive_key", "temperature")}
        want, want_gradients = evaluate(info_nce, plain, label_smoothing=0.1, backend=backend)
        assert error(loss, want) <= 1e-13
        assert error(gradients["query"], want_gradients["query"]) <= 1e-12
    else:
        assert loss == 0
        assert not gradients["query"].any()


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["negative_keys", "query"])
def test_an_input_without_a_gradient_changes_no_other(backend, frozen, reduction):
    """Of a frozen table not even the places are needed after the forward."""
    inputs = on(DEVICE[backend], call())
    ones = torch.ones(N if reduction == "none" else (), device=DEVICE[backend])
    _, want = evaluate(info_nce, inputs, ones, reduction=reduction, backend=backend)
    leaves = {
        name: x.clone().requires_grad_() if x.is_floating_point() and name != frozen else x
        for name, x in inputs.items()
    }
    loss = info_nce(**leaves, reduction=reduction, backend=backend)
    loss.sum().backward()
    for name, x in leaves.items():
        if x.requires_grad:
            assert error(x.grad, want[name]) <= 1e-12, name
    assert leaves[frozen].grad is None


@both_backends
def test_finite_differences(backend):
    inputs = on(DEVICE[backend], call(n=4, m=3, h=2, d=3))
    names = [name for name in inputs if name != "negative_index"]
    ids = {"query_ids": torch.arange(4), "negative_ids": torch.tensor([1, 0, 7])}
    ids = on(DEVICE[backend], ids)

    def loss(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return info_nce(**given, **ids, negative_index=inputs["negative_index"], reduction="none", backend=backend)

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=backend == "triton")


def test_the_reference_is_differentiable_twice():
    inputs = call(n=3, m=3, h=2, d=2)
    table = inputs.pop("negative_keys").requires_grad_()

    def loss(x):
        return info_nce(negative_keys=x, **inputs, label_smoothing=0.1, backend="reference")

    assert torch.autograd.gradgradcheck(loss, (table,))


@all_backends
@pytest.mark.parametrize("normalize", [True, False])
def test_where_values_cannot_be_read_a_bad_place_makes_its_row_nan(backend, normalize, monkeypatch):
    """And the rows of the table that its query uses; all others are as without that query."""
    monkeypatch.setattr(checks, "values_are_free", lambda tensor: False)
    options = {"reduction": "none", "normalize": normalize, "backend": backend}
    inputs = on(device_of(backend), call())
    index, bad = inputs["negative_index"], torch.tensor([1, 4], device=device_of(backend))
    index[1], index[4] = torch.tensor([6, M, 6, 6]), torch.tensor([6, -1, -7, 2**40])
    ids = {"query_ids": torch.arange(N), "negative_ids": torch.full((M,), -1)}
    ids["query_ids"][bad.cpu()] = ids["negative_ids"][M - 1] = 0  # what a bad place might read is no reason to drop it
    inputs |= on(device_of(backend), ids)
    loss, gradients = evaluate(info_nce, inputs, **options)
    assert loss.isnan().nonzero().flatten().tolist() == bad.tolist()
    padded = index.clone()
    padded[bad] = -1
    rest, want = evaluate(info_nce, inputs | {"negative_index": padded}, **options)
    others = loss.isfinite()
    assert torch.equal(loss[others], rest[others])
    assert torch.equal(gradients["query"][others], want["query"][others])
    table = torch.arange(M, device=index.device) != 6
    assert error(gradients["negative_keys"][table], want["negative_keys"][table]) <= 1e-13


@pytest.mark.parametrize(
    ("changes", "error_type", "message"),
    [
        ({"negative_keys": None}, ValueError, "negative_index are places in negative_keys, which were not given"),
        ({"negative_keys": torch.randn(N, H, D)}, ValueError, r"2 dimensions \(M, D\) with negative_index, got shape"),
        ({"negative_mode": "paired"}, ValueError, "cannot be used with negative_mode='paired'"),
        ({"negative_index": [[0] * H] * N}, TypeError, r"integer tensor of shape \(20, H\), got list"),
        ({"negative_index": torch.zeros(N, H)}, TypeError, "negative_index must be an integer tensor, got torch.float"),
        ({"negative_index": torch.zeros(N).long()}, ValueError, r"negative_index must have shape \(20, H\), got \(20,"),
        ({"negative_index": torch.zeros(5, H).long()}, ValueError, r"must have shape \(20, H\), got \(5, 4\)"),
        ({"negative_index": torch.zeros(N, H, device="meta").long()}, ValueError, "negative_index must be on cpu"),
        ({"negative_index": torch.full((N, H), M)}, ValueError, r"in \[0, 9\) or -1 \(no negative\), got 9"),
        ({"negative_index": torch.full((N, H), -2)}, ValueError, r"in \[0, 9\) or -1 \(no negative\), got -2"),
        ({"negative_ids": torch.zeros(N, H).long(), "query_ids": torch.zeros(N).long()}, ValueError, r"shape \(9,\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(changes, error_type, message):
    with pytest.raises(error_type, match=message):
        info_nce(**call() | changes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_places_may_have_any_integer_dtype(dtype):
    inputs = call()
    inputs["negative_index"] = inputs["negative_index"].clamp_min(0)
    want = info_nce(**inputs)
    assert torch.equal(info_nce(**inputs | {"negative_index": inputs["negative_index"].to(dtype)}), want)


@both_backends
def test_the_module_passes_places_on_and_autocast_narrows_the_table(backend):
    inputs = on(DEVICE[backend], call(torch.float32))
    t = inputs.pop("temperature")
    loss = FusedInfoNCELoss(t, backend=backend)
    assert torch.equal(loss(**inputs), info_nce(**inputs, temperature=t, backend=backend))
    assert "N M D FLOPs" in str(loss.explain(**inputs))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE[backend], dtype=dtype):
            got = evaluate(loss, inputs)
        want = evaluate(info_nce, {name: x.double() for name, x in inputs.items() if x.is_floating_point()},
            temperature=t, negative_index=inputs["negative_index"], backend="reference")  # fmt: skip
        assert 0 < error(got[0], want[0]) < 0.02
        assert 0 < error(got[1]["negative_keys"], want[1]["negative_keys"]) < 0.05


@both_backends
def test_compiled_equals_eager(backend):
    inputs = on(DEVICE[backend], call(torch.float32))

    def loss(query, positive_key, negative_keys):
        return info_nce(
            query, positive_key, negative_keys, 0.1, negative_index=inputs["negative_index"], backend=backend
        )

    torch._dynamo.reset()
    leaves = [inputs[name].requires_grad_() for name in ("query", "positive_key", "negative_keys")]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_sums_over_uses_have_one_order_on_many_threads():
    """To the bit, though thousands of queries use each row of the table."""
    threads = torch.get_num_threads()
    inputs = call(torch.float32, n=2000, h=8, d=32)
    torch.set_num_threads(4)
    try:
        results = [evaluate(info_nce, inputs)[1]["negative_keys"] for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert results[0].any()
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gathered_negatives_are_never_held(reduction):
    """They would be 64 MiB. The table's gradient is there twice, as it is added up and times the upstream."""
    n, m, h, d, limit = 2048, 1500, 128, 64, 4 * MIB
    inputs = call(torch.float32, n, m, h, d)
    rows = sum(inputs[name].nbytes for name in ("query", "positive_key", "negative_keys"))
    with PeakMemory() as memory:
        evaluate(info_nce, inputs, torch.ones(n if reduction == "none" else ()), reduction=reduction,
            workspace_limit=limit)  # fmt: skip
    assert memory.peak <= 2 * limit + 4 * rows
    assert memory.peak < n * h * d * 4 / 4


def test_smoothing_needs_no_more_than_a_few_blocks(monkeypatch):
    """Neither what is gathered, 16 MiB, nor rows divided by their norms, nor another gradient of each."""
    monkeypatch.setattr("fused_infonce.compose.own_keys.TAKEN", MIB // 32)
    n, m, h, d = 512, 375, 32, 256
    inputs, peaks = call(torch.float32, n, m, h, d), []
    for smoothing in (0.0, 0.1):
        with PeakMemory() as memory:
            evaluate(info_nce, inputs, label_smoothing=smoothing, workspace_limit=MIB // 4)
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0] + MIB // 2


@pytest.mark.parametrize("backend", [TRITON])
def test_kernels_hold_a_few_numbers_of_each_use(backend):
    n, m, h, d = 64, 32, 16, 128
    inputs = on(DEVICE[backend], call(torch.float32, n, m, h, d))
    with PeakMemory() as memory:
        evaluate(info_nce, inputs, backend=backend)
    assert 0 < memory.largest <= max(8 * n * h, 4 * n * d)
    assert memory.peak < n * h * d * 4 / 2


@all_backends
@pytest.mark.parametrize("in_batch", [False, True])
def test_biases_and_several_ids_are_of_the_tables_rows(backend, in_batch):
    """A bias of -inf leaves a row of the table out of every list, and an id that agrees out of a query's."""
    inputs = on(device_of(backend), call())
    bias = torch.randn(M, dtype=torch.float64).to(inputs["query"].device)
    bias[3] = -torch.inf
    index = inputs["negative_index"] = inputs["negative_index"].clamp(0)
    ids = [torch.randint(9, (n, 2)).to(bias.device) for n in (N, N, M)]
    names = {"query_ids": ids[0], "key_ids": ids[1], "negative_ids": ids[2]} if in_batch else {}
    options = {"in_batch_negatives": in_batch, "backend": backend}
    got = evaluate(info_nce, inputs | names | {"negative_bias": bias}, **options)
    own = {name: x for name, x in inputs.items() if name != "negative_index"} | names
    own |= {"negative_keys": inputs["negative_keys"][index], "negative_bias": bias[index]}
    own |= {"negative_ids": ids[2][index]} if in_batch else {}
    want = evaluate(info_nce, own, negative_mode="paired", **options)
    assert error(got[0], want[0]) <= 1e-13
    for name in ("negative_keys", "negative_bias"):
        uses = torch.zeros_like(inputs["negative_keys"] if name == "negative_keys" else bias)
        want[1][name] = uses.index_put_((index,), want[1][name], accumulate=True)
    for name, gradient in want[1].items():
        assert error(got[1][name], gradient) <= 1e-12, name
