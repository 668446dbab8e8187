"""The plan that makes loss and gradients from one product of the scores, on both backends, against float64."""

from __future__ import annotations

import pytest
import torch
from oracles import info_nce as dense_info_nce
from oracles import views
from support.helpers import embeddings, watch_plans

from fused_infonce import explain, info_nce, nt_xent
from fused_infonce.backends import plan

N, D, H = 45, 24, 3
OPTIONS = {
    "in batch": {},
    "unpaired": {"negatives": (13, D)},
    "paired": {"negatives": (N, H, D), "negative_mode": "paired", "in_batch_negatives": True},
    "only paired": {"negatives": (N, H, D), "negative_mode": "paired"},
    "target": {"target": torch.where(torch.arange(N) % 4 == 0, -100, torch.arange(N) * 7 % N)},
    "ids": {"key_ids": torch.arange(N) % 5},
    "a margin": {"target": torch.arange(N) * 7 % N, "margin": 0.35},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, and no lower bound on D."""
    for name, value in {
        "GPU_SCORES_DIM": 1,
        "GPU_DENSE": 0,
        "GPU_DENSE_WIDE": 0,
        "GPU_ONEPASS_DIM": 1,
        "GPU_ONEPASS_ROWS": 8,
        "ONEPASS_ROWS": 8,
        "CPU_BLOCK": 128,
        "DENSE": 0,
        "DENSE_SELF": 0,
    }.items():
        monkeypatch.setattr(plan, name, value)


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(value.double() - truth) / torch.linalg.vector_norm(truth)).item()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("temperature", [0.5, 0.05, 1 / 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_and_gradients_of_one_pass_keep_the_bounds(
    backend: str, name: str, temperature: float, dtype: torch.dtype
) -> None:
    options = dict(OPTIONS[name])
    inputs = [torch.randn(N, D)]
    inputs.append(inputs[0] + torch.randn(N, D))
    inputs[0][3], inputs[1][5] = 0, 0  # zero rows have zero gradients and spoil nothing
    if shape := options.pop("negatives", None):
        inputs.append(torch.randn(shape))
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    columns = 40 * H if name == "only paired" else 16 * (N + 64 + H + 13)
    limit = columns * max(dtype.itemsize, 4 if backend == "torch" else 2)
    options |= {"temperature": temperature}
    assert explain(*inputs, **options, backend=backend, workspace_limit=limit)[0].name == "onepass"
    loss = info_nce(*inputs, **options, backend=backend, workspace_limit=limit)
    truth = dense_info_nce.info_nce(*exact, **options)
    fp32 = 1e-5 * max(1, 0.05 / temperature)
    bound = {torch.bfloat16: 5e-3, torch.float32: fp32, torch.float64: 1e-11}[dtype]
    assert relative(loss, truth) <= min(fp32, bound)
    for grad, true_grad in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(truth, exact), strict=True):
        assert relative(grad, true_grad) <= bound


@pytest.fixture
def pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many pairs: 97, of which only tiles on the diagonal and the last get masks, or 45, where all do."""
    launch = pytest.importorskip("fused_infonce.backends.triton.launch", exc_type=ImportError)
    monkeypatch.setattr(launch, "PEELED", 1 if request.param == 97 else 1000)
    return request.param


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("pairs", "kind", "temperature"),
    [
        (45, "tight", 1.0), (45, "tight", 1 / 64), (45, "loose", 1 / 64), (45, "cone_98", 1.0), (45, "cone_98", 1 / 64),
        (97, "tight", 0.05), (97, "cone_98", 0.05),
    ],
    indirect=["pairs"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_both_directions_of_one_pass_keep_the_bounds(
    pairs: int, kind: str, temperature: float, dtype: torch.dtype
) -> None:
    """The scores that become coefficients are held in 16 bits meanwhile; only coefficients count as a rounding."""
    inputs = [x.to(dtype).requires_grad_() for x in embeddings(kind, pairs, D)[:2]]
    t = torch.tensor(temperature, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    options = {"temperature": t, "symmetric": True, "backend": "triton"}
    assert [p.name for p in explain(*inputs, **options)] == ["onepass"]
    loss = info_nce(*inputs, **options)
    grads = torch.autograd.grad(loss, [*inputs, t])
    exact = [x.detach().double().requires_grad_() for x in (*inputs, t)]
    truth = dense_info_nce.info_nce(*exact[:2], temperature=exact[2], symmetric=True)
    fp32 = 1e-5 * max(1, 0.05 / temperature)
    bound = {torch.bfloat16: 5e-3, torch.float32: fp32, torch.float64: 1e-11}[dtype]
    assert relative(loss, truth) <= min(fp32, bound)
    wants = [bound, bound, min(1e-4, bound)]
    for grad, true_grad, most in zip(grads, torch.autograd.grad(truth, exact), wants, strict=True):
        assert relative(grad, true_grad) <= most
    again = info_nce(*inputs, **options)
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again, inputs[:1])[0], grads[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize(("reduction", "margin"), [("mean", 0.0), ("sum", 0.3)])
def test_both_directions_of_one_pass_with_ids_weights_and_zero_rows(
    wanted: tuple[int, ...], reduction: str, margin: float
) -> None:
    inputs = [torch.randn(N, D, dtype=torch.float64) for _ in range(2)]
    inputs[0][3], inputs[1][5] = 0, 0
    inputs.append(torch.tensor(0.2, dtype=torch.float64))
    ids, weight = torch.arange(N) % 7, torch.rand(N, dtype=torch.float64)
    weight[4] = 0
    options = {"key_ids": ids, "weight": weight, "symmetric": True, "reduction": reduction, "margin": margin}
    values = []
    for backend in ("triton", "reference"):
        given = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        made = {**options, "temperature": given[2], "backend": backend}
        assert backend != "triton" or [p.name for p in explain(*given[:2], **made)] == ["onepass"]
        loss = info_nce(*given[:2], **made)
        values.append([loss, *torch.autograd.grad(loss, [given[i] for i in wanted])])
    for x, y in zip(*values, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


@pytest.mark.interpreter
def test_both_directions_need_one_temperature_and_room_for_all_scores() -> None:
    query, key = (torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

    def name(**options: object) -> str:
        return explain(query, key, symmetric=True, backend="triton", **options)[0].name

    assert name(temperature=0.05) == "onepass"
    assert name(temperature=0.01) == "workspace"  # exp(1 / 0.01) does not fit
    assert name(temperature=torch.full((N,), 0.05)) == "workspace"
    assert name(temperature=0.05, reduction="none") == "workspace"
    more = {"negative_keys": torch.randn(4, D, dtype=torch.bfloat16), "in_batch_negatives": True}
    assert name(temperature=0.05, **more) == "workspace"

    sizes = dict(
        backend="triton", device="cuda", d=768, itemsize=2, acc_itemsize=4, gradients=True, columns=True,
        self_similar=False, reduced=True, per_row=False, plain=True, bounded=True, joint=True,
    )  # fmt: skip
    need = 2 * 8192**2 + 2 * 12 * 8192 * 128  # all scores, and the states of rows and columns over their tiles
    for limit, found in ((need * 4 // 3, "onepass"), (need, "workspace")):  # a quarter is for products
        chosen = plan.choose(n=8192, m=8192, limit=limit, **sizes)
        assert (chosen.name, chosen.flops) == (found, 6 if found == "onepass" else 8)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("bad", [torch.inf, 1e25])
def test_a_key_beyond_range_is_not_left_out(backend: str, bad: float) -> None:
    """Its squared norm overflows: the loss of the other plan, or NaN, but never that of one key less."""
    inputs = [torch.randn(N, D), torch.randn(N, D), torch.randn(5, D)]
    inputs[2][1, 3] = bad
    inputs = [x.requires_grad_() for x in inputs]
    loss = info_nce(*inputs, temperature=0.05, backend=backend)
    rows = info_nce(*inputs, temperature=0.05, backend=backend, reduction="none")
    torch.testing.assert_close(loss, rows.mean(), equal_nan=True)
    assert loss.isnan() or bad != torch.inf


@pytest.mark.interpreter
def test_what_does_not_fit_recomputes_the_scores() -> None:
    query, key = (torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

    def name(**options: object) -> str:
        return explain(query, key, backend="triton", **options)[0].name

    assert name(temperature=0.05) == "onepass"
    assert name(temperature=0.01) == "workspace"  # exp(1 / 0.01) does not fit
    assert name(temperature=torch.tensor(0.05)) == "onepass"  # on a CPU reading it is free
    assert name(temperature=torch.full((N,), 0.01)) == "workspace"
    assert name(temperature=0.05, normalize=False) == "workspace"
    query, key = query.half(), key.half()
    assert name(temperature=0.05) == "workspace"  # float16's range


@pytest.mark.parametrize("plan_name", ["dense", "onepass"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", ["one direction", "both", "both, with more", "self-similarity"])
@pytest.mark.parametrize("learnable", [False, True])
def test_gradients_in_pytorch_are_those_of_finite_differences(
    plan_name: str, reduction: str, case: str, learnable: bool, monkeypatch
) -> None:
    """All scores at once, and in several tiles of columns."""
    for name in ("DENSE", "DENSE_SELF"):
        monkeypatch.setattr(plan, name, 200 if plan_name == "dense" else 0)
    monkeypatch.setattr(plan, "CPU_BLOCK", 12)
    plans = watch_plans(monkeypatch)
    n = 6
    inputs = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=learnable)
    options = {"reduction": reduction} | ({"symmetric": True} if case.startswith("both") else {})
    if case == "both, with more":
        inputs.append(torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
        options |= {"in_batch_negatives": True, "key_ids": torch.arange(n) % 4}

    def loss(t: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        if case == "self-similarity":
            return nt_xent(*inputs, t, reduction)
        return info_nce(*inputs, temperature=t, **options)

    assert torch.autograd.gradcheck(loss, (t, *inputs))
    value = loss(t, *inputs)
    function = views.nt_xent if case == "self-similarity" else dense_info_nce.info_nce
    torch.testing.assert_close(value, function(*inputs, temperature=t, **options))
    with torch.no_grad():
        torch.testing.assert_close(loss(t, *inputs), value)
    expected = plan_name if case != "both, with more" else "onepass"
    if case == "self-similarity" and plan_name == "onepass":
        expected = "triangular"
    assert {p.name for p in plans if p.gradients} == {expected}


@pytest.mark.interpreter
def test_the_launcher_gives_the_gradient_of_each_rows_temperature() -> None:
    """A host temperature has no gradient, so on the Triton backend this is the launcher's own promise."""
    from fused_infonce.backends.contract import KeySet, Problem, Temperature
    from fused_infonce.backends.triton import backend

    query, key = (torch.randn(9, 6, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.1, 0.3, 9, dtype=torch.float64).requires_grad_()
    chosen = plan.Plan("onepass", 4, 9, 2**20, 6, "", "triton")
    weight = torch.full((1,), 1 / 9, dtype=torch.float64)
    problem = Problem(KeySet(query), (KeySet(key),), Temperature(t.detach()))
    result = backend.onepass(problem, chosen, "infonce", weight, [False, False, True])
    (truth,) = torch.autograd.grad(dense_info_nce.info_nce(query, key, temperature=t), t)
    assert result.inputs == [None, None]
    one = torch.ones((), dtype=torch.float64)
    assert backend.finished(problem, chosen, result.inputs, result.kept, one, [None, None]) == [None, None]
    assert result.temperature is not None
    assert relative(result.temperature, truth) <= 1e-12


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["cone_98", "loose"])
@pytest.mark.parametrize("t", [1 / 64, 1.0])
def test_small_weights_cost_no_digits(kind: str, t: float) -> None:
    """A weight of 2^-35 stands for a mean over a million rows of as many columns: all is 2^-35 times as large."""
    from support.problems import one_pass

    from fused_infonce.backends.contract import KeySet, Problem, Temperature

    query, key, _ = embeddings(kind, N, D)
    problem = Problem(KeySet(query.bfloat16()), (KeySet(key.bfloat16()),), Temperature(torch.full((1,), t), t))
    chosen = plan.Plan("onepass", N, N, 2**20, 6, "", "triton", bounded=True)
    found = [one_pass(problem, chosen, 2.0**-k, [True] * 3) for k in (0, 35)]
    for one, small in zip(*found, strict=True):
        assert one is not None
        assert small is not None
        assert torch.equal(small * 2.0**35, one)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_row_that_counts_for_nothing_may_be_nan(backend: str, n: int, reduction: str) -> None:
    """One row of weight 0 is not one weight for all rows."""
    query, key = torch.full((n, D), torch.nan, requires_grad=True), torch.randn(3, D, requires_grad=True)
    target = torch.full((n,), -100)
    loss = info_nce(query, key, target=target, reduction=reduction, backend=backend)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
