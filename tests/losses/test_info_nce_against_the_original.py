"""Against info-nce-pytorch 0.1.4, whose contract the functions keep, and the documented improvements on it."""

import itertools
from typing import Any

import pytest
import torch
from support.helpers import DEVICE, both_backends, bounds, cases, elsewhere, error, evaluate, on

import fused_infonce
from fused_infonce import FusedInfoNCELoss

original = pytest.importorskip("info_nce", reason="info-nce-pytorch is not installed")

N, D, H = 9, 6, 5
MODES = ["in-batch", "unpaired", "paired"]


def random_call(mode, n=N, d=D, h=H, dtype=torch.float64):
    inputs = {"query": torch.randn(n, d, dtype=dtype), "positive_key": torch.randn(n, d, dtype=dtype)}
    if mode != "in-batch":
        inputs["negative_keys"] = torch.randn((n, h, d) if mode == "paired" else (h, d), dtype=dtype)
    return inputs, {} if mode == "in-batch" else {"negative_mode": mode}


def assert_equal(backend, inputs, options, t, dtype):
    """Loss and gradients; `inputs` are float64 numbers that `dtype` holds."""
    want = evaluate(original.info_nce, inputs, temperature=t, **options)
    inputs = on(DEVICE[backend], {name: x.to(dtype) for name, x in inputs.items()})
    got = evaluate(fused_infonce.info_nce, inputs, temperature=t, backend=backend, **options)
    assert got[0].dtype == dtype
    loss_bound, gradient_bound = bounds(dtype, t)
    if dtype == torch.float64:  # theirs is logsumexp - positive, which has an absolute error of about 1e-16 / t
        loss_bound = gradient_bound = 1e-9
    assert error(got[0], want[0]) <= loss_bound
    for name, x in want[1].items():
        assert error(got[1][name], x) <= gradient_bound, name


@cases(
    mode=MODES,
    reduction=["mean", "sum", "none"],
    t=[0.05, 0.1, 1.0],
    dtype=[torch.float32, torch.float64],
    sizes=[(9, 6, 5), (2, 3, 1), (33, 17, 8)],
)
def test_losses_and_gradients_are_the_originals(backend, mode, reduction, t, dtype, sizes):
    inputs, options = random_call(mode, *sizes, dtype=torch.float32)
    inputs = {name: x.double() for name, x in inputs.items()}
    assert_equal(backend, inputs, options | {"reduction": reduction}, t, dtype)


@both_backends
@pytest.mark.parametrize("mode", MODES)
def test_defaults_and_positional_order_are_the_originals(backend, mode):
    """Every prefix of the positional arguments, of the function and of the module."""
    inputs, _ = random_call(mode)
    arguments = [inputs["query"], inputs["positive_key"], inputs.get("negative_keys"), 0.3, "sum", "paired"]
    arguments = arguments if mode == "paired" else [*arguments[:5], "unpaired"]
    move = [x.to(DEVICE[backend]) if isinstance(x, torch.Tensor) else x for x in arguments]
    for used in [6] if mode == "paired" else range(3, 7):
        want = original.info_nce(*arguments[:used])
        got = fused_infonce.info_nce(*move[:used], backend=backend)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=0)
        module = FusedInfoNCELoss(*arguments[3:used], backend=backend)
        want = original.InfoNCE(*arguments[3:used])(*arguments[:3])
        torch.testing.assert_close(module(*move[:3]).cpu(), want, rtol=1e-12, atol=0)


def test_import_as_the_original():
    from fused_infonce import FusedInfoNCELoss as InfoNCE

    query, key = torch.randn(2, N, D)
    torch.testing.assert_close(InfoNCE()(query, key), original.InfoNCE()(query, key), rtol=1e-6, atol=0)


