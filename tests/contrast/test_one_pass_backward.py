"""Gradients of the one-pass plan in Triton are finished in the backward, where the upstream is known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.helpers import error
from support.problems import backend as triton
from support.problems import make, with_segments

from fused_infonce import explain, info_nce
from fused_infonce.backends import operators, plan
from fused_infonce.backends.plan import Plan

pytestmark = pytest.mark.interpreter
N, M, D, H = 13, 15, 12, 2
CASES: dict[str, dict[str, Any]] = {
    "in batch": {},
    "target": {"target": torch.arange(N) * 7 % M},
    "a margin": {"target": torch.arange(N) * 7 % M, "margin": 0.3},
    "shared": {"negatives": (6, D), "in_batch_negatives": True},
    "own": {"negatives": (N, H, D), "negative_mode": "paired", "in_batch_negatives": True},
    "own alone": {"negatives": (N, H, D), "negative_mode": "paired"},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GPU_ONEPASS_DIM", 1)
    monkeypatch.setattr(plan, "GPU_ONEPASS_ROWS", 4)
    for name in ("GPU_DENSE", "GPU_DENSE_WIDE"):
        monkeypatch.setattr(plan, name, 0)


def call(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return inputs and options of a call in chunks of 8 rows, which do not divide the rows."""
    options = dict(CASES[name])
    shapes = [(N, D), (M if "target" in options else N, D), *filter(None, [options.pop("negatives", None)])]
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    columns = sum(x.shape[-2] for x in inputs[1:])
    limit = 4 * 8 * (columns * dtype.itemsize + 3 * 4 * (dtype.itemsize // 4 or 1)) // 3 + 8
    options |= {"temperature": 0.2, "backend": "triton", "workspace_limit": limit}
    return inputs, options


@pytest.fixture(autouse=True)
def any_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LEAST_LIMIT", 1)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    inputs, options = call(name, torch.float64)
    (chosen,) = explain(*inputs, **options)
    assert chosen.name == "onepass"
    assert name == "own alone" or chosen.rows < N
    options["temperature"] = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def loss(t: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        return 3 * info_nce(*rows, **{**options, "temperature": t})

    assert torch.autograd.gradcheck(loss, (options["temperature"], *inputs), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_repeated_backward_gives_the_same_bits(name, dtype):
    """Saved sums are read, also where a gradient has their shape and dtype; another upstream is a factor."""
    inputs, options = call(name, dtype)
    loss = info_nce(*inputs, **options)
    first, again = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    scaled = torch.autograd.grad(loss, inputs, torch.full_like(loss, 2.0**16))
    anew = torch.autograd.grad(info_nce(*inputs, **options), inputs)
    for x, y, z, large in zip(first, again, anew, scaled, strict=True):
        assert x.dtype == dtype
        assert x.any()
        assert torch.equal(x, y)
        assert torch.equal(x, z)
        assert torch.equal(large, x * 2.0**16)  # a power of two rounds nothing


@pytest.mark.parametrize("name", CASES)
def test_an_upstream_that_is_zero_or_not_finite(name):
    inputs, options = call(name)
    t = torch.tensor(0.2, requires_grad=True)
    loss = info_nce(*inputs, **{**options, "temperature": t})
    for value in (0.0, torch.nan, torch.inf):
        for x in torch.autograd.grad(loss, [*inputs, t], torch.tensor(value), retain_graph=True):
            assert (x == 0).all() if value == 0 else not x.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, 3.0, 2.0**-20])
def test_the_factor_is_applied_before_the_rounding(dtype, upstream):
    problem = with_segments(make(N, M, D, dtype, t=0.2, target=torch.arange(N)), 6, H)
    chosen, count = Plan("onepass", 8, M, 1 << 20, 0, ""), len(problem.inputs)
    made = triton.onepass(problem, chosen, "infonce", torch.rand(N), [True] * (count + 1))
    before = [x if x is None else x.clone() for x in (*made.inputs, *made.kept)]

    def finished(dtype: torch.dtype) -> list[torch.Tensor]:
        return triton.finished(problem, chosen, made.inputs, made.kept, torch.tensor(upstream), [dtype] * count)

    for x, y in zip(finished(torch.float32), finished(torch.bfloat16), strict=True):
        assert torch.equal(x.bfloat16(), y)
    for x, y in zip((*made.inputs, *made.kept), before, strict=True):
        assert (x is y is None) or torch.equal(x, y)


@pytest.mark.parametrize("d", [16, D])  # whose sums are of their shape, and padded
def test_spent_sums_become_the_same_gradients(d):
    problem = make(N, M, d, torch.float32, t=0.2, target=torch.arange(N))
    chosen = Plan("onepass", 8, M, 1 << 20, 0, "")
    made = triton.onepass(problem, chosen, "infonce", torch.rand(N), [True] * 3)
    given = problem, chosen, made.inputs, made.kept, torch.tensor(3.0), [torch.float32] * 2
    want = triton.finished(*given)
    found = triton.finished(*given, [1])
    assert (found[1].data_ptr() == made.inputs[1].data_ptr()) == (d == 16)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("name", ["in batch", "own"])
def test_gradients_that_nobody_needs_are_not_made(name):
    inputs, options = call(name)
    whole = torch.autograd.grad(info_nce(*inputs, **options), inputs)
    for wanted in itertools.product([False, True], repeat=len(inputs)):
        if any(wanted):
            some = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
            info_nce(*some, **options).backward()
            for x, y in zip(some, whole, strict=True):
                assert x.grad is None if not x.requires_grad else torch.equal(x.grad, y)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["shared", "own"])
def test_negatives_without_a_gradient_may_be_overwritten_before_the_backward(name, autocast):
    """As the queue of MoCo is."""
    (query, key, negatives), options = call(name)
    negatives = negatives.detach()
    with torch.autocast("cpu", enabled=autocast):
        loss = info_nce(query, key, negatives, **options)
        want = torch.autograd.grad(info_nce(query, key, negatives.clone(), **options), (query, key))
    negatives.fill_(torch.nan)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(loss, (query, key)), want, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_beside_the_inputs_one_sum_of_each_and_vectors_are_saved(name, autocast):
    """No gradient of negatives of one query each, and no copy of the inputs in the dtype of the products."""
    inputs, options = call(name)
    given = {x.untyped_storage().data_ptr() for x in inputs}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in given:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", enabled=autocast):
        loss = info_nce(*inputs, **options)
    rows = sum(x.numel() // D for x in inputs)
    assert sum(saved.values()) <= 4 * D * (N + inputs[1].shape[0] + (6 if name == "shared" else 0)) + 4 * 10 * rows
    got = torch.autograd.grad(loss, inputs)
    want = torch.autograd.grad(info_nce(*inputs, **options), inputs)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.float32
        assert error(x, y) <= (1e-2 if autocast else 0)


def test_rows_with_gaps_and_transposed_rows_are_finished_as_their_copies():
    inputs, options = call("own")
    copies = [x.detach().requires_grad_() for x in inputs]
    strided = [torch.empty(*x.shape[:-1], 2 * D)[..., ::2].copy_(x.detach()).requires_grad_() for x in inputs]
    results = [torch.autograd.grad(info_nce(*x, **options), x) for x in (copies, strided)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["in batch", "target", "own"])
def test_compiled_equals_eager(name):
    inputs, options = call(name)
    torch._dynamo.reset()
    results = []
    for function in (info_nce, torch.compile(info_nce, fullgraph=True, backend="aot_eager")):
        value = function(*inputs, **options)
        results.append((value, *torch.autograd.grad(value * 3, inputs)))
    for eager, compiled in zip(*results, strict=True):
        if name == "target":  # whether every row has one is read outside only
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(eager, compiled)


@pytest.mark.parametrize(("own", "normalize", "every"), [(None, False, False), (H, True, True)])
def test_operators_pass_opcheck(own, normalize, every):
    problem = with_segments(make(N, M, D, torch.float32, target=torch.arange(N), normalize=normalize), 6, own)
    chosen, count = Plan("onepass", 8, M, 1 << 20, 0, "", "triton"), len(problem.inputs)
    flat, weight = operators.flatten(problem, chosen), torch.full((1,), 1 / N)
    wanted = [True] + [every] * count
    torch.library.opcheck(operators.onepass, (*flat, "infonce", weight, wanted))
    result = operators.Recorded("triton").onepass(problem, chosen, "infonce", weight, wanted)
    codes = [operators.DTYPES.index(torch.bfloat16) if want else 0 for want in wanted[:-1]]
    torch.library.opcheck(operators.finished, (*flat, result.inputs, list(result.kept), torch.tensor(3.0), codes))
