"""`torch.compile(fullgraph=True)`: same values and gradients as eager, through operators that pass `opcheck`."""

from __future__ import annotations

import pytest
import torch

from fused_infonce import FusedInfoNCELoss, NTXentLoss, info_nce, siglip_loss
from fused_infonce.backends import Options, operators, plan, plan_of
from fused_infonce.backends.contract import KeySet, Problem, Temperature

N, D, H = 33, 16, 3


def embeddings(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


OPTIONS = {
    "default": {},
    "symmetric": {"symmetric": True},
    "rows": {"reduction": "none"},
    "paired": {"negative_mode": "paired", "in_batch_negatives": True},
    "ids": {"key_ids": torch.arange(N) % 7},
    "target": {"target": torch.arange(N).flip(0)},
    "per row": {"temperature": torch.linspace(0.05, 0.2, N)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_compiled_equals_eager(name: str, backend: str) -> None:
    options = {"temperature": 0.07, "backend": backend, **OPTIONS[name]}
    inputs = [embeddings(N, D), embeddings(N, D)]
    if options.get("negative_mode"):
        inputs.append(embeddings(N, H, D))

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return info_nce(*tensors, **options)

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(*inputs)
        results.append((value, *torch.autograd.grad(value.sum(), inputs)))
    for eager, compiled in zip(*results, strict=True):
        if name == "target":  # whether every row has one is read outside only, and decides where the mean divides
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(eager, compiled)


def test_a_learnable_temperature_compiles_for_changing_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "DENSE", 0)  # a learnable temperature is read outside only, and plans with it
    torch._dynamo.reset()
    loss = FusedInfoNCELoss(0.05, learnable_temperature=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (8, 24, 40):
        query, key = embeddings(n, D), embeddings(n, D)
        expected = torch.autograd.grad(loss(query, key), (query, loss.logit_scale))
        actual = torch.autograd.grad(compiled(query, key), (query, loss.logit_scale))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_compiled_nt_xent_equals_eager() -> None:
    torch._dynamo.reset()
    loss = NTXentLoss(0.1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = embeddings(N, D), embeddings(N, D)
    for x, y in zip(*(torch.autograd.grad(f(a, b), (a, b)) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(x, y)


def test_queries_that_are_the_keys_compile() -> None:
    torch._dynamo.reset()
    x = embeddings(N, D)
    compiled = torch.compile(info_nce, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x, x), x)[0] for f in (compiled, info_nce)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_schedule_of_temperatures_compiles(dynamic: bool | None) -> None:
    """Numbers, which become symbolic when they change."""
    torch._dynamo.reset()
    loss = FusedInfoNCELoss(0.1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    query, key = embeddings(N, D), embeddings(N, D)
    for t in (0.1, 0.2, 0.3):
        loss.temperature = t
        torch.testing.assert_close(*(torch.autograd.grad(f(query, key), query)[0] for f in (compiled, loss)))


@pytest.mark.parametrize("loss", [lambda q, k: info_nce(q, k, q), lambda q, k: siglip_loss(q, k, 3.0)])
def test_one_row_compiles(loss) -> None:
    """Whose weight is one for all rows and one a row at once."""
    torch._dynamo.reset()
    query, key = embeddings(1, D), embeddings(1, D)
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(query, key)
    assert torch.equal(value, loss(query, key))
    torch.testing.assert_close(*(torch.autograd.grad(x, query)[0] for x in (value, loss(query, key))))


@pytest.mark.parametrize("columns", [False, True])
def test_operators_pass_opcheck(columns: bool) -> None:
    keys = tuple(KeySet(torch.randn(shape)) for shape in ((N, D), (5, D), (N, H, D)))
    problem = Problem(KeySet(torch.randn(N, D)), keys, Temperature(torch.tensor([0.1])), columns=columns)
    # full: opcheck compares results with `==`, which a mean that nobody asked for, NaN, would fail
    chosen = plan_of(problem, Options("torch"), reduced=False, full=True)
    flat = operators.flatten(problem, chosen)
    torch.library.opcheck(operators.statistics, flat)
    stats = operators.statistics(*flat)
    upstream = [torch.randn(N), torch.randn(N), torch.randn(N) if columns else None]
    codes = [operators.DTYPES.index(dtype) for dtype in (torch.float32, None, torch.bfloat16, torch.float32)]
    torch.library.opcheck(operators.gradients, (*flat, stats, upstream, codes))
    if not columns:
        weight = torch.full((1,), 1 / N)
        wanted = [True, False, True, True, True]
        torch.library.opcheck(operators.onepass, (*flat, "infonce", weight, wanted))


def test_the_operator_of_sigmoids_passes_opcheck() -> None:
    keys = tuple(KeySet(torch.randn(size, D)) for size in (N, 5))
    problem = Problem(KeySet(torch.randn(N, D)), keys, Temperature(torch.tensor([0.1])))
    bias = torch.tensor([-1.0])
    flat = operators.flatten(problem, plan_of(problem, Options("torch"), reduced=True, bias=bias))
    for weight, wanted in ((torch.full((1,), 1 / N), [True, False, True, True, False]), (torch.rand(N), [False] * 5)):
        torch.library.opcheck(operators.sigmoids, (*flat, bias, weight, wanted))


@pytest.mark.parametrize("name", ["dense", "onepass"])
@pytest.mark.parametrize("columns", [False, True])
def test_one_pass_operator_passes_opcheck(name: str, columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "DENSE", 2**18 if name == "dense" else 0)
    inputs = [torch.randn(N, D, requires_grad=True) for _ in range(2)]
    query, key = map(KeySet, inputs)
    problem = Problem(query, (key,), Temperature(torch.tensor([0.1]), 0.1), columns=columns)
    chosen = plan_of(problem, Options("torch"), reduced=True)
    assert chosen.name == name
    flat = operators.flatten(
        problem.with_tensors([None if x is None else x.detach() for x in problem.tensors()]), chosen
    )
    for wanted in ([True, False, True], [True, True, False]):
        torch.library.opcheck(operators.onepass, (*flat, "infonce", torch.full((1,), 1 / N), wanted))
