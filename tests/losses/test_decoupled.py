"""Decoupled contrastive loss against lists of logits, row by row, and in 16 and 32 bits against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import decoupled
from oracles.row_lists import reduce, rows_of, rows_of_views
from support.helpers import (
    DEVICE,
    FACTORS,
    both,
    both_backends,
    bounds,
    cases,
    differentiable,
    elsewhere,
    embeddings,
    error,
    interpreted,
    make_call,
    on,
    valid,
    watch_plans,
)

from fused_infonce import DCLLoss, decoupled_info_nce, decoupled_nt_xent, von_mises_fisher_weight
from fused_infonce.backends import plan

N, D = 6, 5


def by_lists(reduction="mean", positive_weight=None, weight=None, **options):
    def loss(row):
        w = 1 if positive_weight is None else positive_weight[row.index]
        return torch.logsumexp(row.others, 0) - w * row.pos

    return reduce(loss, rows_of(**options), reduction, len(options["query"]), weight)


def views_by_lists(view_a, view_b, temperature=0.1, reduction="mean", *, positive_weight=None, normalize=True):
    def loss(row):
        w = 1 if positive_weight is None else positive_weight[row.index]
        return torch.logsumexp(row.others, 0) - w * row.pos

    rows = rows_of_views(view_a, view_b, temperature, normalize=normalize)
    return reduce(loss, rows, reduction, 2 * len(view_a))


@cases(
    valid, pairs=True, together=True, **FACTORS, positive=[False, True], weight=[None, "fixed", "learnt"],
    blocks=["one", "several"],
)  # fmt: skip
def test_gradients_are_those_of_finite_differences_and_of_lists(backend, case, monkeypatch):
    inputs, options = make_call(N, 5, 3, 3, **{name: case[name] for name in FACTORS})
    if case["positive"]:
        inputs["positive_weight"] = torch.rand(N, dtype=torch.float64) + 0.5
    weight = torch.rand(N, dtype=torch.float64)
    if case["weight"] == "learnt":
        inputs["weight"] = weight
    elif case["weight"]:
        options["weight"] = weight.to(DEVICE[backend])
    if case["blocks"] == "several":
        monkeypatch.setattr(plan, "DENSE", 0)
    inputs = on(DEVICE[backend], inputs)
    names = [name for name, x in inputs.items() if differentiable(x)]
    fixed = {name: x for name, x in inputs.items() if name not in names}
    tensors = [inputs[name].requires_grad_() for name in names]
    limit = 150 if case["blocks"] == "several" else None

    def ours(*x):
        given = dict(zip(names, x, strict=True)) | fixed | options
        return decoupled_info_nce(**given, backend=backend, workspace_limit=limit)

    def truth(*x):
        return by_lists(**(dict(zip(names, x, strict=True)) | fixed | options))

    assert interpreted(backend) or torch.autograd.gradcheck(ours, tensors, fast_mode=True)
    for got, want in both([ours, truth], tensors):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@cases(
    normalize=[True, False],
    reduction=["mean", "sum", "none"],
    temperature=["float", "scalar", "per row"],
    positive=[False, True],
    blocks=["one", "several"],
    pairs=True,
)
def test_gradients_of_views_are_those_of_finite_differences_and_of_lists(
    backend, normalize, reduction, temperature, positive, blocks, monkeypatch
):
    if blocks == "several":
        monkeypatch.setattr(plan, "DENSE_SELF", 0)
    device = DEVICE[backend]
    tensors = [torch.randn(4, 3, dtype=torch.float64, device=device) for _ in range(2)]
    if temperature != "float":
        shape = () if temperature == "scalar" else (8,)
        tensors.append(0.3 + 0.3 * torch.rand(shape, dtype=torch.float64, device=device))
    if positive:
        tensors.append(torch.rand(8, dtype=torch.float64, device=device))
    tensors = [x.requires_grad_() for x in tensors]

    def call(function, **options):
        def of(a, b, *rest):
            t, *rest = rest if temperature != "float" else (0.4, *rest)
            w = rest[0] if rest else None
            return function(a, b, t, reduction, positive_weight=w, normalize=normalize, **options)

        return of

    ours = call(decoupled_nt_xent, backend=backend, workspace_limit=200 if blocks == "several" else None)
    assert interpreted(backend) or torch.autograd.gradcheck(ours, tensors, fast_mode=True)
    for got, want in both([ours, call(views_by_lists)], tensors):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("t", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("form", ["keys", "both", "views"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_and_gradients_keep_the_bounds_of_infonce(backend, dtype, t, form, reduction):
    """Within the bounds of InfoNCE, at its temperatures, against dense code in float64 on the same numbers."""
    n, d = (45, 24) if backend == "torch" else (18, 16)
    inputs = [x.to(dtype) for x in embeddings("loose", n, d)[:2]]
    inputs = [x.to(DEVICE[backend]).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    function = decoupled_nt_xent if form == "views" else decoupled_info_nce
    options = {"temperature": t, "reduction": reduction} | ({"symmetric": True} if form == "both" else {})
    truth = decoupled.decoupled_nt_xent if form == "views" else decoupled.decoupled_info_nce
    got, want = function(*inputs, **options, backend=backend), truth(*exact, **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss_bound, gradient_bound = bounds(dtype, t)
    assert error(got, want) <= loss_bound
    upstream = torch.ones_like(got)
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want.sum(), exact), strict=True):
        assert a.dtype == dtype
        assert error(a, b) <= gradient_bound


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["one key", "one sample", "ids", "both", "nothing explicit"])
def test_rows_without_negatives_have_loss_0_and_no_gradient(backend, reduction, weighted, form):
    """A loss of 0 and no gradient, and no NaN anywhere; other rows have theirs."""
    n = 1 if form.startswith("one") else 4
    device = DEVICE[backend]
    a, b = (torch.randn(n, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True, device=device)
    rows = 2 * n if form == "one sample" else n
    leaves = [a, b, t]
    options = {"reduction": reduction, "backend": backend, "temperature": t}
    if weighted:
        leaves.append(torch.ones(rows, dtype=torch.float64, device=device, requires_grad=True))
        options["positive_weight"] = leaves[-1]
    if form in ("ids", "both"):
        options |= {"key_ids": torch.zeros(n, dtype=torch.int64, device=device), "symmetric": form == "both"}
    if form == "nothing explicit":
        options |= {"negative_keys": b.detach()[:0]}
    function = decoupled_nt_xent if form == "one sample" else decoupled_info_nce
    loss = function(a, b, **options)
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_row_without_negatives_leaves_the_others_theirs(backend, reduction):
    """Of ids 0 0 1 with the queries' own: query 2, whose id all keys have, is alone."""
    device = DEVICE[backend]
    inputs = [torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    ids = {"query_ids": torch.tensor([1, 2, 0]), "key_ids": torch.tensor([0, 0, 0])}
    ids = {name: x.to(device) for name, x in ids.items()}

    def ours(q, k):
        return decoupled_info_nce(q, k, reduction=reduction, **ids, backend=backend)

    def truth(q, k):
        return by_lists(reduction, query=q, positive_key=k, **ids)

    for got, want in both([ours, truth], inputs):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert not got.isnan().any()
    assert ours(*inputs).shape == () or ours(*inputs)[2] == 0


@both_backends
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("n", [1, 5])
def test_nan_is_not_swallowed(backend, reduction, n):
    query, key = (torch.randn(n, 4, device=DEVICE[backend]) for _ in range(2))
    query[0, 1] = torch.nan
    query.requires_grad_()
    loss = decoupled_info_nce(query, key, reduction=reduction, backend=backend)
    assert loss.flatten()[0].isnan()
    if reduction == "none":
        assert not loss[1:].isnan().any()


@both_backends
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", ["few scores", "many scores"])
def test_one_pass_gives_the_loss_of_the_statistics(backend, symmetric, size, monkeypatch):
    """Loss and gradients from one product of the scores, where the plan allows it, are those of the statistics."""
    if size == "many scores":
        for name in ("DENSE", "GPU_DENSE_WIDE", "GPU_ONEPASS_DIM"):
            monkeypatch.setattr(plan, name, 0)
    inputs = [torch.randn(13, 8, dtype=torch.float64, device=DEVICE[backend], requires_grad=True) for _ in range(2)]
    plans = watch_plans(monkeypatch)
    options = {"temperature": 0.2, "symmetric": symmetric, "backend": backend}
    weight = torch.linspace(0, 1, 13, dtype=torch.float64, device=DEVICE[backend])
    results = []
    for w in (None, weight) if size == "many scores" and not symmetric else (None,):
        plans.clear()
        loss = decoupled_info_nce(*inputs, weight=w, **options)
        name = {"few scores": "dense", "many scores": "onepass"}[size]
        if backend == "torch" or size == "few scores" or not symmetric:
            assert [p.name for p in plans] == [name]
        rows = decoupled_info_nce(*inputs, reduction="none", **options)
        whole = rows.mean() if w is None else (rows * w).sum() / w.sum()
        results += [(loss, whole)]
        results += list(zip(*(torch.autograd.grad(x, inputs) for x in (loss, whole)), strict=True))
    for got, want in results:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_von_mises_fisher_weights_are_those_of_the_paper():
    a, b = (torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = von_mises_fisher_weight(a, b, 0.3)
    cosine = F.cosine_similarity(a, b)
    torch.testing.assert_close(got, 2 - torch.exp(cosine / 0.3) / torch.exp(cosine / 0.3).mean(), rtol=1e-12, atol=0)
    assert not got.requires_grad
    assert got.mean().item() == pytest.approx(1)
    torch.testing.assert_close(got, von_mises_fisher_weight(b, a, 0.3))
    raw = von_mises_fisher_weight(a / 9, b / 9, 0.5, normalize=False)
    torch.testing.assert_close(raw, 2 - 9 * torch.softmax((a * b).sum(1) / 81 / 0.5, 0))
    assert von_mises_fisher_weight(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(von_mises_fisher_weight(a, b, 0.3), got, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"negatives": "keys", "symmetric": True}], ids=str)
def test_compiled_equals_eager(options):
    a, b = (torch.randn(9, 8, requires_grad=True) for _ in range(2))
    loss = DCLLoss(**options)
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(a, b)
        results.append((value, *torch.autograd.grad(value, (a, b))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)


def test_module_equals_function():
    a, b, c = (torch.randn(6, 5) for _ in range(3))
    w = torch.rand(12)
    got = DCLLoss(0.2, reduction="none")(a, b, positive_weight=w)
    assert torch.equal(got, decoupled_nt_xent(a, b, 0.2, "none", positive_weight=w))
    got = DCLLoss(sigma=0.4, normalize=False)(a, b)
    w = von_mises_fisher_weight(a, b, 0.4, normalize=False).repeat(2)
    assert torch.equal(got, decoupled_nt_xent(a, b, positive_weight=w, normalize=False))
    options = {"in_batch_negatives": True, "symmetric": True, "negative_mode": "unpaired"}
    rows = {"key_ids": torch.arange(6) % 3, "weight": torch.rand(6)}
    got = DCLLoss(0.3, negatives="keys", sigma=0.5, **options)(a, b, c, **rows)
    want = decoupled_info_nce(a, b, c, 0.3, **options, **rows, positive_weight=von_mises_fisher_weight(a, b))
    assert torch.equal(got, want)
    assert repr(DCLLoss(sigma=0.5)) == "DCLLoss(temperature=0.1, reduction='mean', sigma=0.5)"


ROWS = torch.ones(4, 3)
BAD_CALLS = {
    "weights' type": ({"positive_weight": [1.0] * 4}, TypeError, "positive_weight must be a floating tensor of shape"),
    "weights' dtype": ({"positive_weight": torch.ones(4).long()}, TypeError, "positive_weight must be a floating"),
    "weights' shape": ({"positive_weight": torch.ones(5)}, ValueError, r"be a floating tensor of shape \(4,\), got"),
    "infinite weight": ({"positive_weight": torch.full((4,), torch.inf)}, ValueError, "positive_weight must be finite"),
    "weights elsewhere": ({"positive_weight": elsewhere(4)}, ValueError, "positive_weight must be on cpu"),
    "rows": ({"positive_key": ROWS[1:]}, ValueError, "positive_key must have 4 rows"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be positive and finite"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "row weight": ({"weight": -torch.ones(4)}, ValueError, "weight must not be negative"),
    "target": ({"target": torch.zeros(4).long(), "symmetric": True}, ValueError, "cannot be used with target"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_a_bad_argument_is_refused(what):
    replaced, kind, message = BAD_CALLS[what]
    with pytest.raises(kind, match=message):
        decoupled_info_nce(**({"query": ROWS, "positive_key": ROWS} | replaced))


def test_a_bad_argument_of_views_weights_and_modules_is_refused():
    for bad, kind, message in [
        ({"view_b": ROWS[1:]}, ValueError, "view_b must have shape"),
        ({"positive_weight": torch.ones(4)}, ValueError, r"positive_weight must be a floating tensor of shape \(8,\)"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"reduction": "all"}, ValueError, "reduction must be one of"),
    ]:
        with pytest.raises(kind, match=message):
            decoupled_nt_xent(**({"view_a": ROWS, "view_b": ROWS} | bad))
    with pytest.raises(ValueError, match="sigma must be positive"):
        von_mises_fisher_weight(ROWS, ROWS, 0)
    with pytest.raises(TypeError, match="sigma must be a number"):
        DCLLoss(sigma="0.5")
    with pytest.raises(ValueError, match="negatives must be one of"):
        DCLLoss(negatives="both")
    with pytest.raises(ValueError, match="options of negatives='keys'"):
        DCLLoss(symmetric=True)
    for name in ("negative_keys", "target", "weight", "key_ids"):
        with pytest.raises(ValueError, match=f"{name} needs negatives='keys'"):
            DCLLoss()(ROWS, ROWS, **{name: ROWS})
    with pytest.raises(ValueError, match="cannot be used with positive_weight"):
        DCLLoss(sigma=0.5)(ROWS, ROWS, positive_weight=torch.ones(8))
    with pytest.raises(ValueError, match="cannot be used with target"):
        DCLLoss(sigma=0.5, negatives="keys")(ROWS, ROWS, target=torch.zeros(4).long())
