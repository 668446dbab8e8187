"""Calls as large as training makes them: against float64, repeated, in streams and threads, and their memory.

See conftest.py for these without a GPU.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from oracles import info_nce as dense
from support.helpers import COMPILED, assert_close, evaluate, info_nce, on, watch_plans
from support.stand_in import DEVICE, on_a_stream, size, synchronize
from torch import Tensor

from benchmarks.contest import peak_bytes
from fused_infonce import nt_xent

pytestmark = pytest.mark.usefixtures("triton_device")
MIB = 2**20
N = size(65536, 50)
T = 0.05


def pairs(n: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    query, noise = torch.randn(2, n, d, device=DEVICE)
    return {"query": query.to(dtype), "positive_key": (query + noise).to(dtype)}


def in_chunks(query: Tensor, key: Tensor, symmetric: bool, rows: int = 256) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients in float64, with no more than `rows` rows of logits at a time."""
    query, key = (x.double().requires_grad_() for x in (query, key))
    loss, target = torch.zeros((), dtype=torch.float64, device=query.device), torch.arange(len(query), device=DEVICE)
    for one, other in ((query, key), (key, query))[: 1 + symmetric]:
        for part, y in zip(one.split(rows), target.split(rows), strict=True):
            some = dense.info_nce(part, other, temperature=T, target=y, reduction="sum") / len(one) / (1 + symmetric)
            some.backward()
            loss += some.detach()
    return loss, {"query": query.grad, "positive_key": key.grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_losses_and_gradients_of_65536_rows_keep_the_bounds(dtype, symmetric):
    inputs = pairs(N, size(768, 24), dtype)
    want = in_chunks(*inputs.values(), symmetric)
    got = evaluate(info_nce, inputs, temperature=T, symmetric=symmetric, backend="triton")
    assert_close(got, want, dtype, T)


ROWS = size(5000, 40)


def some(count: int, most: int) -> Tensor:
    return torch.randint(most, (count,), device=DEVICE)


ONEPASS = {  # whatever `info_nce` takes where loss and gradients are made in one pass
    "default": dict,
    "sum": lambda: {"reduction": "sum"},
    "target": lambda: {"target": some(ROWS, ROWS).masked_fill(some(ROWS, 5) == 0, -100)},
    "few targets": lambda: {"target": some(ROWS, 3)},
    "key ids": lambda: {"key_ids": some(ROWS, ROWS // 4)},
    "query ids": lambda: {"query_ids": some(ROWS, ROWS // 4), "key_ids": some(ROWS, ROWS // 4)},
    "weight": lambda: {"weight": torch.rand(ROWS, device=DEVICE)},
    "symmetric": lambda: {"symmetric": True, "d": size(256, 24)},
    "margin": lambda: {"margin": 0.2},
    "symmetric with a margin": lambda: {"symmetric": True, "margin": 0.2, "d": size(256, 24)},
    "key bias": lambda: {"key_bias": 3 * torch.randn(ROWS, device=DEVICE)},
    "unpaired": lambda: {"negatives": (ROWS // 3,)},
    "unpaired, in batch": lambda: {"negatives": (ROWS // 3,), "in_batch_negatives": True},
    "paired": lambda: {"negatives": (ROWS, 7), "negative_mode": "paired"},
    "paired, in batch": lambda: {"negatives": (ROWS, 7), "negative_mode": "paired", "in_batch_negatives": True},
    "negative ids": lambda: {
        "negatives": (ROWS // 3,), "in_batch_negatives": True, "key_ids": some(ROWS, ROWS // 4),
        "negative_ids": some(ROWS // 3, ROWS // 4),
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("t", [T, 0.0175])
@pytest.mark.parametrize(
    "option", [pytest.param(name, marks=pytest.mark.sanitizer) if name == "symmetric" else name for name in ONEPASS]
)
def test_one_pass_with_every_option_keeps_the_bounds(option, t, dtype, monkeypatch):
    plans = watch_plans(monkeypatch)
    options = {**ONEPASS[option](), "temperature": t}
    inputs = pairs(ROWS, options.pop("d", size(128, 24)), dtype)
    if shape := options.pop("negatives", None):
        inputs["negative_keys"] = torch.randn(*shape, inputs["query"].shape[1], device=DEVICE).to(dtype)
    got = evaluate(info_nce, inputs, backend="triton", **options)
    assert {made.name for made in plans} == {"onepass"}
    want = evaluate(dense.info_nce, {name: x.double() for name, x in inputs.items()}, **options)
    assert_close(got, want, dtype, t)


def contrast(query: Tensor, key: Tensor, **options: object) -> Tensor:
    return info_nce(query, key, backend="triton", **options)


def similar(query: Tensor, key: Tensor) -> Tensor:
    return nt_xent(query, key, T, backend="triton")


CALLS = {  # plan -> function, rows of scores, D, options
    "onepass": (contrast, N, size(768, 24), {"temperature": T}),
    "onepass, both directions": (contrast, size(16384, 50), size(768, 24), {"temperature": T, "symmetric": True}),
    "workspace": (contrast, N, size(768, 24), {"temperature": T, "reduction": "none"}),
    "streaming": (contrast, N, size(64, 16), {"temperature": T, "reduction": "none"}),
    "triangular": (similar, N, size(768, 24), {}),
    "streaming, of itself": (similar, N, size(64, 16), {}),
    "dense": (contrast, size(4000, 50), size(312, 24), {"temperature": T}),
    "dense, both directions": (contrast, size(4000, 50), size(768, 24), {"temperature": T, "symmetric": True}),
    "dense, of itself": (similar, size(4000, 50), size(768, 24), {}),
}


def large_call(name: str):
    """Return inputs of a call whose automatic plan is this one, and what it computes: the loss and the gradients."""
    function, n, d, options = CALLS[name]
    inputs = [*pairs(n if function is contrast else n // 2, d, torch.bfloat16).values()]

    def step() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss = function(*leaves, **options)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    return inputs, step


@pytest.mark.parametrize("name", CALLS)
def test_a_large_call_is_repeated_to_the_bit(name, monkeypatch):
    plans = watch_plans(monkeypatch)
    _, step = large_call(name)
    first = step()
    assert {made.name for made in plans} == {name.split(",")[0]}
    assert all(x.isfinite().all() and x.any() for x in first)
    for _ in range(size(3, 1)):
        assert all(torch.equal(x, y) for x, y in zip(step(), first, strict=True))


@pytest.mark.parametrize("name", [*CALLS, "forward"])
def test_each_plan_keeps_to_its_memory(name, record_property, monkeypatch):
    """The workspace, gradients, their accumulators in float32, a copy of the inputs, and vectors of rows."""
    plans = watch_plans(monkeypatch)
    inputs, step = large_call(name if name in CALLS else "workspace")
    if name == "forward":
        step = torch.no_grad()(lambda: contrast(*inputs, temperature=T))
    step()  # what is allocated once: library workspaces, compiled kernels
    peak, _ = peak_bytes(step, DEVICE)
    assert {made.name for made in plans} == {name.split(",")[0]}
    record_property("peak_mib", peak / MIB)
    elements = 0 if name == "forward" else sum(x.numel() for x in inputs)
    room = plans[0].limit if COMPILED else 50 * 64 * 4
    assert 0 < peak <= room + elements * (2 + 4 + 4 + 2) + 64 * sum(map(len, inputs)) * 4


@pytest.mark.parametrize("name", CALLS)
def test_another_stream_than_the_default_computes_the_same(name):
    """Inputs are made on it behind long products, so that what is launched on another stream comes too soon."""
    inputs, step = large_call(name)
    fresh = [torch.randn_like(x) for x in inputs]

    def renewed() -> tuple[Tensor, ...]:
        for x, y in zip(inputs, fresh, strict=True):
            x.copy_(y)
        return step()

    before = step()
    got = on_a_stream(renewed)
    assert not torch.equal(before[0], got[0])
    assert all(torch.equal(x, y) for x, y in zip(got, step(), strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_threads_do_not_disturb_each_other(backend):
    """Each on a stream of its own, at the same time; without a GPU one after the other, as the interpreter must be."""
    calls = [on(DEVICE, pairs(size(3000 + i, 20 + i), size(128, 24), torch.bfloat16)) for i in range(size(4, 2))]

    def run(inputs: dict[str, Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        with torch.cuda.stream(torch.cuda.Stream()) if COMPILED else nullcontext():
            found = [evaluate(info_nce, inputs, temperature=T, backend=backend) for _ in range(size(20, 1))]
            if COMPILED:
                torch.cuda.current_stream().synchronize()
        return found

    want = [evaluate(info_nce, inputs, temperature=T, backend=backend) for inputs in calls]
    synchronize()
    with ThreadPoolExecutor(len(calls) if COMPILED else 1) as pool:
        for found, (loss, gradients) in zip(pool.map(run, calls), want, strict=True):
            for again, others in found:
                assert torch.equal(again, loss)
                assert all(torch.equal(others[name], x) for name, x in gradients.items())
