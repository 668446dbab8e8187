"""Soft targets of a teacher against dense code, from scores and from embeddings; precision, memory, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import distilled as dense
from support.helpers import DEVICE, both, both_backends, bounds, cases, elsewhere, embeddings, error, interpreted
from support.memory import MIB, PeakMemory

from fused_infonce import DistillationLoss, distilled_info_nce, info_nce
from fused_infonce.backends import plan

N, M, D, E = 6, 5, 4, 3


def valid(case):
    if case["symmetric"] and case["labels"] != "rows":
        return False
    return not (case["alpha"] < 1 and case["labels"] == "none")


FACTORS = {
    "teacher": ["embeddings", "raw embeddings", "scores"],
    "labels": ["rows", "target", "none"],
    "symmetric": [False, True],
    "objective": ["cross_entropy", "kl_div"],
    "alpha": [1.0, 0.3, 0.0],
    "temperature_squared": [False, True],
    "normalize": [True, False],
    "temperature": ["float", "scalar", "per row"],
    "teacher_temperature": [None, "float", "per row"],
    "reduction": ["mean", "sum", "none"],
    "weight": [False, True],
    "blocks": ["one", "several"],
}


def make(case, device):
    """(inputs that have gradients, options of ours, the teacher's dense similarities and options of the dense code)."""
    m = N if case["labels"] == "rows" else M
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64, device=device)  # noqa: E731
    inputs = [new(N, D), new(m, D)]
    shared = {name: case[name] for name in ("objective", "alpha", "temperature_squared", "normalize", "reduction")}
    shared["symmetric"] = case["symmetric"]
    temperature = {"float": 0.4, "scalar": 0.3 + 0.3 * torch.rand(()).double().to(device),
                   "per row": 0.3 + 0.3 * torch.rand(N).double().to(device)}  # fmt: skip
    t, u = temperature[case["temperature"]], case["teacher_temperature"]
    u = None if u is None else temperature[u]
    if case["labels"] == "target":
        shared["target"] = torch.randint(m, (N,), device=device).scatter(0, torch.tensor([1], device=device), -100)
    if case["weight"]:
        shared["weight"] = torch.rand(N, dtype=torch.float64, device=device)
    if case["teacher"] == "scores":
        z = 2 * new(N, m)
        teacher, default = {"teacher_scores": z}, 1.0
    else:
        a, b = new(N, E), new(m, E)
        teacher, default = {"teacher_query": a, "teacher_key": b}, t
        teacher["normalize_teacher"] = case["teacher"] == "embeddings"
        z = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T if case["teacher"] == "embeddings" else a @ b.T
    inputs += [t] if isinstance(t, torch.Tensor) else []
    inputs = [x.requires_grad_() for x in inputs]
    of_dense = shared | {"teacher_temperature": default if u is None else u}
    return inputs, t, shared | teacher | {"teacher_temperature": u}, z, of_dense


@cases(valid, pairs=True, together=True, **FACTORS)
def test_gradients_are_those_of_finite_differences_and_of_dense_code(backend, case, monkeypatch):
    if case["blocks"] == "several":
        monkeypatch.setattr(plan, "DENSE", 0)
    inputs, t, options, z, of_dense = make(case, DEVICE[backend])
    u = of_dense["teacher_temperature"]
    if isinstance(u, torch.Tensor):  # a copy: in finite differences it does not follow the student's
        of_dense["teacher_temperature"] = options["teacher_temperature"] = u.detach().clone()
    limit = 200 if case["blocks"] == "several" else None

    def ours(q, k, t=t):
        return distilled_info_nce(q, k, temperature=t, **options, backend=backend, workspace_limit=limit)

    def truth(q, k, t=t):
        return dense.of_similarities(q, k, z, t, **of_dense)

    checked = inputs[:2] if case["temperature_squared"] else inputs  # t^2 is a factor without a gradient
    assert interpreted(backend) or torch.autograd.gradcheck(ours, checked, fast_mode=True)
    for got, want in both([ours, truth], inputs):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@both_backends
