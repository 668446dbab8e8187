"""Sizes that fit no tile, layouts, emptiness, plans, repeats."""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.helpers import (
    DEVICE,
    FACTORS,
    both_backends,
    call_of,
    cases,
    check,
    evaluate,
    info_nce,
    make_call,
    on,
    valid,
    watch_plans,
)

from fused_infonce.backends import plan

SIZES = [1, 2, 15, 16, 17, 33, 127, 129]
TOLERANCE = {"rtol": 1e-11, "atol": 1e-14}  # of float64, for another order of the same sums


# Sizes


@cases(
    pairs="torch",
    n=SIZES,
    d=[1, 7, 33, 64, 100],
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    options=[{}, {"symmetric": True}, {"reduction": "none"}],
)
def test_sizes_that_fit_no_tile_keep_the_bounds(backend, n, d, dtype, options):
    normalize = d > 1  # normalised rows of length 1 are 1 or -1, and their gradients 0 but for rounding
    check(backend, call_of(n, d, "loose", dtype, 0.1 if normalize else 1.0), normalize=normalize, **options)


@cases(
    pairs="torch",
    n=SIZES,
    m=[1, 2, 16, 17, 65, 130],
    reduction=["mean", "none"],
    dtype=[torch.float32, torch.float64],
)
def test_any_number_of_keys_keeps_the_bounds(backend, n, m, reduction, dtype):
    inputs = call_of(max(n, m), 20, "loose", dtype)
    inputs |= {
        "query": inputs["query"][:n],
        "positive_key": inputs["positive_key"][:m],
        "target": torch.randint(m, (n,)),
    }
    check(backend, inputs, reduction=reduction)


@cases(
    pairs="torch",
    n=[1, 2, 17, 33],
    h=[1, 2, 15, 17, 65],
    mode=["paired", "unpaired"],
    in_batch=[None, True],
    dtype=[torch.float32, torch.bfloat16, torch.float64],
)
def test_any_number_of_negatives_keeps_the_bounds(backend, n, h, mode, in_batch, dtype):
    n = min(n, 17) if mode == "paired" else n
    inputs = call_of(n, 20, "loose", dtype, negatives=(n, h) if mode == "paired" else (h,))
    check(backend, inputs, negative_mode=mode, in_batch_negatives=in_batch)


@both_backends
@pytest.mark.parametrize("d", [257, 600, 1030])
@pytest.mark.parametrize("symmetric", [False, True])
def test_long_rows_keep_the_bounds(backend, d, symmetric):
    check(backend, call_of(9, d, "loose"), symmetric=symmetric)
    check(backend, call_of(5, d, "loose", negatives=(5, 3)), negative_mode="paired", in_batch_negatives=True)


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("in_batch", [None, True])
@pytest.mark.parametrize("shape", [(0, 5), (4, 0, 5)], ids=["unpaired", "paired"])
def test_without_explicit_negatives_the_loss_is_that_of_the_others(backend, reduction, in_batch, shape):
    """Their tensor is empty: without others the loss is 0, and so are all gradients."""
    inputs = call_of(4, 5) | {"negative_keys": torch.randn(shape)}
    mode = "paired" if len(shape) == 3 else "unpaired"
    loss, _ = check(backend, inputs, reduction=reduction, negative_mode=mode, in_batch_negatives=in_batch)
    assert bool(loss.any()) == (in_batch is True)


@both_backends
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_without_keys_the_loss_is_0(backend, reduction):
    """With no keys there can be no targets."""
    inputs = {"query": torch.randn(4, 5), "positive_key": torch.randn(0, 5), "target": torch.full((4,), -100)}
    loss, _ = check(backend, inputs, reduction=reduction)
    assert not loss.any()
    with_negatives = inputs | {"negative_keys": torch.randn(3, 5)}
    check(backend, with_negatives, reduction=reduction, in_batch_negatives=True)


@both_backends
def test_rows_of_no_length_have_the_loss_log_n(backend):
    """Every logit is 0: the loss is log N."""
    loss = info_nce(*torch.zeros(2, 6, 0, device=DEVICE[backend]), backend=backend)
    assert loss.item() == pytest.approx(math.log(6), rel=1e-6)


# Layouts

LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: torch.stack([x, x + 1], dim=-2).flatten(-3, -2)[..., ::2, :],
    "every other column": lambda x: torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2],
    "inside a larger tensor": lambda x: torch.nn.functional.pad(x, (3, 4, 1, 2))[..., 1:-2, 3:-4],
    "permuted": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@cases(
    pairs="torch",
    layout=list(LAYOUTS),
    of=["query", "positive_key", "negative_keys", "all"],
    mode=["paired", "unpaired"],
    plan=["default", "statistics"],
)
def test_a_layout_in_memory_changes_nothing(backend, layout, of, mode, plan):
    shape = (7, 4) if mode == "paired" else (4,)
    inputs = on(DEVICE[backend], call_of(7, 5, dtype=torch.float64, negatives=shape))
    options = {"negative_mode": mode, "in_batch_negatives": True, "backend": backend}
    options |= {"reduction": "none" if plan == "statistics" else "mean"}
    want = evaluate(info_nce, inputs, **options)
    names = [name for name in inputs if name != "temperature"] if of == "all" else [of]
    views = inputs | {name: LAYOUTS[layout](inputs[name]) for name in names}
    for name in names:
        assert torch.equal(views[name], inputs[name])
        assert layout == "unaligned" or not views[name].is_contiguous()
    torch.testing.assert_close(evaluate(info_nce, views, **options), want, **TOLERANCE)


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_expanded_tensors_are_read_as_their_copies(backend, reduction):
    """One row, one temperature and one target, repeated with stride 0; and an expanded upstream gradient."""
    device = DEVICE[backend]
    q, k = (torch.randn(6, 4, dtype=torch.float64, device=device) for _ in range(2))
    views = {
        "query": q[:1].expand(6, 4),
        "positive_key": k,
        "negative_keys": q[:, :1].expand(6, 4),
        "temperature": torch.tensor(0.3, dtype=torch.float64, device=device).expand(6),
        "target": torch.tensor(2, device=device).expand(6),
        "key_ids": torch.arange(12, device=device)[::2],
        "negative_ids": torch.tensor([[4, 1]] * 6, device=device)[:, 0],
    }
    dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in views.items()}
    options = {"reduction": reduction, "in_batch_negatives": True, "backend": backend}
    upstream = torch.tensor(0.7, dtype=torch.float64, device=device).expand(6 if reduction == "none" else ())
    got, want = (evaluate(info_nce, x, upstream, **options) for x in (views, dense))
    torch.testing.assert_close(got, want, **TOLERANCE)


@both_backends
@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_strided_temperature_is_read_as_its_copy(backend, shape):
    inputs = on(DEVICE[backend], call_of(6, 4, dtype=torch.float64))
    t = torch.rand(12, dtype=torch.float64, device=DEVICE[backend])[::2].reshape(shape) + 0.1
    for options in ({}, {"symmetric": True}):
        got, want = (
            evaluate(info_nce, inputs | {"temperature": x}, backend=backend, **options) for x in (t, t.clone())
        )
        torch.testing.assert_close(got, want, **TOLERANCE)


@both_backends
def test_one_tensor_on_both_sides_gets_both_gradients(backend):
    inputs = on(DEVICE[backend], {"query": torch.randn(6, 4, dtype=torch.float64)})
    same = inputs["query"].requires_grad_()
    (got,) = torch.autograd.grad(info_nce(same, same, backend=backend), same)
    _, want = evaluate(info_nce, {"query": same, "positive_key": same.detach().clone()}, backend=backend)
    torch.testing.assert_close(got, want["query"] + want["positive_key"], **TOLERANCE)


