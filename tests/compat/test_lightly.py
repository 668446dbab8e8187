"""compat.lightly against lightly's NTXentLoss with its memory bank, without the rest of the package."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from support.helpers import DEVICE, both_backends, error, evaluate
from support.libraries import library, of_lightly, seeds
from support.processes import in_two_processes
from support.side_by_side import assert_same, error_of, refuse_fallback

original = library("lightly.loss.ntx_ent_loss", of_lightly)

from fused_infonce.backends import registry  # noqa: E402
from fused_infonce.compat import common  # noqa: E402
from fused_infonce.compat import lightly as drop_in  # noqa: E402

N, D = 6, 5


def views(n: int = N, d: int = D, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two near each other, all of them pointing more or less one way, of all lengths."""
    out0 = torch.randn(n, d) + torch.randn(d)
    out1 = out0 + torch.randn(n, d)
    return {name: (x * (0.5 + torch.rand(n, 1))).to(dtype) for name, x in (("out0", out0), ("out1", out1))}


def at(module: ModuleType, t: float, **options: Any) -> Any:
    """The loss as a function of the views, and of the temperature where it is a tensor."""
    return lambda out0, out1, temperature=t: module.NTXentLoss(temperature, **options)(out0, out1)


@pytest.mark.parametrize("seed", seeds(440))
def test_equals_the_original(seed, monkeypatch):
    """Shapes, temperatures of either sign and every kind, dtypes; options that change nothing in one process."""
    refuse_fallback(monkeypatch, drop_in)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    inputs = views(draw.randint(2, 40), draw.choice([2, 3, 8, 17, 64]), dtype)
    t = 10 ** draw.uniform(-1.7, 0.3) * draw.choice([1, 1, -1])
    kind = draw.choice(["float", "float", "scalar", "one element"])
    if kind != "float":
        inputs["temperature"] = torch.full({"scalar": (), "one element": (1,)}[kind], t, dtype=dtype)
    options = {"memory_bank_size": draw.choice([0, (0,), (0, 7)]), "gather_distributed": draw.random() < 0.5}
    assert_same(at(drop_in, t, **options), at(original, t, **options), inputs, abs(t))


def pair(*arguments: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[torch.nn.Module]:
    """A drop-in and an original whose banks hold the same."""
    losses = [module.NTXentLoss(*arguments, **options).to(dtype) for module in (drop_in, original)]
    losses[1].memory_bank.bank.copy_(losses[0].memory_bank.bank)
    return losses


def same_bank(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.memory_bank, b.memory_bank
    return type(a) is type(b) and torch.equal(a.bank, b.bank) and torch.equal(a.bank_ptr, b.bank_ptr)


@pytest.mark.parametrize("seed", seeds(440))
def test_equals_the_original_with_a_memory_bank(seed, monkeypatch):
    """Several calls, so that the bank wraps; it holds the same after each."""
    refuse_fallback(monkeypatch, drop_in)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.float32, torch.float64])
    d, rows = draw.choice([2, 3, 8, 33]), draw.randint(1, 30)
    t = 10 ** draw.uniform(-1.7, 0.3) * draw.choice([1, 1, -1])
    ours, theirs = pair(t, draw.choice([(rows, d), [rows, d]]), dtype=dtype)
    before = ours.memory_bank.bank.clone()
    for _ in range(5):
        originals = iter([theirs, copy.deepcopy(theirs).double()])  # the second one is of the call in float64
        assert_same(ours, lambda **call: next(originals)(**call), views(draw.randint(2, 12), d, dtype), abs(t))  # noqa: B023
        assert same_bank(ours, theirs)
        if draw.random() < 0.5:
            inputs = views(3, d, dtype)
            torch.testing.assert_close(ours(**inputs), theirs(**inputs), rtol=2e-5 / min(abs(t), 1), atol=1e-6)
            assert same_bank(ours, theirs)
    assert not torch.equal(ours.memory_bank.bank, before)


