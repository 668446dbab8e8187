"""False negatives left out by a guide: against a loop over pairs, and the primitive's bounds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import guided as dense
from support.helpers import (
    DEVICE,
    TRITON,
    both_backends,
    bounds,
    cases,
    error,
    interpreted,
    loss_scale,
    mix,
    unit,
    watch_plans,
)
from support.memory import MIB, PeakMemory

from fused_infonce import GuidedInfoNCELoss, guided_info_nce, info_nce

N, M, H, D, G = 5, 7, 3, 4, 6
GUIDES = ("guide_query", "guide_key", "guide_negatives")


def call(negatives=None, n=N, m=M, h=H, d=D, g=G, dtype=torch.float64, device="cpu"):
    """(embeddings that need gradients, their guide)."""
    shapes = [(n,), (m,)] + ({"paired": [(n, h)], "unpaired": [(h,)]}[negatives] if negatives else [])
    rows = [torch.randn(*s, d, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]
    guide = [torch.randn(*s, g, dtype=torch.float64).to(device, dtype) for s in shapes]
    return rows, dict(zip(GUIDES, guide, strict=False))


def loop(
    rows, guide, t, *, margin=0.0, relative=False, spare=False, queries=False, keys=False, offset=0, mode=None, ids=None
):
    """One row and one pair at a time."""

    def cos(x, y):
        return F.cosine_similarity(x, y, dim=0, eps=0)

    query, key, *rest = rows
    key_ids, negative_ids = ids or (torch.arange(len(key)), torch.full(rest[0].shape[:-1], -1) if rest else None)
    guided = [*(x.detach() for x in rows)] if guide is None else [*guide.values()]
    losses = []
    for i in range(len(query)):
        y, t_i = offset + i, t if t.dim() == 0 else t[i]
        positive = cos(guided[0][i], guided[1][y])
        ceiling = positive + (margin * positive.abs() if relative else margin) + 1e-14
        others = [j for j in range(len(key)) if key_ids[j] != key_ids[y]]
        pairs = [(query[i], key[j], guided[0][i], guided[1][j]) for j in others]
        if queries:
            alike = [j for j in range(len(query)) if key_ids[offset + j] == key_ids[y]]
            pairs += [(query[i], query[j], guided[0][i], guided[0][j]) for j in range(len(query)) if j not in alike]
        if keys:
            pairs += [(key[y], key[j], guided[1][y], guided[1][j]) for j in others]
        kept = [cos(x, k) / t_i for x, k, g, h in pairs if cos(g, h) <= ceiling]
        if rest:
            given = rest[0], rest[0] if spare else guided[2], negative_ids
            own, views, their_ids = (x[i] if mode == "paired" else x for x in given)
            judged = [
                j != key_ids[y] and (spare or cos(guided[0][i], view) <= ceiling)
                for view, j in zip(views, their_ids, strict=True)
            ]
            kept += [cos(query[i], k) / t_i for k, good in zip(own, judged, strict=True) if good]
        pos = cos(query[i], key[y]) / t_i
        losses.append(torch.logsumexp(torch.stack([pos, *kept]), 0) - pos)
    return torch.stack(losses)


@cases(
    lambda c: not (c["spare"] and c["negatives"] is None),
    pairs=True,
    negatives=[None, "unpaired", "paired"],
    own=[False, True],
    margin=[0.0, -0.3, 0.2],
    strategy=["absolute", "relative"],
    spare=[False, True],
    queries=[False, True],
    keys=[False, True],
    offset=[0, 2],
    temperature=["scalar", "per row"],
    reduction=["mean", "sum", "none"],
    blocks=["one", "several"],
    with_ids=[False, True],
)
def test_gradients_are_those_of_finite_differences_and_of_a_loop(
    backend, negatives, own, margin, strategy, spare, queries, keys, offset, temperature, reduction, blocks, with_ids,
    monkeypatch,
):  # fmt: skip
    device = DEVICE[backend]
    rows, guide = call(negatives, device=device)
    t = torch.empty((N,) if temperature == "per row" else (), dtype=torch.float64, device=device)
    t.uniform_(0.2, 0.5).requires_grad_()
    if own:
        guide = None
    elif spare:
        guide.pop("guide_negatives")
    if blocks == "several":
        watch_plans(monkeypatch, rows=2, cols=3)
    ids, named = None, {}
    if with_ids:
        ids = torch.randint(4, (M,)), torch.randint(4, rows[2].shape[:-1]) if negatives else None
        named = {"key_ids": ids[0].to(device), "negative_ids": ids[1].to(device) if negatives else None}

    def fused(*inputs):
        *rows, t = inputs
        return guided_info_nce(
            *rows, temperature=t, reduction=reduction, negative_mode=negatives or "unpaired", **(guide or {}),
            margin=margin, margin_strategy=strategy, spare_negatives=spare, contrast_queries=queries,
            contrast_keys=keys, offset=offset, backend=backend, **named,
        )  # fmt: skip

    assert interpreted(backend) or torch.autograd.gradcheck(fused, (*rows, t), fast_mode=True)
    want = loop(
        rows, guide, t, margin=margin, relative=strategy == "relative", spare=spare, queries=queries, keys=keys,
        offset=offset, mode=negatives, ids=ids,
    )  # fmt: skip
    want = {"mean": want.mean(), "sum": want.sum(), "none": want}[reduction]
    got = fused(*rows, t)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (*rows, t)) for x in (got, want)), strict=True):
        assert error(a, b) <= 1e-10


@pytest.mark.parametrize("seed", range(8))
def test_the_dense_code_is_the_loop(seed):
    torch.manual_seed(seed)
    mode = [None, "unpaired", "paired"][seed % 3]
    rows, guide = call(mode)
    options = {"contrast_queries": seed % 2 == 0, "contrast_keys": seed > 3, "offset": seed % 3, "margin": -0.1}
    ids = (torch.arange(M) // 2, torch.randint(4, rows[2].shape[:-1]) if mode else None) if seed % 4 < 2 else None
    options |= {} if ids is None else {"key_ids": ids[0], "negative_ids": ids[1]}
    options |= {"temperature": 0.2, "reduction": "none", "negative_mode": mode or "unpaired"}
    got = dense.guided_info_nce(*rows, **guide, **options)
    t = torch.tensor(0.2, dtype=torch.float64)
    want = loop(rows, guide, t, margin=-0.1, queries=seed % 2 == 0, keys=seed > 3, offset=seed % 3, mode=mode, ids=ids)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@cases(
    dtype=[torch.float16, torch.bfloat16, torch.float32],
    t=[0.01, 0.05, 0.5],
    own=[False, True],
    everything=[False, True],
)
def test_losses_and_gradients_keep_the_bounds_of_infonce(backend, dtype, t, own, everything):
    """The guide decides on the rounded inputs, as the dense code does, where none of its cosines is close to a tie."""
    n, d = (40, 24) if backend == "triton" else (128, 48)
    while True:
        query = unit(n, d)
        rows = [x.to(dtype) for x in (query, mix(query, unit(n, d), 0.7), unit(n, d))]
        guide = {} if own else {name: unit(n, 32).to(dtype) for name in GUIDES}
        views = [F.normalize(x.double(), dim=1) for x in guide.values() or rows]
        ceiling = (views[0] * views[1]).sum(1, keepdim=True) + 0.05
        apart = [views[0] @ torch.cat(views).T - ceiling, views[1] @ views[1].T - ceiling]
        if torch.cat(apart, 1).abs().min() > 3e-6:
            break
    options = {"contrast_queries": everything, "contrast_keys": everything, "temperature": t, "margin": 0.05}
    exact = [x.double().requires_grad_() for x in rows]
    want = dense.guided_info_nce(*exact, **{k: g.double() for k, g in guide.items()}, **options)
    grads = torch.autograd.grad(want, exact)
    scale = loss_scale(dtype, grads)
    leaves = [x.to(DEVICE[backend]).requires_grad_() for x in rows]
    got = guided_info_nce(*leaves, **{k: g.to(DEVICE[backend]) for k, g in guide.items()}, **options, backend=backend)
    loss_bound, gradient_bound = bounds(dtype, t, n)
    assert error(got, want) <= loss_bound
    for a, b in zip(torch.autograd.grad(got * scale, leaves), grads, strict=True):
        allowed = max(gradient_bound, 2 * error((b * scale).to(dtype), b * scale))
        assert error(a.double() / scale, b) <= allowed


@both_backends
def test_something_is_left_out_and_something_is_kept(backend):
    rows, _ = call(n=16, m=16, device=DEVICE[backend])
    plain = info_nce(*rows, temperature=0.2, reduction="none")
    guided = guided_info_nce(*rows, temperature=0.2, reduction="none", backend=backend)
    assert (guided < plain - 1e-3).sum() > 4
    torch.testing.assert_close(guided_info_nce(*rows, temperature=0.2, reduction="none", margin=2.0), plain)
    nothing = guided_info_nce(*rows, temperature=0.2, reduction="none", margin=-4.0, backend=backend)
    assert torch.equal(nothing, torch.zeros_like(nothing))
    nothing = guided_info_nce(*rows, temperature=0.2, margin=-4.0, contrast_keys=True, backend=backend)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(nothing, rows))


@both_backends
@pytest.mark.parametrize(
    ("dtype", "make", "d"),
    [(torch.float32, torch.randn, 100), (torch.float32, torch.rand, 1024), (torch.bfloat16, torch.rand, 1024)],
)
def test_a_duplicate_of_the_positive_is_a_tie_that_is_kept(backend, dtype, make, d):
    """Whatever the order in which its products are added."""
    query, key = (make(48, d).to(DEVICE[backend], dtype) for _ in range(2))
    key[1::2] = key[::2]
    kept = guided_info_nce(query, key, temperature=0.1, reduction="none", backend=backend)
    without = guided_info_nce(query, key, temperature=0.1, reduction="none", backend=backend, margin=-1e-3)
    assert (kept >= math.log(2) - 1e-5).all()
    assert (without < kept).all()


@pytest.mark.parametrize(
    ("backend", "everything"),
    [("torch", True), pytest.param("triton", False, marks=TRITON.marks)],
)  # everything in Triton: in test_every_loss
def test_compiled_equals_eager_at_a_symbolic_size(backend, everything):
    def loss(query, key, negatives, **guide):
        return guided_info_nce(
            query, key, negatives, 0.1, **guide, contrast_queries=everything, contrast_keys=everything, backend=backend
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (5, 8):  # the second size is symbolic
        rows, guide = call("unpaired", n=n, m=n + 2, device=DEVICE[backend], dtype=torch.float32)
        got, want = compiled(*rows, **guide), loss(*rows, **guide)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(x, rows) for x in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


def test_the_module_equals_the_function_and_autocast_rounds_its_rows():
    rows, guide = call("paired", dtype=torch.float32)
    loss = GuidedInfoNCELoss(0.1, negative_mode="paired", margin=-0.1, contrast_queries=True)
    options = {"negative_mode": "paired", "margin": -0.1, "contrast_queries": True}
    assert torch.equal(loss(*rows, **guide), guided_info_nce(*rows, 0.1, **options, **guide))
    assert "margin=-0.1" in repr(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*rows, **guide)
    assert value.dtype == torch.float32
    narrow = [x.detach().bfloat16().float() for x in rows]
    assert error(value, guided_info_nce(*narrow, 0.1, **options, **guide)) <= 1e-5
    value.backward()
    assert all(x.grad.dtype == torch.float32 for x in rows)


@pytest.mark.parametrize("everything", [False, True])
def test_memory_of_gistembed(everything):
    """B = 512, D = 384: the B x B x D cosines of the original need 2.3 GiB."""
    rows, guide = call("unpaired", 512, 512, 512, 384, 384, torch.float32)
    with PeakMemory() as memory:
        guided_info_nce(*rows, **guide, contrast_queries=everything, contrast_keys=everything).backward()
    assert memory.peak < 50 * MIB


@both_backends
def test_autocast_with_embeddings_of_several_dtypes_as_their_own_guide(backend):
    rows, _ = call("unpaired", dtype=torch.float32, device=DEVICE[backend])
    rows[2] = rows[2].detach().bfloat16().requires_grad_()
    with torch.autocast(DEVICE[backend], dtype=torch.bfloat16):
        value = guided_info_nce(*rows, 0.1, backend=backend)
    narrow = [x.detach().bfloat16().double() for x in rows]
    assert error(value, guided_info_nce(*narrow, 0.1)) <= 1e-5
    value.backward()
    assert all(x.grad.isfinite().all() for x in rows)


def test_memory_of_paired_guides():
    """8 MiB of them in 16 bits, of which no copy is made."""
    rows, guide = call("paired", 256, 256, 32, 16, 512, torch.bfloat16)
    with PeakMemory() as memory:
        guided_info_nce(*rows, negative_mode="paired", **guide, workspace_limit=2 * MIB)
    assert memory.peak <= 2 * MIB + 8 * sum(x.nbytes for x in (*rows[:2], guide["guide_query"], guide["guide_key"]))


def test_memory_is_the_limit_and_a_few_times_the_rows():
    rows, guide = call(None, 4096, 4096, 0, 32, 32, torch.float32)
    for options in ({}, {"reduction": "none"}):
        with PeakMemory() as memory:
            guided_info_nce(*rows, **guide, workspace_limit=2 * MIB, **options).sum().backward()
        assert memory.peak <= 2 * MIB + 8 * sum(x.nbytes for x in rows)


BAD = {
    "one guide only": ({"guide_query": torch.ones(N, G)}, ValueError, "guide_key is missing"),
    "no negatives": ({"guide_negatives": torch.ones(H, G)}, ValueError, "no negative_keys"),
    "rows": ({"guide_query": torch.ones(N + 1, G), "guide_key": torch.ones(M, G)}, ValueError, "guide_query must have"),
    "components": ({"guide_query": torch.ones(N, G), "guide_key": torch.ones(M, G + 1)}, ValueError, "components"),
    "dtype": ({"guide_query": torch.ones(N, G).double(), "guide_key": torch.ones(M, G)}, TypeError, "float64"),
    "offset": ({"offset": 3}, ValueError, "positive_key must have 8 rows"),
    "strategy": ({"margin_strategy": "both"}, ValueError, "margin_strategy"),
    "margin": ({"margin": "1"}, TypeError, "margin"),
    "no number": ({"margin": math.nan}, ValueError, "margin must be finite"),
    "too large a number": ({"margin": 10**400}, ValueError, "margin must be finite"),
    "ids": ({"key_ids": torch.arange(M - 1)}, ValueError, "key_ids must have shape"),
    "not normalised": ({"normalize": False}, ValueError, "normalize"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused(case):
    options, error_type, text = BAD[case]
    rows, _ = call(dtype=torch.float32)
    with pytest.raises(error_type, match=text):
        guided_info_nce(*rows, **options)


def test_guided_calls_are_planned_apart(monkeypatch):
    """A third of the limit for the scores, for there are as many of the guide's."""
    plans = watch_plans(monkeypatch)
    rows, guide = call(n=1000, m=1000, dtype=torch.float32)
    for limit in (2**20, 2**22):
        info_nce(*rows, workspace_limit=limit)
        guided_info_nce(*rows, workspace_limit=limit, **guide)
    assert [chosen.name for chosen in plans] == ["onepass", "workspace", "onepass", "onepass"]
    assert plans[1].rows * plans[1].cols * 4 <= 2**20 / 3
    assert plans[3].rows * 1000 * 4 <= 2**22 / 3