# Plans and repeats


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_of_one_target_keep_the_bounds(backend, dtype):
    """Many rows add into the gradient of one key."""
    inputs = call_of(64, 16, "loose", dtype)
    for target in (torch.zeros(64, dtype=torch.int64), torch.arange(64) % 3, torch.arange(64).flip(0) // 2):
        check(backend, inputs | {"target": target})


CHUNKS = {  # n, m, workspace limit -> plan, blocks of rows, of columns
    "onepass, one chunk": (300, 100, None, "onepass", 1, 1),
    "onepass, chunks of rows": (600, 100, 256 * 100 * 5, "onepass", 3, 1),  # a score and the byte of a mask
    "onepass, tiles of columns": (270, 2100, None, "onepass", 1, 2),
    "onepass, both": (520, 4100, 260 * 4100 * 5, "onepass", 2, 3),
    "workspace, columns": (300, 2000, 300 * 400 * 16, "workspace", 1, 5),
    "workspace, both": (130, 30, 50 * 16, "workspace", 3, 30),
}


@pytest.mark.parametrize("case", CHUNKS)
@pytest.mark.parametrize("t", [0.1, 0.01])  # without and with a running maximum
@pytest.mark.parametrize("ids", [False, True])
def test_chunks_of_the_torch_backend_keep_the_bounds(case, t, ids, monkeypatch):
    n, m, limit, name, *_ = CHUNKS[case]
    monkeypatch.setattr(plan, "CPU_BLOCK", 2**19)
    monkeypatch.setattr(plan, "DENSE", 0)  # else it would take the smallest of these whole
    plans = watch_plans(monkeypatch)
    inputs = call_of(max(n, m), 8, "loose", torch.float32, t)
    inputs |= {
        "query": inputs["query"][:n],
        "positive_key": inputs["positive_key"][:m],
        "target": torch.randint(m, (n,)),
    }
    if ids:
        inputs["key_ids"] = torch.randint(m // 2, (m,))
    check("torch", inputs, workspace_limit=limit)
    assert {plan.name for plan in plans} == {name}
    assert (math.ceil(n / plans[0].rows), math.ceil(m / plans[0].cols)) == CHUNKS[case][4:]


@cases(
    pairs="torch",
    plan=["workspace", "streaming"],
    option=[{}, {"symmetric": True}, {"reduction": "none"}, {"negatives": True}, {"target": True}],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    blocks=[(1, 1), (3, 2), (2, 5)],
)
def test_both_plans_in_blocks_of_any_size_keep_the_bounds(backend, plan, option, dtype, blocks, monkeypatch):
    """On the torch backend: its plan without a onepass, in blocks of any size."""
    n, option = 70, dict(option)
    sizes = {"rows": math.ceil(n / blocks[0]), "cols": math.ceil(n / blocks[1])}
    plans = watch_plans(monkeypatch, name=plan if backend == "triton" else "workspace", **sizes)
    inputs = call_of(n, 20, "loose", dtype, negatives=(50,) if option.pop("negatives", False) else ())
    if option.pop("target", False):
        inputs["target"] = torch.randint(n, (n,))
    check(backend, inputs, in_batch_negatives=True, **option)
    assert plans


@cases(
    options=[{}, {"symmetric": True}, {"reduction": "none"}, {"workspace_limit": 3000}, {"negative_mode": "paired"}],
    dtype=[torch.float32, torch.bfloat16],
    plan=["default", "other"],
)
def test_a_repeated_call_gives_the_same_bits(backend, options, dtype, plan, monkeypatch):
    if plan == "other":
        watch_plans(monkeypatch, name="streaming" if backend == "triton" else "workspace")
    n = 40 if DEVICE[backend] == "cpu" else 700
    shape = (n, 3) if options.get("negative_mode") == "paired" else ()
    inputs = call_of(n, 20, dtype=dtype, negatives=shape)
    if not options.get("symmetric"):
        inputs["target"] = torch.randint(5, (n,))  # several rows add into one key
    first, *others = [
        evaluate(info_nce, on(DEVICE[backend], inputs), backend=backend, in_batch_negatives=True, **options)
        for _ in range(3)
    ]
    for other in others:
        assert torch.equal(other[0], first[0])
        assert all(torch.equal(other[1][name], first[1][name]) for name in first[1])


def test_threads_do_not_change_the_result():
    inputs = call_of(600, 32)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(evaluate(info_nce, inputs, backend="torch", workspace_limit=10**6))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[2][0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


# Properties

call_strategy = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FACTORS.items()}).filter(valid)


def property_test(examples, phases=tuple(Phase)):
    limits = st.sampled_from([None, 200, 5000])
    sizes = {"n": st.integers(0, 20), "m": st.integers(1, 24), "d": st.integers(2, 20), "h": st.integers(0, 9)}
    strategies = {**sizes, "t": st.floats(0.02, 2.0), "limit": limits, "seed": st.integers(0, 2**32 - 1)}
    quiet = settings(max_examples=examples, phases=phases, suppress_health_check=[HealthCheck.function_scoped_fixture])
    return lambda f: quiet(given(case=call_strategy, **strategies)(f))


def any_call(backend, case, n, m, d, h, t, limit, seed):
    torch.manual_seed(seed)
    inputs, options = make_call(n, m, d, h, torch.float64, t, **case)
    if case["normalize"] is False:  # logits of at most a few hundred
        inputs |= {name: inputs[name] / d**0.5 for name in ("query", "positive_key")}
    check(backend, inputs, workspace_limit=limit, **options)


@property_test(examples=200)
def test_any_call_in_torch_keeps_the_bounds(case, n, m, d, h, t, limit, seed):
    any_call("torch", case, n, m, d, h, t, limit, seed)


@both_backends
@property_test(examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # the interpreter is slow to shrink
def test_any_call_keeps_the_bounds(backend, case, n, m, d, h, t, limit, seed):
    any_call(backend, case, n, m, d, h, t, limit, seed)