@pytest.mark.parametrize("grads", [(True, False), (False, True), (False, False), (True, True)])
@pytest.mark.parametrize("recording", [False, True])
def test_the_bank_is_updated_when_the_originals_is(grads, recording):
    """Where the first view requires a gradient: not under no_grad."""
    ours, theirs = pair(0.1, (8, D))
    before = ours.memory_bank.bank.clone()
    inputs = {name: x.requires_grad_(grad) for (name, x), grad in zip(views().items(), grads, strict=True)}
    with torch.set_grad_enabled(recording):
        got, want = ours(**inputs), theirs(**inputs)
    assert got.requires_grad == want.requires_grad == (recording and any(grads))
    assert same_bank(ours, theirs)
    assert torch.equal(ours.memory_bank.bank, before) != (recording and grads[0])


def test_a_bank_of_rows_that_are_no_unit_vectors_equals_the_originals():
    """It is taken as it is; a backward that is still to come sees it as it was."""
    ours, theirs = pair(0.3, (8, D))
    for loss in (ours, theirs):
        loss.memory_bank.bank.mul_(torch.linspace(0.2, 3, 8)[:, None])
    assert_grads = []
    for loss in (ours, theirs):
        torch.manual_seed(1)
        inputs = {name: x.requires_grad_() for name, x in views().items()}
        value = loss(**inputs)
        loss.memory_bank.bank.fill_(float("nan"))
        assert_grads.append([value, *torch.autograd.grad(value, inputs.values())])
    for got, want in zip(*assert_grads, strict=True):
        assert error(got, want) <= 1e-5