VALID: dict[str, Any] = {"query": (N, D), "positive_key": (N, D)}
INVALID: dict[str, dict[str, Any]] = {  # the eight conditions, shapes by argument
    "query is not 2-d": {"query": (N, 2, D)},
    "positive_key is not 2-d": {"positive_key": (N, 2, D)},
    "unpaired negatives are not 2-d": {"negative_keys": (N, H, D)},
    "paired negatives are not 3-d": {"negative_keys": (H, D), "negative_mode": "paired"},
    "positive_key has other rows": {"positive_key": (N + 1, D)},
    "paired negatives have other rows": {"negative_keys": (N + 1, H, D), "negative_mode": "paired"},
    "positive_key has other components": {"positive_key": (N, D + 1)},
    "negatives have other components": {"negative_keys": (H, D + 1)},
}  # fmt: skip


@both_backends
@pytest.mark.parametrize("condition", INVALID)
def test_the_originals_eight_errors_name_the_argument_and_what_came(backend, condition):
    options = VALID | INVALID[condition]
    arguments = {k: torch.randn(v) if isinstance(v, tuple) else v for k, v in options.items()}
    with pytest.raises(ValueError):
        original.info_nce(**arguments)
    arguments = {k: v.to(DEVICE[backend]) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    wrong = next(name for name in INVALID[condition] if name != "negative_mode")
    with pytest.raises(ValueError, match=rf"{wrong} must have .*got") as caught:
        fused_infonce.info_nce(**arguments, backend=backend)
    shape = arguments[wrong].shape
    assert any(str(size) in str(caught.value) for size in shape), "what came is not said"


# (arguments that replace the valid ones, class, what the message says is expected, what came)
IMPROVED = {
    "reduction": ({"reduction": "median"}, ValueError, "'mean', 'sum', 'none'", "'median'"),
    "reduction=None": ({"reduction": None}, ValueError, "'mean', 'sum', 'none'", "None"),
    "negative_mode": ({"negative_mode": "pared"}, ValueError, "'unpaired', 'paired'", "'pared'"),
    "backend": ({"backend": "cuda"}, ValueError, "'auto', 'triton', 'torch', 'reference'", "'cuda'"),
    "zero temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive and finite", "0.0"),
    "negative temperature": ({"temperature": -0.1}, ValueError, "positive and finite", "-0.1"),
    "infinite temperature": ({"temperature": float("inf")}, ValueError, "positive and finite", "inf"),
    "NaN temperature": ({"temperature": float("nan")}, ValueError, "positive and finite", "nan"),
    "a string": ({"temperature": "0.1"}, TypeError, "temperature must be a number", "str"),
    "a boolean": ({"temperature": True}, TypeError, "temperature must be a number", "bool"),
    "no temperature": ({"temperature": None}, TypeError, "temperature must be a number", "NoneType"),
    "a bad tensor": ({"temperature": torch.tensor(-1.0)}, ValueError, "positive and finite", "-1.0"),
    "one bad row": ({"temperature": torch.arange(N) / N}, ValueError, "positive and finite", "0.0"),
    "an integer tensor": ({"temperature": torch.tensor(1)}, TypeError, "temperature must be", "torch.int64"),
    "a temperature a column": ({"temperature": torch.ones(1, N)}, ValueError, f"({N},) or ({N}, 1)", f"(1, {N})"),
    "temperatures of too few rows": ({"temperature": torch.ones(N - 1)}, ValueError, f"({N},)", f"({N - 1},)"),
    "integer queries": ({"query": torch.ones(N, D, dtype=torch.int64)}, TypeError, "query must be float16", "int64"),
    "complex keys": (
        {"positive_key": torch.ones(N, D, dtype=torch.complex64)}, TypeError,
        "positive_key must be float16", "complex64",
    ),
    "boolean negatives": (
        {"negative_keys": torch.ones(H, D, dtype=torch.bool)}, TypeError, "negative_keys must be float16", "torch.bool",
    ),
    "an array": ({"query": [[1.0] * D] * N}, TypeError, "query must be a tensor", "list"),
    "no key": ({"positive_key": None}, TypeError, "positive_key must be a tensor", "NoneType"),
    "mixed dtypes": (
        {"positive_key": torch.ones(N, D, dtype=torch.float16)}, TypeError,
        "positive_key must be torch.float32", "float16",
    ),
    "mixed negatives": (
        {"negative_keys": torch.ones(H, D, dtype=torch.float64)}, TypeError,
        "negative_keys must be torch.float32", "float64",
    ),
    "mixed devices": (
        {"positive_key": elsewhere(N, D)}, ValueError, "positive_key must be on cpu", "cuda:0",
    ),
    "negatives elsewhere": (
        {"negative_keys": elsewhere(H, D)}, ValueError, "negative_keys must be on cpu", "cuda:0",
    ),
    "temperatures elsewhere": (
        {"temperature": elsewhere(N)}, ValueError, "temperature must be on cpu", "cuda:0",
    ),
    "target elsewhere": (
        {"target": elsewhere(N, dtype=torch.int64)}, ValueError, "target must be on cpu", "cuda:0",
    ),
    "target dtype": ({"target": torch.zeros(N)}, TypeError, "target must be an integer tensor", "torch.float32"),
    "target shape": ({"target": torch.zeros(N, 1, 1).long()}, ValueError, f"must have shape ({N},)", f"({N}, 1, 1)"),
    "target too large": ({"target": torch.arange(N) + 1}, ValueError, f"target must be in [0, {N})", f"{N}"),
    "target below 0": ({"target": torch.arange(N) - 1}, ValueError, f"target must be in [0, {N})", "-1"),
    "ids": ({"key_ids": torch.zeros(N + 1).long()}, ValueError, f"key_ids must have shape ({N},)", f"({N + 1},)"),
    "ids dtype": ({"key_ids": torch.zeros(N)}, TypeError, "key_ids must be an integer tensor", "torch.float32"),
    "workspace": ({"workspace_limit": 0}, ValueError, "workspace_limit must be a number of bytes", "0"),
    "workspace type": ({"workspace_limit": 1.5}, TypeError, "workspace_limit must be an integer number", "float"),
}  # fmt: skip