@pytest.mark.parametrize("teacher", ["embeddings", "scores"])
def test_the_teachers_temperature_is_by_default_the_students_or_1_for_scores(backend, teacher):
    """The student's for embeddings, without a gradient; 1 for scores."""
    device = DEVICE[backend]
    q, k, a, b = (torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(4))
    t = torch.full((), 0.2, dtype=torch.float64, device=device, requires_grad=True)
    z = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    given = {"teacher_query": a, "teacher_key": b} if teacher == "embeddings" else {"teacher_scores": z}
    loss = distilled_info_nce(q, k, temperature=t, **given, backend=backend)
    want = dense.of_similarities(q, k, z.detach(), t, teacher_temperature=0.2 if teacher == "embeddings" else 1.0)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, (q, k, t, a, b), allow_unused=True)
    assert got[3:] == (None, None)
    for x, y in zip(got[:3], torch.autograd.grad(want, (q, k, t)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [0.01, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("teacher", ["embeddings", "scores"])
@pytest.mark.parametrize("kind", ["tight", "loose"])
def test_losses_and_gradients_keep_the_bounds_of_infonce(backend, dtype, t, teacher, kind):
    """Within the bounds of InfoNCE, also where student and teacher agree on the positive to many digits.

    A gradient is the student's part less the teacher's; in 16 bits, at t = 1, where both are nearly uniform, its error
    is held to the size of the former.
    """
    n, d = (45, 24) if backend == "torch" else (18, 16)
    inputs = [x.to(dtype) for x in embeddings(kind, n, d)[:2]]
    a, b = (x.to(dtype) for x in embeddings(kind, n, d)[:2])
    given = {"teacher_query": a, "teacher_key": b} if teacher == "embeddings" else {"teacher_scores": (a @ b.T).float()}
    options = {"temperature": t, "teacher_temperature": t, "normalize_teacher": True}
    exact = [x.double().requires_grad_() for x in inputs]
    want = dense.distilled_info_nce(*exact, **options, **{k: x.double() for k, x in given.items()})
    inputs = [x.to(DEVICE[backend]).requires_grad_() for x in inputs]
    given = {name: x.to(DEVICE[backend]) for name, x in given.items()}
    got = distilled_info_nce(*inputs, **options, **given, backend=backend)
    loss_bound, gradient_bound = bounds(torch.float32, t)
    assert error(got, want) <= loss_bound
    scale = float(1 / want.detach())
    grads = torch.autograd.grad(got, inputs, torch.full_like(got, scale))
    truth = torch.autograd.grad(want * scale, exact)
    x, y = (F.normalize(z, dim=1) for z in exact)
    student = torch.autograd.grad(torch.logsumexp(x @ y.T / t, dim=1).mean() * scale, exact)
    for a, b, part in zip(grads, truth, student, strict=True):
        assert a.dtype == dtype
        larger = max(1.0, float(part.norm() / b.norm())) if dtype == torch.bfloat16 and t == 1 else 1.0
        assert error(a, b) <= max(gradient_bound, bounds(dtype, t)[1] * larger)


@both_backends
@pytest.mark.parametrize("teacher", ["embeddings", "scores"])
def test_kl_of_the_teacher_itself_is_zero(backend, teacher):
    q, k = (torch.randn(9, 4, dtype=torch.float64, device=DEVICE[backend], requires_grad=True) for _ in range(2))
    z = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
    given = {"teacher_query": q, "teacher_key": k} if teacher == "embeddings" else {"teacher_scores": z}
    options = {"temperature": 0.05, "teacher_temperature": 0.05, "objective": "kl_div", "reduction": "none"}
    loss = distilled_info_nce(q, k, **given, **options, backend=backend)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    for g in torch.autograd.grad(loss.sum(), (q, k)):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-11)


def large_logits(size, agrees, n, d=16):
    """Return a student and a teacher whose logits are of that size, and whose favourites are not the pairs."""
    a = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)
    b = F.normalize(a.roll(7, 0) + 0.3 * F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1), dim=1)
    a, b = a * size**0.5, b * size**0.5
    q, k = (x + 0.02 * torch.randn_like(x) if agrees else torch.randn_like(x) for x in (a, b))
    return [x.float().double() for x in (q, k, a, b)]


