"""Inputs, the two backends, and comparisons with the float64 oracle, that the tests share."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from oracles.info_nce import info_nce as dense_info_nce
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_infonce import info_nce
from fused_infonce.backends import device as devices
from fused_infonce.backends import plan, registry
from fused_infonce.backends.plan import Plan
from fused_infonce.compose import repeated

try:
    from triton import __version__ as TRITON_VERSION
except ImportError:  # then what needs it is skipped for that
    TRITON_VERSION = "0.0"

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as in conftest
COMPILED = torch.cuda.is_available() and not INTERPRETED
DEVICE = {"torch": "cpu", "triton": "cuda" if COMPILED else "cpu"}
TRITON = pytest.param("triton", marks=pytest.mark.gpu if COMPILED else pytest.mark.interpreter)
newer_interpreter = pytest.mark.skipif(
    INTERPRETED and tuple(map(int, TRITON_VERSION.split(".")[:2])) < (3, 6),
    reason="the interpreter of Triton 3.5 wants strides of 16 elements, not bytes, and shows no launches",
)
both_backends = pytest.mark.parametrize("backend", ["torch", TRITON])


def interpreted(backend: str) -> bool:
    """Return whether calls are slow, so that gradients equal to the dense code's are not held to finite differences."""
    return backend == "triton" and not COMPILED


Inputs = dict[str, Tensor]  # by the names of info_nce's arguments

# The cosine of a query and its positive; the cone's also of any two rows.
PAIRS = {"tight": 0.92, "medium": 0.71, "loose": 0.5}
CONES = {"cone_90": 0.9, "cone_98": 0.98}
KINDS = (*PAIRS, *CONES)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def mix(x: Tensor, y: Tensor, cosine: float) -> Tensor:
    return F.normalize(cosine * x + math.sqrt(1 - cosine**2) * y, dim=-1)


def embeddings(kind: str, n: int, d: int, *negatives: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return unit rows in float64: queries, their positives, and negatives of shape (*negatives, d) if one is given."""
    query = unit(n, d)
    key, negative = mix(query, unit(n, d), PAIRS.get(kind, PAIRS["medium"])), unit(*negatives, d)
    if kind in CONES:
        axis, root = unit(d), math.sqrt(CONES[kind])
        query, key, negative = (mix(axis.expand_as(x), x, root) for x in (query, key, negative))
    return query, key, negative if negatives else None


def two(n=6, d=4, backend="torch", **kwargs):
    """Return queries and keys of a small call, in float64, on the device of the backend."""
    return (torch.randn(n, d, dtype=torch.float64, device=DEVICE[backend], **kwargs) for _ in range(2))


def stretch(x: Tensor, low: float, high: float) -> Tensor:
    """Return the rows with norms spread evenly between low and high on a logarithmic scale."""
    exponent = torch.empty(x.shape[:-1], dtype=x.dtype).uniform_(math.log(low), math.log(high))
    return x * exponent.exp()[..., None]


def call_of(n, d, kind="medium", dtype=torch.float32, t=0.1, negatives=()):
    """Return the inputs of a call, with the temperature as a tensor."""
    query, key, extra = (None if x is None else x.to(dtype) for x in embeddings(kind, n, d, *negatives))
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"query": query, "positive_key": key, "temperature": torch.tensor(t, dtype=stats)}
    return inputs if extra is None else inputs | {"negative_keys": extra}


def error(got: Tensor, want: Tensor) -> float:
    """Return the Frobenius-relative error; not finite if only one is NaN somewhere or infinite, or only `want` is 0."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape
    if torch.equal(got.isnan(), want.isnan()):
        got, want = got.nan_to_num(0.0, math.inf, -math.inf), want.nan_to_num(0.0)
    difference = (got - want).norm()
    return (difference / want.norm()).item() if want.norm() else (math.inf if difference else 0.0)


def differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def evaluate(
    function: Callable[..., Tensor], inputs: Inputs, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Inputs]:
    """Return the loss and the gradients of every floating tensor among `inputs`, none of which is copied."""
    leaves = {name: x.detach().requires_grad_() if differentiable(x) else x for name, x in inputs.items()}
    loss = function(**leaves, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss))
    return loss.detach(), {name: x.grad for name, x in leaves.items() if differentiable(x)}


def oracle(inputs: Inputs, upstream: Tensor | None = None, **options: Any) -> tuple[Tensor, Inputs]:
    """Return the loss and the gradients of dense InfoNCE, which shares no code with ours, in float64."""
    exact = {name: x.cpu().double() if differentiable(x) else x.cpu() for name, x in inputs.items()}
    upstream = None if upstream is None else upstream.cpu()
    return evaluate(dense_info_nce, exact, upstream, **options)


