"""Multiple negatives ranking in float32 and 16 bits against float64, and its memory."""

from __future__ import annotations

import pytest
import torch
from oracles import multiple_negatives as dense
from support.helpers import DEVICE, both_backends, cases, error
from support.memory import MIB, PeakMemory
from support.ranking_calls import KINDS, SOFTMAXES, call, run

from fused_infonce import multiple_negatives

SOME = [SOFTMAXES[0], SOFTMAXES[7], SOFTMAXES[9]]  # query to documents; all directions; symmetric


@cases(
    dtype=[torch.float32, torch.bfloat16],
    temperature=[0.02, 0.1],
    softmax=SOME,
    hardness=KINDS,
)
def test_losses_and_gradients_keep_the_bounds_of_infonce(backend, dtype, temperature, softmax, hardness):
    """Against the dense code in float64 on the same numbers."""
    n, d = (33, 24) if backend == "torch" else (6, 16)
    inputs = [x.requires_grad_() for x in call(n, 2, d=d, dtype=dtype, device=DEVICE[backend], grad=False)]
    inputs.append(torch.tensor(temperature, device=DEVICE[backend], requires_grad=True))
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    partition, directions = softmax
    options = {"directions": directions, "partition": partition, "hardness": hardness}
    options["hardness_strength"] = 5.0 if hardness else 0.0
    got, *grads = run(lambda **given: multiple_negatives(**given, backend=backend), inputs, 0, options)
    want, *truth = run(dense.multiple_negatives, exact, 0, options)
    single = 1e-5 * max(1, 0.05 / temperature)
    assert got.dtype == torch.float32
    assert error(got, want) <= single
    assert error(grads.pop(), truth.pop()) <= 1e-4
    bound = 5e-3 if dtype == torch.bfloat16 else single
    for ours, g in zip(grads, truth, strict=True):
        assert ours.dtype == dtype
        assert error(ours, g) <= bound


@both_backends
def test_separated_pairs_keep_their_loss(backend):
    """A loss of 1e-16, which log(sum exp) - pos would round to 0, with its gradient."""
    query = torch.eye(8, device=DEVICE[backend])[:4].requires_grad_()
    hard = torch.eye(8, device=DEVICE[backend])[4:].requires_grad_()
    cases = [{}, {"directions": SOFTMAXES[5][1]}, {"hardness": "all_negatives", "hardness_strength": 1.0}]
    for case in cases:
        options = {"temperature": 0.027, **case}
        exact = [x.detach().cpu().double().requires_grad_() for x in (query, hard)]
        loss = multiple_negatives(query, [query + 0.01 * hard, hard], **options, backend=backend)
        q, h = exact
        truth = dense.multiple_negatives(q, [q + 0.01 * h, h], **options)
        assert truth < 1e-13
        assert error(loss, truth) <= 2e-5
        for a, b in zip(torch.autograd.grad(loss, [query, hard]), torch.autograd.grad(truth, exact), strict=True):
            assert error(a, b) <= 2e-5


@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("softmax", SOME, ids=str)
@pytest.mark.parametrize("hardness", KINDS)
def test_autocast_rounds_the_rows_and_nothing_else(given, softmax, hardness):
    """Products of 16-bit rows, statistics in float32, gradients in the dtype of what came."""
    inputs = call(17, 2, d=24, dtype=torch.float32, grad=False)
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    dtypes = dtypes if given == "mixed" else [getattr(torch, given)] * 4
    inputs = [x.to(dtype) for x, dtype in zip(inputs, dtypes, strict=True)]
    partition, directions = softmax
    options = {
        "temperature": 0.1, "directions": directions, "partition": partition, "hardness": hardness,
        "hardness_strength": 3.0 if hardness else 0.0,
    }  # fmt: skip
    exact = [x.bfloat16().double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    want, *truth = run(dense.multiple_negatives, exact, 0, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = multiple_negatives(inputs[0], inputs[1:], **options)
    assert loss.dtype == torch.float32
    assert error(loss, want) <= 1e-5
    for x, ours, g in zip(inputs, torch.autograd.grad(loss, inputs), truth, strict=True):
        assert ours.dtype == x.dtype
        assert error(ours, g) <= 5e-3


@both_backends
@pytest.mark.parametrize("hardness", ["in_batch_negatives", "all_negatives"])
def test_a_strength_beyond_the_range_of_float32_does_not_overflow(backend, hardness):
    """exp((1 / t + strength) cos) would overflow without a maximum subtracted, exp(cos / t) would not."""
    inputs = [x.requires_grad_() for x in call(5, 0, dtype=torch.float32, device=DEVICE[backend], grad=False)]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    options = {"temperature": 0.1, "hardness": hardness, "hardness_strength": 300.0}
    got = run(lambda **given: multiple_negatives(**given, backend=backend), inputs, 0, options)
    for ours, truth in zip(got, run(dense.multiple_negatives, exact, 0, options), strict=True):
        assert error(ours, truth) <= 1e-4


@pytest.mark.parametrize("softmax", SOME, ids=str)
@pytest.mark.parametrize("hardness", KINDS)
def test_16_bit_gradients_are_rounded_once(softmax, hardness):
    """Those of float32 rows of the same values, rounded, though several problems share the rows."""
    partition, directions = softmax
    options = {"directions": directions, "partition": partition, "hardness": hardness}
    options["hardness_strength"] = 2.0 if hardness else 0.0
    options["temperature"] = 0.1
    narrow = call(17, 2, d=24, dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in narrow]
    for ours, truth in zip(*(run(multiple_negatives, x, 0, options) for x in (narrow, wide)), strict=True):
        torch.testing.assert_close(ours, truth.to(ours.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("softmax", SOME, ids=str)
@pytest.mark.parametrize("hardness", [None, "hard_negatives", "all_negatives"])
def test_memory_does_not_grow_with_the_scores(softmax, hardness):
    """Some times the inputs and the limit, where one matrix of scores has 4 MiB."""
    inputs = [x.requires_grad_() for x in call(1024, 2, d=16, dtype=torch.float32, grad=False)]
    partition, directions = softmax
    options = {"directions": directions, "partition": partition, "hardness": hardness}
    options["hardness_strength"] = 2.0 if hardness else 0.0
    with PeakMemory() as memory:
        multiple_negatives(inputs[0], inputs[1:], **options, workspace_limit=MIB // 8).backward()
    assert memory.peak <= MIB // 2 + 12 * sum(x.nbytes for x in inputs)
    assert memory.largest <= MIB // 4