@both_backends
@pytest.mark.parametrize("teacher", ["embeddings", "scores"])
@pytest.mark.parametrize("size", [30, 800, 14000])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"alpha": 0.5}, {"target": True}], ids=str)
@pytest.mark.parametrize("agrees", [False, True])
def test_large_logits_of_a_teacher_cancel_exactly(backend, teacher, size, options, agrees):
    """In float32 the divergence of a teacher that is certain, of another key than the pair, has no error of theirs.

    Errors were that of the teacher's logits, 2e-4 to 4e-3, and with `symmetric` that of their exponentials: up to 20.
    """
    q, k, a, b = large_logits(size, agrees, n=60 if backend == "torch" else 20)
    options = {"objective": "kl_div", "reduction": "none", "temperature": 0.05, "teacher_temperature": 1.0} | options
    if options.pop("target", False):
        options["target"] = torch.arange(len(q)).masked_fill(torch.arange(len(q)) % 5 == 0, -100)
    given = {"teacher_query": a, "teacher_key": b, "normalize_teacher": False}
    if teacher == "scores":
        given = {"teacher_scores": (a @ b.T).float().double()}
    leaves = [x.requires_grad_() for x in (q, k)]
    want = dense.distilled_info_nce(*leaves, **given, **options)
    exact = torch.autograd.grad(want.sum(), leaves)
    device = DEVICE[backend]
    rows = [x.detach().float().to(device).requires_grad_() for x in leaves]
    moved = {name: x.float().to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    here = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    loss = distilled_info_nce(*rows, **moved, **here, backend=backend)
    eps = torch.finfo(torch.float32).eps
    absolute = eps / 0.05 if agrees and "symmetric" in options else 0  # of the student's logits
    assert ((loss.cpu() - want).abs() <= 4 * absolute + 30 * eps + 8 * eps * want.abs()).all()
    for got, truth in zip(torch.autograd.grad(loss.sum(), rows), exact, strict=True):
        assert error(got, truth) <= (1e-2 if absolute else 1e-5)  # a gradient near 0 beside its parts


@both_backends
@pytest.mark.parametrize("teacher", ["embeddings", "scores"])
def test_a_teacher_that_is_certain_gives_info_nce(backend, teacher):
    """One that holds all of its weight on the label, whatever is left of the others' in float32."""
    q, k = (torch.randn(7, 8, device=DEVICE[backend], requires_grad=True) for _ in range(2))
    eye = torch.eye(7, device=DEVICE[backend])
    given = {"teacher_query": eye, "teacher_key": eye} if teacher == "embeddings" else {"teacher_scores": eye}
    ours = lambda q, k: distilled_info_nce(q, k, **given, teacher_temperature=0.01, backend=backend)  # noqa: E731
    for got, want in both([ours, lambda q, k: info_nce(q, k, backend=backend)], [q, k]):
        assert error(got, want) <= 1e-6


@both_backends
@pytest.mark.parametrize("teacher", ["embeddings", "scores"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"objective": "kl_div", "alpha": 0.5}], ids=str)
def test_one_key_leaves_nothing_to_learn(backend, teacher, options):
    q, k, a, b = (torch.randn(1, 3, dtype=torch.float64, device=DEVICE[backend]) for _ in range(4))
    t = torch.tensor(0.2, dtype=torch.float64, device=DEVICE[backend])
    leaves = [x.requires_grad_() for x in (q, k, t)]
    given = {"teacher_query": a, "teacher_key": b} if teacher == "embeddings" else {"teacher_scores": a @ b.T}
    loss = distilled_info_nce(q, k, temperature=t, **given, **options, backend=backend)
    assert loss.abs() <= 1e-12
    for g in torch.autograd.grad(loss, leaves):
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("teacher", ["embeddings", "scores"])
def test_no_rows_give_nan_as_mean_and_0_as_sum(teacher):
    x = torch.randn(0, 3, requires_grad=True)
    given = {"teacher_query": x, "teacher_key": x} if teacher == "embeddings" else {"teacher_scores": x[:, :0]}
    assert distilled_info_nce(x, x, **given).isnan()
    assert distilled_info_nce(x, x, **given, reduction="sum") == 0
    keys = torch.randn(2, 3)
    given = {"teacher_query": x, "teacher_key": keys} if teacher == "embeddings" else {"teacher_scores": x[:, :2]}
    assert distilled_info_nce(x, keys, **given, reduction="none").shape == (0,)


@both_backends
@pytest.mark.parametrize("where", ["query", "key", "teacher_query", "teacher_key"])
def test_nan_is_not_swallowed(backend, where):
    names = ("query", "key", "teacher_query", "teacher_key")
    given = {name: torch.randn(5, 4, device=DEVICE[backend]) for name in names}
    given[where][1, 2] = torch.nan
    loss = distilled_info_nce(**given, reduction="none", backend=backend)
    assert loss[1].isnan()
    assert loss.isnan().all() == where.endswith("key")


