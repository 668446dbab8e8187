"""Debiased contrastive loss against its formula row by row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles.row_lists import reduce, rows_of, rows_of_views
from support.helpers import (
    DEVICE,
    FACTORS,
    both,
    both_backends,
    cases,
    differentiable,
    elsewhere,
    interpreted,
    make_call,
    on,
    valid,
)

from fused_infonce import DebiasedLoss, debiased_info_nce, debiased_nt_xent, info_nce, nt_xent
from fused_infonce.backends import plan

N = 6


def loss_of(row, tau_plus, floors=None):
    """As the paper has it: exponentials, which fit in float64 for t above 0.002."""
    tau = tau_plus if isinstance(tau_plus, float) else tau_plus[row.index]
    n, positive = len(row.others), row.pos.exp()
    estimate = (row.others.exp().sum() - n * tau * positive) / (1 - tau)
    floor = n * torch.exp(-1 / row.t)
    if floors is not None:
        floors.append(bool(estimate < floor))
    g = torch.maximum(estimate, floor)
    return torch.log1p(g / positive)


def by_lists(reduction="mean", tau_plus=0.1, weight=None, floors=None, **options):
    options = {"temperature": 0.5} | options
    return reduce(
        lambda row: loss_of(row, tau_plus, floors), rows_of(**options), reduction, len(options["query"]), weight
    )


def views_by_lists(view_a, view_b, temperature=0.5, reduction="mean", tau_plus=0.1):
    rows = rows_of_views(view_a, view_b, temperature)
    return reduce(lambda row: loss_of(row, tau_plus), rows, reduction, 2 * len(view_a))


def authors(view_a, view_b, t, tau_plus):
    """The formula as the authors' script computes it, on matrices of exponentials."""
    n = len(view_a)
    z = torch.cat([F.normalize(view_a, dim=1), F.normalize(view_b, dim=1)])
    e = torch.exp(z @ z.T / t)
    sample = torch.arange(2 * n) % n
    total = (e * (sample[:, None] != sample)).sum(1)
    pos = torch.exp((z * z.roll(n, 0)).sum(1) / t)
    m = 2 * n - 2
    ng = ((total - tau_plus * m * pos) / (1 - tau_plus)).clamp(min=m * math.exp(-1 / t))
    return -torch.log(pos / (pos + ng)).mean()


@cases(
    lambda c: c["normalize"] and valid(c),
    pairs=True,
    together=True,
    **(FACTORS | {"normalize": [True]}),
    tau=["number", "rows", "zero"],
    weight=[False, True],
)
def test_gradients_are_those_of_finite_differences_and_of_lists(backend, case, monkeypatch):
    inputs, options = make_call(N, 5, 3, 3, **{name: case[name] for name in FACTORS})
    taus = {"number": 0.1, "zero": 0.0, "rows": torch.linspace(0, 0.3, N, dtype=torch.float64).to(DEVICE[backend])}
    options["tau_plus"] = taus[case["tau"]]
    if case["weight"]:
        inputs["weight"] = torch.rand(N, dtype=torch.float64)
    inputs = on(DEVICE[backend], inputs)
    names = [name for name, x in inputs.items() if differentiable(x)]
    fixed = {name: x for name, x in inputs.items() if name not in names}
    tensors = [inputs[name].requires_grad_() for name in names]

    def ours(*x):
        return debiased_info_nce(**(dict(zip(names, x, strict=True)) | fixed | options), backend=backend)

    def truth(*x):
        return by_lists(**(dict(zip(names, x, strict=True)) | fixed | options))

    assert interpreted(backend) or torch.autograd.gradcheck(ours, tensors, fast_mode=True)
    for got, want in both([ours, truth], tensors):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


@both_backends
def test_rows_on_both_sides_of_the_floor_have_their_own_gradient(backend):
    inputs = [torch.randn(8, 3, dtype=torch.float64, device=DEVICE[backend]) for _ in range(2)]
    inputs[1][:4] += inputs[0][:4]
    inputs.append(torch.tensor(0.3, dtype=torch.float64, device=DEVICE[backend]))
    inputs, floors = [x.requires_grad_() for x in inputs], []

    def ours(a, b, t):
        return debiased_info_nce(a, b, temperature=t, tau_plus=0.3, reduction="none", backend=backend)

    def truth(a, b, t):
        return by_lists("none", 0.3, query=a, positive_key=b, temperature=t, floors=floors)

    assert torch.autograd.gradcheck(ours, inputs, fast_mode=interpreted(backend))
    for got, want in both([ours, truth], inputs):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert 2 <= sum(floors) <= 6