def test_names_order_defaults_and_state_are_the_originals():
    for name in ("__init__", "forward"):
        a, b = (
            [(p.name, p.default, p.kind) for p in inspect.signature(getattr(m.NTXentLoss, name)).parameters.values()]
            for m in (drop_in, original)
        )
        assert a == b
    ours, theirs = pair(memory_bank_size=(8, D))
    assert isinstance(ours, original.NTXentLoss)
    assert type(ours).__name__ == "NTXentLoss"
    assert ours.temperature == theirs.temperature == 0.5
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("size", [0, (8, D)])
@pytest.mark.parametrize("t", [0.1, -0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_originals(size, t, dtype, autocast):
    ours, theirs = pair(t, size, dtype=torch.float32 if autocast else dtype)
    inputs, exact = views(dtype=dtype), copy.deepcopy(theirs).double()
    truth = exact(**{name: x.double() for name, x in inputs.items()})
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        try:
            want = theirs(**inputs)
        except RuntimeError:  # float64 against a bank of float32; CPU autocast meets its other 16-bit dtype
            assert autocast is not None
            return
        got = ours(**inputs)
    assert got.dtype == want.dtype
    assert error(got, truth) <= max(2 * error(want, truth), 0.02 if autocast or dtype.itemsize == 2 else 1e-6)


@pytest.mark.parametrize("t", [0.2, -0.2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_rounded_once(t, dtype):
    inputs = views(33, 16, dtype)
    exact, gradients = evaluate(original.NTXentLoss(t), {name: x.double() for name, x in inputs.items()})
    got = evaluate(drop_in.NTXentLoss(t), inputs)
    assert error(got[0], exact) <= torch.finfo(dtype).eps / 2
    for name, gradient in gradients.items():
        assert error(got[1][name], gradient) <= 5e-3


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0}, {"temperature": -1e-9}, {"temperature": "0.1"}, {"memory_bank_size": 8},
        {"memory_bank_size": -1}, {"memory_bank_size": (8, -1)}, {"memory_bank_size": (8,)},
        {"memory_bank_size": (8, 4, 2)},
    ],
)  # fmt: skip
def test_a_bad_option_raises_what_the_original_raises(options):
    want = error_of(original.NTXentLoss, **options)
    assert want in (ValueError, TypeError)
    assert error_of(drop_in.NTXentLoss, **options) is want


BAD: dict[str, dict[str, Any]] = {
    "other rows": {"out1": torch.randn(N + 1, D)},
    "one row against many": {"out1": torch.randn(1, D)},
    "other components": {"out1": torch.randn(N, D + 1)},
    "other dtype": {"out1": torch.randn(N, D, dtype=torch.float64)},
    "both double": {"out0": torch.randn(N, D).double(), "out1": torch.randn(N, D).double()},
    "other components than the bank": {"out0": torch.randn(N, D + 1), "out1": torch.randn(N, D + 1)},
    "three dimensions": {"out0": torch.randn(N, 1, D)},
    "one dimension": {"out0": torch.randn(D)},
    "integers": {"out0": torch.ones(N, D).long(), "out1": torch.ones(N, D).long()},
    "a list": {"out1": [[0.0] * D] * N},
    "nothing": {"out0": None},
    "no rows": {"out0": torch.ones(0, D), "out1": torch.ones(0, D)},
    "temperature 0": {"temperature": 0.0},
    "boolean temperature": {"temperature": True},
    "a temperature a row": {"temperature": torch.rand(2 * N, 1)},
    "text for a temperature": {"temperature": "1"},
}
COMPUTED = {  # by the original too, without a bank and with one
    "both double": {0}, "other components than the bank": {0}, "one row against many": {1}, "no rows": {1},
    "temperature 0": {0, 1}, "boolean temperature": {0, 1},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*the original's own code")
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("bank", [0, 1])
def test_bad_input_raises_or_returns_what_the_original_does(what, bank):
    """And the same bank afterwards."""
    ours, theirs = pair(0.2, (8, D) if bank else 0)
    arguments = views() | BAD[what]
    if "temperature" in arguments:
        ours.temperature = theirs.temperature = arguments.pop("temperature")
    results = []
    for loss in (ours, theirs):
        call = {k: x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
                for k, x in arguments.items()}  # fmt: skip
        kind = error_of(lambda: results.append(loss(**call)))  # noqa: B023
        assert (kind is None) == (bank in COMPUTED.get(what, ()))
        results.append(kind)
    assert results[len(results) // 2 - 1] is results[-1]
    assert same_bank(ours, theirs)
    if kind is None:
        torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=0, equal_nan=True)


def test_the_originals_own_code_is_said_once():
    common.say_once.cache_clear()
    ours, theirs = pair(0.2, (8, D))
    inputs = views() | {"out1": torch.randn(1, D)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            got, want = evaluate(ours, inputs), evaluate(theirs, inputs)
            assert torch.equal(got[0], want[0])
            assert same_bank(ours, theirs)
    assert len(caught) == 1
    assert "NTXentLoss runs the original's own code here" in str(caught[0].message)


@both_backends
@pytest.mark.parametrize("t", [0.3, -0.3])
@pytest.mark.parametrize("size", [0, (3, 4)])
def test_gradients_are_those_of_finite_differences(backend, t, size, monkeypatch):
    monkeypatch.setattr(registry, "resolve", lambda *_: backend)
    loss = drop_in.NTXentLoss(memory_bank_size=size).to(DEVICE[backend], torch.float64)

    def call(out0, out1, temperature):
        loss.temperature = temperature
        bank = loss.memory_bank.bank.clone()
        value = loss(out0, out1)
        loss.memory_bank.bank.copy_(bank)
        return value

    temperature = torch.tensor(t, dtype=torch.float64)
    inputs = [x.to(DEVICE[backend]).requires_grad_() for x in (*views(3, 4, torch.float64).values(), temperature)]
    assert torch.autograd.gradcheck(call, inputs)


def compare(rank: int) -> None:
    """Random calls in every process, without a bank and with one, which holds the rows of all processes."""
    monkeypatch = pytest.MonkeyPatch()
    refuse_fallback(monkeypatch, drop_in)
    for seed in range(60):
        draw = random.Random(seed)  # the same in all processes
        torch.manual_seed(1000 * seed + rank)
        dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        n, d, t = draw.randint(2, 16), draw.choice([2, 3, 8, 33]), 10 ** draw.uniform(-1.5, 0.3)
        signed = t * draw.choice([1, 1, -1])
        gather = draw.random() < 0.9
        losses = [at(module, signed, gather_distributed=gather) for module in (drop_in, original)]
        assert_same(*losses, views(n, d, dtype), t)
        if dtype == torch.bfloat16:
            continue
        ours, theirs = pair(signed, (draw.randint(1, 40), d), gather, dtype=dtype)
        for _ in range(3):
            originals = iter([theirs, copy.deepcopy(theirs).double()])
            assert_same(ours, lambda **call: next(originals)(**call), views(n, d, dtype), t)  # noqa: B023
            assert same_bank(ours, theirs)


def test_two_processes_give_what_the_original_gives(tmp_path):
    in_two_processes(compare, tmp_path)