def test_some_scores_may_be_minus_infinity():
    """A candidate that the teacher did not score has no weight, and no NaN in any gradient."""
    q, k = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = torch.randn(5, 5, dtype=torch.float64)
    z[0, 0] = z[1, 2] = -torch.inf
    options = {"objective": "kl_div", "alpha": 0.5, "reduction": "none"}
    ours = lambda q, k: distilled_info_nce(q, k, teacher_scores=z, **options)  # noqa: E731
    for got, want in both([ours, lambda q, k: dense.of_similarities(q, k, z, **options)], [q, k]):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"symmetric": True, "objective": "kl_div", "alpha": 0.5}], ids=str)
def test_memory_of_embeddings_is_the_limit_and_a_few_times_the_rows(options):
    """D = D' = 32, and N M floats are 64 MiB: the workspace, and a few times the rows of both models."""
    n, limit = 4096, 2 * MIB
    q, k, a, b = (torch.randn(n, 32, requires_grad=i < 2) for i in range(4))
    with PeakMemory() as memory:
        distilled_info_nce(q, k, a, b, workspace_limit=limit, **options).backward()
    rows = 4 * q.nbytes
    assert q.grad.any()
    assert k.grad.any()
    assert memory.largest <= rows
    assert memory.peak <= limit + 5 * rows
    assert memory.peak <= n * n * 4 / 4


def test_what_is_saved_is_a_few_times_the_rows():
    n, d, storages = 1024, 16, {}
    q, k, a, b = (torch.randn(n, d, requires_grad=i < 2) for i in range(4))

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = distilled_info_nce(q, k, a, b)
    assert max(storages.values()) <= 2 * n * d * 4
    assert sum(storages.values()) <= 16 * n * d * 4 + 40 * n * 4
    loss.backward()


def test_a_second_backward_is_the_same_and_a_double_one_is_refused():
    q, k, a, b = (torch.randn(5, 4, requires_grad=i < 2) for i in range(4))
    loss = distilled_info_nce(q, k, a, b)
    first = torch.autograd.grad(loss, (q, k), retain_graph=True)
    for x, y in zip(first, torch.autograd.grad(loss, (q, k), retain_graph=True), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, k, create_graph=True)


def test_one_side_may_be_frozen_and_autocast_takes_mixed_dtypes():
    q, k, a, b = (torch.randn(6, 5) for _ in range(4))
    for leaf in (q, k):
        q.requires_grad_(leaf is q), k.requires_grad_(leaf is k)
        (alone,) = torch.autograd.grad(distilled_info_nce(q, k, a, b), leaf)
        torch.testing.assert_close(alone, torch.autograd.grad(dense.of_similarities(q, k, *teacher(a, b)), leaf)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distilled_info_nce(q, k.bfloat16(), a, b.double())
    assert loss.dtype == torch.float32
    exact = dense.of_similarities(q.bfloat16().float(), k.bfloat16().float(), *teacher(a, b))
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)