@cases(
    reduction=["mean", "sum", "none"],
    temperature=["float", "scalar", "per row"],
    tau=["number", "rows"],
    blocks=["one", "several"],
    pairs=True,
)
def test_gradients_of_views_are_those_of_finite_differences_and_of_lists(
    backend, reduction, temperature, tau, blocks, monkeypatch
):
    if blocks == "several":
        monkeypatch.setattr(plan, "DENSE_SELF", 0)
    device = DEVICE[backend]
    tensors = [torch.randn(4, 3, dtype=torch.float64, device=device) for _ in range(2)]
    if temperature != "float":
        shape = () if temperature == "scalar" else (8,)
        tensors.append(0.5 + 0.3 * torch.rand(shape, dtype=torch.float64, device=device))
    tensors = [x.requires_grad_() for x in tensors]
    tau = 0.2 if tau == "number" else torch.linspace(0, 0.4, 8, dtype=torch.float64, device=device)
    limit = 200 if blocks == "several" else None

    def ours(a, b, t=0.5):
        return debiased_nt_xent(a, b, t, reduction, tau_plus=tau, backend=backend, workspace_limit=limit)

    def truth(a, b, t=0.5):
        return views_by_lists(a, b, t, reduction, tau)

    assert interpreted(backend) or torch.autograd.gradcheck(ours, tensors, fast_mode=True)
    for got, want in both([ours, truth], tensors):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.3])
