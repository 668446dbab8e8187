"""compat.info_nce against info-nce-pytorch."""

from __future__ import annotations

import inspect
import random
import warnings
from typing import Any

import pytest
import torch
from support.helpers import error, evaluate
from support.libraries import library, seeds
from support.side_by_side import assert_same, error_of, refuse_fallback

original = library("info_nce")

from fused_infonce.compat import common  # noqa: E402
from fused_infonce.compat import info_nce as drop_in  # noqa: E402

N, D, H = 6, 5, 4
MODES = ["in-batch", "unpaired", "paired"]


def call(mode: str, n: int = N, d: int = D, h: int = H, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A key is near its query, and all embeddings point more or less one way."""
    query = torch.randn(n, d) + torch.randn(d)
    inputs = {"query": query, "positive_key": query + torch.randn(n, d)}
    if mode != "in-batch":
        inputs["negative_keys"] = torch.randn((n, h, d) if mode == "paired" else (h, d)) + query.mean(0)
    return {name: x.to(dtype) for name, x in inputs.items()}


def options_of(mode: str) -> dict[str, Any]:
    return {"negative_mode": "paired"} if mode == "paired" else {}


@pytest.mark.parametrize("seed", seeds(440))
def test_equals_the_original(seed, monkeypatch):
    """Shapes, modes, reductions, temperatures of every kind, dtypes; as a function and as a module."""
    refuse_fallback(monkeypatch, drop_in)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    mode, reduction = draw.choice(MODES), draw.choice(["mean", "sum", "none"])
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    n, d, h = draw.randint(1, 40), draw.choice([2, 3, 8, 17, 64]), draw.randint(0 if mode == "unpaired" else 1, 30)
    t = 10 ** draw.uniform(-1.7, 0.3)
    inputs, options = call(mode, n, d, h, dtype), {"reduction": reduction, **options_of(mode)}
    kind = draw.choice(["float", "scalar", "one element", "a row each"])
    if kind == "float":
        options["temperature"] = t
    else:
        shape = {"scalar": (), "one element": (1,), "a row each": (n, 1)}[kind]
        inputs["temperature"] = torch.empty(shape).uniform_(t, 1.5 * t).to(torch.promote_types(dtype, torch.float32))
    upstream = torch.rand(n).bfloat16() if reduction == "none" else None  # which every dtype holds

    def module(query, positive_key, negative_keys=None, **rest):
        return drop_in.InfoNCE(**rest)(query, positive_key, negative_keys)

    ours = draw.choice([drop_in.info_nce, module])
    assert_same(ours, original.info_nce, inputs, t, upstream=upstream, **options)


def test_names_order_and_defaults_are_the_originals():
    for ours, theirs in ((drop_in.info_nce, original.info_nce), (drop_in.InfoNCE, original.InfoNCE),
                         (drop_in.InfoNCE.forward, original.InfoNCE.forward)):  # fmt: skip
        a, b = ([(p.name, p.default, p.kind) for p in inspect.signature(x).parameters.values()] for x in (ours, theirs))
        assert a == b
    assert isinstance(drop_in.InfoNCE(), original.InfoNCE)
    assert type(drop_in.InfoNCE()).__name__ == "InfoNCE"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_originals(mode, dtype, autocast):
    """Also of a temperature tensor, which widens the original's logits where it has dimensions."""
    inputs, options = call(mode, dtype=dtype), options_of(mode)
    shapes = [(), (1,), (N, 1)]
    temperatures = [0.1, *(torch.full(shape, 0.1, dtype=d) for shape in shapes for d in (dtype, torch.float64))]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        for t in temperatures:
            try:
                want = original.info_nce(**inputs, temperature=t, **options)
            except RuntimeError:  # CPU autocast meets its other 16-bit dtype
                assert autocast is not None
                continue
            got = drop_in.info_nce(**inputs, temperature=t, **options)
            assert got.dtype == want.dtype
            assert error(got, want) <= (0.1 if autocast or dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_rounded_once(mode, dtype):
    inputs, options = call(mode, 33, 16, 20, dtype=dtype), options_of(mode)
    exact, gradients = evaluate(original.info_nce, {name: x.double() for name, x in inputs.items()}, **options)
    got = evaluate(drop_in.info_nce, inputs, **options)
    assert error(got[0], exact) <= torch.finfo(dtype).eps / 2
    for name, gradient in gradients.items():
        assert error(got[1][name], gradient) <= 5e-3


# Arguments that replace those of a good call; "mode" says which one.
BAD: dict[str, dict[str, Any]] = {
    "query is not 2-d": {"query": torch.randn(N, 2, D)},
    "key is not 2-d": {"positive_key": torch.randn(D)},
    "unpaired negatives are not 2-d": {"negative_keys": torch.randn(N, H, D)},
    "paired negatives are not 3-d": {"negative_keys": torch.randn(H, D), "negative_mode": "paired"},
    "key has other rows": {"positive_key": torch.randn(N + 1, D)},
    "paired negatives have other rows": {"negative_keys": torch.randn(N + 1, H, D), "negative_mode": "paired"},
    "key has other components": {"positive_key": torch.randn(N, D + 1)},
    "negatives have other components": {"negative_keys": torch.randn(H, D + 1)},
    "reduction": {"reduction": "median"},
    "no reduction": {"reduction": None},
    "mode with negatives": {"negative_mode": "pared", "negative_keys": torch.randn(H, D)},
    "mode without negatives": {"negative_mode": "pared"},
    "zero temperature": {"temperature": 0.0},
    "negative temperature": {"temperature": -0.2},
    "boolean temperature": {"temperature": True},
    "text for a temperature": {"temperature": "0.1"},
    "no temperature": {"temperature": None},
    "integer temperature tensor": {"temperature": torch.tensor(1)},
    "negative temperature tensor": {"temperature": torch.tensor(-0.2)},
    "a temperature a column": {"temperature": torch.rand(N) + 0.1},
    "a temperature a column, 2-d": {"temperature": torch.rand(1, N) + 0.1},
    "a temperature a logit": {"temperature": torch.rand(N, N) + 0.1},
    "temperatures that do not fit": {"temperature": torch.rand(N + 1) + 0.1},
    "temperature of 3 dimensions": {"temperature": torch.ones(1, 1, 1)},
    "integers": {"query": torch.ones(N, D, dtype=torch.int64)},
    "complex keys": {"positive_key": torch.ones(N, D, dtype=torch.complex64)},
    "a list": {"query": [[1.0] * D] * N},
    "no key": {"positive_key": None},
    "mixed dtypes": {"positive_key": torch.randn(N, D, dtype=torch.float64)},
    "mixed dtypes that meet elementwise only": {
        "positive_key": torch.randn(N, D, dtype=torch.float64), "negative_keys": torch.randn(H, D),
    },
    "no rows": {"query": torch.randn(0, D), "positive_key": torch.randn(0, D)},
    "no rows, by row": {"query": torch.randn(0, D), "positive_key": torch.randn(0, D), "reduction": "none"},
}  # fmt: skip
COMPUTED = {  # by the original too
    "mode without negatives", "zero temperature", "negative temperature", "boolean temperature",
    "integer temperature tensor", "negative temperature tensor", "a temperature a column",
    "a temperature a column, 2-d", "a temperature a logit", "mixed dtypes that meet elementwise only", "no rows",
    "no rows, by row",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*the original's own code")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_or_returns_what_the_original_does(what):
    """Of the same class, or what the original computes of such input."""
    arguments = call("in-batch") | BAD[what]
    want = error_of(original.info_nce, **arguments)
    assert (want is None) == (what in COMPUTED)
    assert error_of(drop_in.info_nce, **arguments) is want
    if want is None:
        got, value = drop_in.info_nce(**arguments), original.info_nce(**arguments)
        assert got.dtype == value.dtype
        torch.testing.assert_close(got, value, rtol=1e-6, atol=0, equal_nan=True)


def test_an_error_says_what_ours_expected():
    with pytest.raises(ValueError) as caught:
        drop_in.info_nce(torch.randn(N, D), torch.randn(N + 1, D))
    assert "must have 6 rows as query has" in str(caught.value.__context__)


def test_the_originals_own_code_is_said_once():
    common.say_once.cache_clear()
    inputs = call("in-batch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in (-0.2, -0.2, -0.3):
            want = evaluate(original.info_nce, inputs, temperature=t)
            got = evaluate(drop_in.info_nce, inputs, temperature=t)
            assert torch.equal(got[0], want[0])
            assert all(torch.equal(got[1][name], want[1][name]) for name in inputs)
    assert [str(w.message) for w in caught] == [
        "info_nce runs the original's own code here, with its memory: temperature must be positive and finite, also in "
        "float32"
    ]