@pytest.mark.parametrize("what", IMPROVED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_the_original_lets_pass_is_refused_with_what_came(what, backend):
    """On one CPU backend and the reference: checks come before any backend is chosen."""
    replaced, kind, expected, came = IMPROVED[what]
    arguments = {"query": torch.ones(N, D), "positive_key": torch.ones(N, D), "backend": backend} | replaced
    with pytest.raises(kind) as caught:
        fused_infonce.info_nce(**arguments)
    before, _, after = str(caught.value).partition("got ")
    assert expected in before
    assert came in after


@both_backends
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_return_a_float32_loss(backend, mode, dtype):
    inputs, options = random_call(mode, dtype=dtype)
    want = original.info_nce(**{name: x.double() for name, x in inputs.items()}, **options)
    rounded = original.info_nce(**inputs, **options)
    loss, gradients = evaluate(fused_infonce.info_nce, on(DEVICE[backend], inputs), backend=backend, **options)
    assert rounded.dtype == dtype
    assert loss.dtype == torch.float32
    assert error(loss, want) <= 1e-5 < error(rounded, want)
    assert all(g.dtype == dtype for g in gradients.values())


@both_backends
@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_an_n_vector_is_a_temperature_per_row(backend, shape):
    """info-nce-pytorch divides the columns by (N,), and the rows only by (N, 1)."""
    (inputs, _), t = random_call("in-batch"), torch.rand(N, dtype=torch.float64) + 0.1
    by_row = original.info_nce(**inputs, temperature=t[:, None])
    by_column = original.info_nce(**inputs, temperature=t)
    call = on(DEVICE[backend], inputs | {"temperature": t.reshape(shape)})
    got = fused_infonce.info_nce(**call, backend=backend).cpu()
    torch.testing.assert_close(got, by_row, rtol=1e-12, atol=0)
    assert abs(by_row - by_column) > 1e-3


def test_temperatures_that_do_not_fit_are_named():
    query, key = torch.randn(2, N, D)
    for shape in itertools.chain([(N + 1,), (1, N), (N, 2), (0,), (N, 1, 1)]):
        with pytest.raises(ValueError, match="one value per row"):
            fused_infonce.info_nce(query, key, temperature=torch.ones(shape))