def teacher(a, b):
    """The last arguments of the dense code at the default temperature."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.1, 0.1


@pytest.mark.parametrize(
    ("backend", "scores"), [("torch", True), pytest.param("triton", False, marks=pytest.mark.interpreter)]
)
def test_compiled_equals_eager(backend, scores):
    """Of embeddings in PyTorch: in tests/temperature."""
    q, k, a, b = (torch.randn(9, 8, requires_grad=i < 2) for i in range(4))
    given = {"teacher_scores": a @ b.T} if scores else {"teacher_query": a, "teacher_key": b}
    loss = DistillationLoss(0.2, backend=backend, objective="kl_div")
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(q, k, **given)
        results.append((value, *torch.autograd.grad(value, (q, k))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


def test_module_equals_function():
    q, k, a, b = (torch.randn(6, 5) for _ in range(4))
    options = {
        "teacher_temperature": 0.3, "objective": "kl_div", "alpha": 0.25, "temperature_squared": True,
        "normalize": False, "normalize_teacher": False, "reduction": "sum",
    }  # fmt: skip
    rows = {"target": torch.tensor([1, 4, 0, -1, 2, 2]), "weight": torch.rand(6)}
    got = DistillationLoss(0.2, **options, ignore_index=-1)(q, k, a, b, **rows)
    assert torch.equal(got, distilled_info_nce(q, k, a, b, 0.2, **options, **rows, ignore_index=-1))
    got = DistillationLoss(0.2, symmetric=True)(q, k, teacher_scores=a @ b.T)
    assert torch.equal(got, distilled_info_nce(q, k, temperature=0.2, symmetric=True, teacher_scores=a @ b.T))
    assert repr(DistillationLoss()) == "DistillationLoss(temperature=0.1, reduction='mean')"
    shown = repr(DistillationLoss(teacher_temperature=torch.ones(2), alpha=0.25))
    assert shown.endswith("reduction='mean', teacher_temperature=tensor([1., 1.]), alpha=0.25)")


def test_a_teachers_temperature_is_not_trained():
    for held in (torch.nn.Parameter(torch.ones(1)), torch.ones(1, requires_grad=True)):
        with pytest.raises(ValueError, match=r"teacher_temperature gets no gradient .* pass its \.detach\(\)"):
            DistillationLoss(teacher_temperature=held)
        assert not list(DistillationLoss(teacher_temperature=held.detach()).parameters())


ROWS, SCORES = torch.ones(4, 3), torch.ones(4, 4)
BAD = {
    "no teacher": ({"teacher_scores": None}, ValueError, "a teacher is teacher_query and teacher_key, or teacher_sco"),
    "half a teacher": ({"teacher_scores": None, "teacher_query": ROWS}, ValueError, "a teacher is teacher_query and"),
    "two teachers": ({"teacher_query": ROWS, "teacher_key": ROWS}, ValueError, "pass the two or the one"),
    "scores' shape": ({"teacher_scores": SCORES[1:]}, ValueError, r"teacher_scores must have shape \(4, 4\), got"),
    "scores' dtype": ({"teacher_scores": SCORES.long()}, TypeError, "teacher_scores must be float16"),
    "scores' type": ({"teacher_scores": [[1.0]]}, TypeError, "teacher_scores must be a tensor"),
    "scores elsewhere": ({"teacher_scores": elsewhere(*SCORES.shape)}, ValueError, "teacher_scores must be on cpu"),
    "teacher's rows": (
        {"teacher_scores": None, "teacher_query": ROWS[1:], "teacher_key": ROWS}, ValueError,
        r"teacher_query must have shape \(4, 3\), got \(3, 3\)",
    ),
    "teacher's components": (
        {"teacher_scores": None, "teacher_query": ROWS, "teacher_key": ROWS[:, 1:]}, ValueError,
        r"teacher_key must have shape \(4, 3\), got \(4, 2\)",
    ),
    "query": ({"query": [1.0]}, TypeError, "query must be a tensor"),
    "components": ({"key": ROWS[:, 1:]}, ValueError, "key must have 3 components as query has, got 2"),
    "dtypes": ({"key": ROWS.double()}, TypeError, "key must be torch.float32"),
    "no keys": ({"key": ROWS[:0], "teacher_scores": SCORES[:, :0]}, ValueError, "key must have at least one row"),
    "labels": ({"key": ROWS[1:], "teacher_scores": SCORES[:, 1:], "alpha": 0.5}, ValueError, "alpha=0.5 needs labels"),
    "symmetric": ({"key": ROWS[1:], "teacher_scores": SCORES[:, 1:], "symmetric": True}, ValueError, "key must have 4"),
    "symmetric target": ({"target": torch.zeros(4).long(), "symmetric": True}, ValueError, "cannot be used with targ"),
    "target": ({"target": torch.full((4,), 4)}, ValueError, r"target must be in \[0, 4\)"),
    "weight": ({"weight": torch.ones(3)}, ValueError, r"weight must be a floating tensor of shape \(4,\)"),
    "alpha": ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\]"),
    "objective": ({"objective": "mse"}, ValueError, "objective must be one of"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be positive and finite"),
    "teacher's temperature": ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be positive"),
    "a tensor of it": ({"teacher_temperature": -torch.ones(1)}, ValueError, "teacher_temperature must be positive"),
    "its dtype": ({"teacher_temperature": torch.ones(1).long()}, TypeError, "teacher_temperature must be a number or"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "workspace": ({"workspace_limit": 0}, ValueError, "workspace_limit must be a number of bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_refused(what):
    replaced, kind, message = BAD[what]
    with pytest.raises(kind, match=message):
        distilled_info_nce(**({"query": ROWS, "key": ROWS, "teacher_scores": SCORES} | replaced))
    names = {"alpha", "objective", "temperature", "teacher_temperature", "reduction", "backend", "workspace_limit"}
    if set(replaced) <= names:
        with pytest.raises(kind, match=message):
            DistillationLoss(**replaced)