def both(functions: Sequence[Callable[..., Tensor]], inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Pair the values, and each gradient for one upstream gradient, of two functions of the same inputs."""
    results = []
    for function in functions:
        value = function(*inputs)
        upstream = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
        results.append([value, *torch.autograd.grad(value, inputs, upstream)])
    return zip(*results, strict=True)


def elsewhere(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of a GPU, without a GPU and hence without values: to read one raises."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


def on(device: str, inputs: Inputs) -> Inputs:
    return {name: x.to(device) for name, x in inputs.items()}


MANY_ROWS = 2048


def bounds(dtype: torch.dtype, temperature: float, rows: int = 0) -> tuple[float, float]:
    """Return the largest errors that are allowed of the loss and of the gradients.

    16-bit inputs are held to a loss error of 1e-5, except under t = 0.02 with few rows, where a handful of logits
    decide the loss and the rounding of a float32 dot product alone may exceed that (docs/notes.md): there to what
    float32 inputs, whose accumulators they share, are held to.
    """
    if dtype == torch.float64:
        return 1e-12, 1e-10
    single = 1e-5 * max(1, 0.05 / temperature)
    if dtype == torch.float32:
        return single, single
    return 1e-5 if temperature >= 0.02 or rows >= MANY_ROWS else single, 5e-3


def loss_scale(dtype: torch.dtype, gradients: Iterable[Tensor]) -> float:
    """Return a loss scale that brings float16 gradients well inside their range; 1 for other dtypes."""
    largest = max((g.abs().max().item() for g in gradients if g.numel()), default=0.0)
    return 2.0 ** math.floor(math.log2(512 / largest)) if dtype == torch.float16 and largest else 1.0


def assert_close(
    got: tuple[Tensor, Inputs], want: tuple[Tensor, Inputs], dtype: torch.dtype, temperature: float, scale: float = 1.0
) -> None:
    """Assert that `got`, whose gradients are `scale` times larger, is within the bounds of `want`."""
    loss_bound, gradient_bound = bounds(dtype, temperature, len(want[1].get("query", ())))
    failed = {"loss": (error(got[0], want[0]), loss_bound)}
    for name, exact in want[1].items():
        bound = 1e-4 if name == "temperature" and dtype != torch.float64 else gradient_bound
        if dtype == torch.float16 and name != "temperature":  # one scale may leave some tensor's gradients subnormal
            bound = max(bound, 2 * error((exact * scale).half(), exact * scale))
        failed[name] = (error(got[1][name].double() / scale, exact), bound)
    failed = {name: (e, bound) for name, (e, bound) in failed.items() if not e <= bound}  # NaN fails
    assert not failed, f"(error, bound): {failed}"


def check(
    backend: str, inputs: Inputs, weights: Tensor | None = None, *, workspace_limit: int | None = None, **options: Any
) -> tuple[Tensor, Inputs]:
    """Assert the bounds of a call against the oracle, and return the oracle's loss and gradients.

    weights: the upstream gradient. That of float16 inputs carries a loss scale besides.
    """
    dtype, device = inputs["query"].dtype, DEVICE[backend]
    t = inputs.get("temperature", options.get("temperature", 0.1))
    t = t.min().item() if isinstance(t, Tensor) and t.numel() else float(t) if not isinstance(t, Tensor) else 0.1
    want = oracle(inputs, weights, **options)
    scale = loss_scale(dtype, (g for name, g in want[1].items() if name != "temperature"))
    upstream = (torch.ones_like(want[0]) if weights is None else weights.double()) * scale
    options["workspace_limit"] = workspace_limit
    loss, gradients = evaluate(info_nce, on(device, inputs), upstream.to(device), backend=backend, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == want[0].shape
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype, name
    assert_close((loss, gradients), want, dtype, t, scale)
    return want


FACTORS: dict[str, Sequence[Any]] = {
    "normalize": [True, False],
    "temperature": ["float", "scalar", "per row"],
    "negatives": [None, "unpaired", "paired"],
    "in_batch": [None, True, False],
    "symmetric": [False, True],
    "target": [False, True],
    "ids": [None, "keys", "queries and keys", "queries and negatives"],
    "reduction": ["mean", "sum", "none"],
}


def valid(case: dict[str, Any]) -> bool:
    """Return whether a choice of FACTORS is a call that is accepted."""
    if case["negatives"] is None and (case["in_batch"] is False or case["ids"] == "queries and negatives"):
        return False
    return not (case["symmetric"] and case["target"])


def make_call(
    n: int, m: int, d: int, h: int, dtype: torch.dtype = torch.float64, t: float = 0.3, *, normalize: bool,
    temperature: str, negatives: str | None, in_batch: bool | None, symmetric: bool, target: bool, ids: str | None,
    reduction: str,
) -> tuple[Inputs, dict[str, Any]]:  # fmt: skip
    """Return the inputs and the options of `info_nce` for a valid choice of FACTORS.

    There are n queries, m keys (n without a target) and h negatives, all of length d, with a mean temperature of about
    t. Ids and targets repeat, and some targets are ignored.
    """
    m = m if target else n
    shapes = {"query": (n, d), "positive_key": (m, d)}
    if negatives:
        shapes["negative_keys"] = (n, h, d) if negatives == "paired" else (h, d)
    inputs = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    options: dict[str, Any] = {"normalize": normalize, "symmetric": symmetric, "reduction": reduction}
    options |= {"negative_mode": negatives or "unpaired", "in_batch_negatives": in_batch}
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    if temperature == "float":
        options["temperature"] = t
    else:
        inputs["temperature"] = torch.empty(n if temperature == "per row" else (), dtype=stats).uniform_(
            0.7 * t, 1.4 * t
        )
    if target:
        inputs["target"] = torch.randint(m, (n,)) if m else torch.full((n,), -100)
        inputs["target"][torch.rand(n) < 0.2] = -100
    if ids is not None:
        some = max(n // 3, 2)
        sizes = {"query_ids": (n,), "key_ids": (m,), "negative_ids": (*shapes.get("negative_keys", (0,))[:-1],)}
        wanted = {f"{name.removesuffix('s').replace('querie', 'query')}_ids" for name in ids.split(" and ")}
        wanted |= {"negative_ids"} if negatives else set()
        inputs |= {name: torch.randint(some, size) for name, size in sizes.items() if name in wanted}
    return inputs, options


def forget_plans() -> None:
    """Forget all plans, and the facts that they rest on: what the environment says of the workspace is one."""
    registry.remembered.clear()
    repeated.remembered.clear()
    devices._FACTS.clear()


def set_limit(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the environment say this of the workspace, as it would before the first call."""
    monkeypatch.setenv(plan.LIMIT_VARIABLE, text)
    forget_plans()


class Forgetful(dict[Any, Any]):
    """A dictionary that stays empty."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def watch_plans(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Plan]:
    """Return a list that the plans of all later calls are added to, and change these fields of each plan."""
    plans: list[Plan] = []

    def choose(**arguments: Any) -> Plan:
        plans.append(dataclasses.replace(plan.choose(**arguments), **changes))
        return plans[-1]

    monkeypatch.setattr(registry, "choose", choose)
    monkeypatch.setattr(registry, "remembered", Forgetful())
    monkeypatch.setattr(repeated, "remembered", Forgetful())
    return plans


def pairwise(
    factors: dict[str, Sequence[Any]], valid: Callable[[dict[str, Any]], bool] = lambda _: True
) -> Iterator[dict[str, Any]]:
    """Yield few valid combinations, among them every pair of values of two factors that any valid one has."""
    names, levels = tuple(factors), [tuple(values) for values in factors.values()]
    numbers = [range(len(values)) for values in levels]
    choices = [choice for choice in itertools.product(*numbers) if valid(_chosen(names, levels, choice))]
    # A pair of values is a bit of one number: choices are many, and each is counted again and again.
    first = list(itertools.accumulate([0, *map(len, levels)]))
    width = first[-1]
    pairs = []
    for choice in choices:
        values = [start + number for start, number in zip(first, choice, strict=False)]
        pairs.append(sum(1 << (a * width + b) for a, b in itertools.combinations(values, 2)))
    missing = 0
    for of_one in pairs:
        missing |= of_one
    # The one with the most missing pairs, the first of several: counts only fall, so that an old one is an upper bound.
    queue = [(-of_one.bit_count(), i) for i, of_one in enumerate(pairs)]
    heapq.heapify(queue)
    while missing:
        bound, best = queue[0]
        count = (pairs[best] & missing).bit_count()
        if count != -bound:
            heapq.heapreplace(queue, (-count, best))
            continue
        missing &= ~pairs[best]
        yield _chosen(names, levels, choices[best])


def _chosen(names: Sequence[str], levels: Sequence[Sequence[Any]], choice: Sequence[int]) -> dict[str, Any]:
    return {name: values[number] for name, values, number in zip(names, levels, choice, strict=True)}


def name_of(value: Any) -> str:
    return value.name if isinstance(value, Plan) else str(value).removeprefix("torch.").strip("()").replace(", ", "x")


def every_pair(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise over few combinations of the factors, among them every pair of values of two of them."""
    found = [(*case.values(),) for case in pairwise(factors)]
    return pytest.mark.parametrize(tuple(factors), found, ids=["-".join(map(name_of, case)) for case in found])


def cases(
    valid: Callable[[dict[str, Any]], bool] = lambda _: True,
    pairs: bool | Literal["torch"] = False,
    together: bool = False,
    **factors: Sequence[Any],
) -> pytest.MarkDecorator:
    """Parametrise over the backends and every valid combination of the factors.

    pairs: only combinations that cover all pairs of values, as always in the interpreter, which is slow; "torch": in
    PyTorch too, which knows no tiles, and all of them on a GPU.
    together: pass the factors as one dictionary, `case`.
    """

    def params(backend: str, mark: Any, pairs: bool) -> Iterator[Any]:
        product = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
        for case in pairwise(factors, valid) if pairs else filter(valid, product):
            name = "-".join(map(name_of, (backend, *case.values())))
            yield pytest.param(backend, *([case] if together else case.values()), marks=mark, id=name)

    every = [*params("torch", (), bool(pairs)), *params("triton", TRITON.marks, pairs is True or not COMPILED)]
    return pytest.mark.parametrize(("backend", *(["case"] if together else factors)), every)