def test_equals_the_authors_formula(seed, tau):
    torch.manual_seed(seed)
    n, d = int(torch.randint(2, 30, ())), int(torch.randint(2, 30, ()))
    a, b = (torch.randn(n, d, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, truth = (lambda a, b: debiased_nt_xent(a, b, tau_plus=tau)), (lambda a, b: authors(a, b, 0.5, tau))
    for got, want in both([ours, truth], [a, b]):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    ours32 = debiased_nt_xent(a.detach().float(), b.detach().float(), tau_plus=tau)
    torch.testing.assert_close(ours32.double(), ours(a, b), rtol=1e-5, atol=0)


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["one key", "one sample", "ids", "both"])
def test_rows_without_negatives_have_loss_0_and_no_gradient(backend, reduction, form):
    n, device = 1 if form.startswith("one") else 4, DEVICE[backend]
    leaves = [torch.randn(n, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    leaves.append(torch.tensor(0.2, dtype=torch.float64, requires_grad=True, device=device))
    options = {"reduction": reduction, "backend": backend}
    if n > 1:
        options |= {"key_ids": torch.zeros(n, dtype=torch.int64, device=device), "symmetric": form == "both"}
    function = debiased_nt_xent if form == "one sample" else debiased_info_nce
    loss = function(*leaves[:2], temperature=leaves[2], **options)
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both_backends
@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_not_swallowed(backend, side):
    """Not even by the floor."""
    pair = [torch.randn(5, 4, device=DEVICE[backend]) for _ in range(2)]
    pair[side][0, 1] = torch.nan
    loss = debiased_info_nce(*pair, reduction="none", backend=backend, tau_plus=0.9)
    assert loss[0].isnan()
    assert loss[1:].isnan().all() == (side == 1)


def test_without_a_prior_it_is_info_nce():
    a, b = (torch.randn(7, 5, requires_grad=True) for _ in range(2))
    for ours, theirs in ((debiased_info_nce, info_nce), (debiased_nt_xent, nt_xent)):
        for got, want in both([lambda a, b, f=ours: f(a, b, temperature=0.05, tau_plus=0),
                               lambda a, b, f=theirs: f(a, b, temperature=0.05)], [a, b]):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_every_kind_of_exclusion_lowers_the_count_of_negatives():
    """The count of a row's negatives, which the loss multiplies by the prior, against lists."""
    for seed in range(40):
        torch.manual_seed(seed)
        pick = lambda name: FACTORS[name][int(torch.randint(len(FACTORS[name]), ()))]  # noqa: E731
        case = {name: pick(name) for name in FACTORS} | {"reduction": "none", "normalize": True}
        if not valid(case):
            continue
        inputs, options = make_call(7, 9, 2, 4, **case)
        floors = []
        want = by_lists(**inputs, **options, tau_plus=0.05, floors=floors)
        got = debiased_info_nce(**inputs, **options, tau_plus=0.05)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_of_views_compiled_equals_eager():
    """The form of keys is in test_every_loss."""
    a, b = (torch.randn(9, 8, requires_grad=True) for _ in range(2))
    loss = DebiasedLoss()
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(a, b)
        results.append((value, *torch.autograd.grad(value, (a, b))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)


def test_module_equals_function():
    a, b, c = (torch.randn(6, 5) for _ in range(3))
    assert torch.equal(DebiasedLoss(0.3, tau_plus=0.2)(a, b), debiased_nt_xent(a, b, 0.3, tau_plus=0.2))
    tau = torch.linspace(0, 0.5, 12)
    got = DebiasedLoss(reduction="none")(a, b, tau_plus=tau)
    assert torch.equal(got, debiased_nt_xent(a, b, reduction="none", tau_plus=tau))
    options = {"in_batch_negatives": True, "symmetric": True}
    rows = {"key_ids": torch.arange(6) % 3, "weight": torch.rand(6)}
    got = DebiasedLoss(0.3, negatives="keys", **options)(a, b, c, **rows)
    assert torch.equal(got, debiased_info_nce(a, b, c, 0.3, **options, **rows))
    assert repr(DebiasedLoss()) == "DebiasedLoss(temperature=0.5, reduction='mean')"


ROWS = torch.ones(4, 3)
BAD = {
    "prior of 1": ({"tau_plus": 1.0}, ValueError, r"tau_plus must be in \[0, 1\), got 1.0"),
    "prior below 0": ({"tau_plus": -0.1}, ValueError, r"tau_plus must be in \[0, 1\)"),
    "prior NaN": ({"tau_plus": math.nan}, ValueError, r"tau_plus must be in \[0, 1\)"),
    "prior's type": ({"tau_plus": "0.1"}, TypeError, "tau_plus must be a number"),
    "priors' dtype": ({"tau_plus": torch.zeros(4).long()}, TypeError, "tau_plus must be a number or a floating"),
    "priors' shape": (
        {"tau_plus": torch.zeros(4, 1)},
        ValueError,
        r"tau_plus must be .* tensor of shape \(4,\)",
    ),
    "a prior": ({"tau_plus": torch.ones(4)}, ValueError, r"tau_plus must be in \[0, 1\), got 1.0"),
    "priors elsewhere": ({"tau_plus": elsewhere(4)}, ValueError, "tau_plus must be on cpu"),
    "learnt priors": ({"tau_plus": torch.zeros(4, requires_grad=True)}, ValueError, "must not require a gradient"),
    "raw rows": ({"normalize": False}, ValueError, "normalize must be True, got False"),
    "temperature": ({"temperature": -1}, ValueError, "temperature must be positive and finite"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_refused(what):
    replaced, kind, message = BAD[what]
    with pytest.raises(kind, match=message):
        debiased_info_nce(**({"query": ROWS, "positive_key": ROWS} | replaced))
    if what.startswith("prior ") or what == "prior's type":
        with pytest.raises(kind, match=message):
            DebiasedLoss(**replaced)


def test_a_bad_argument_of_views_is_refused():
    for bad, message in (({"tau_plus": torch.zeros(4)}, r"shape \(8,\)"), ({"normalize": False}, "must be True")):
        with pytest.raises(ValueError, match=message):
            debiased_nt_xent(ROWS, ROWS, **bad)
    for name in ("negative_keys", "target", "weight", "key_ids"):
        with pytest.raises(ValueError, match=f"{name} needs negatives='keys'"):
            DebiasedLoss()(ROWS, ROWS, **{name: ROWS})
