"""MatryoshkaLoss against explicit sums over prefixes, and what it takes for an embedding."""

from __future__ import annotations

import itertools
from collections import namedtuple
from typing import Any

import pytest
import torch
from support.helpers import COMPILED, DEVICE, TRITON, both_backends
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_infonce import (
    ClipLoss,
    FusedInfoNCELoss,
    GroupedInfoNCELoss,
    GuidedInfoNCELoss,
    MatryoshkaLoss,
    MoCoLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
    info_nce,
    moco_loss,
)

N, D = 4, 6
DIMS, WEIGHTS = [2, 6, 4], [0.5, 1.0, 2.0]


def rows(*shape, d=D, backend="torch", dtype=torch.float64):
    return torch.randn(*shape, d, dtype=dtype, device=DEVICE[backend], requires_grad=True)


def named(backend, **shapes):
    return {name: rows(*shape, backend=backend) for name, shape in shapes.items()}


def per_row(backend):
    return (0.3 + torch.rand(N, 1, dtype=torch.float64, device=DEVICE[backend])).requires_grad_()


# name -> (module of a backend, its embeddings, the rest of its arguments, both by name)
CALLS: dict[str, Any] = {
    "info_nce": (
        lambda b: FusedInfoNCELoss(0.3, negative_mode="paired", in_batch_negatives=True, backend=b),
        lambda b: named(b, query=(N,), positive_key=(N,), negative_keys=(N, 3)),
        lambda b: {"weight": torch.rand(N, dtype=torch.float64, device=DEVICE[b]), "temperature": per_row(b)},
    ),
    "biases": (
        lambda b: FusedInfoNCELoss(0.3, negative_mode="paired", in_batch_negatives=True, backend=b),
        lambda b: named(b, query=(N,), positive_key=(N,), negative_keys=(N, D)),
        lambda b: {"negative_bias": rows(N, backend=b), "key_bias": rows(d=N, backend=b)},  # (N, H) with H = D
    ),
    "ids and targets": (
        lambda b: FusedInfoNCELoss(0.3, reduction="none", backend=b),
        lambda b: named(b, query=(N,), positive_key=(5,)),
        lambda b: {
            "target": torch.tensor([4, 0, -100, 2], device=DEVICE[b]),
            "query_ids": torch.tensor([0, 1, 1, 2], device=DEVICE[b]),
            "key_ids": torch.tensor([1, 0, 2, 1, 3], device=DEVICE[b]),
        },
    ),
    "nt_xent": (
        lambda b: NTXentLoss(0.4, backend=b),
        lambda b: named(b, view_a=(N,), view_b=(N,)),
        lambda b: {},
    ),
    "sup_con by labels": (
        lambda b: SupConLoss(0.4, backend=b),
        lambda b: named(b, features=(N, 2)),
        lambda b: {"labels": torch.tensor([0, 1, 0, 2], device=DEVICE[b])},
    ),
    "clip": (
        lambda b: ClipLoss(normalize=True, backend=b),
        lambda b: named(b, image_features=(N,), text_features=(N,)),
        lambda b: {"logit_scale": per_row(b), "logit_bias": torch.ones(1, 1, dtype=torch.float64, requires_grad=True)},
    ),
    "siglip": (
        lambda b: SigLipLoss(normalize=True, backend=b),
        lambda b: named(b, image_features=(N,), text_features=(N,)),
        lambda b: {"logit_scale": per_row(b), "logit_bias": torch.ones(1, 1, dtype=torch.float64, requires_grad=True)},
    ),
    "grouped": (
        lambda b: GroupedInfoNCELoss(D, temperature=0.4, distillation="kl_div", backend=b),
        lambda b: named(b, query=(N,), passages=(N * D,)),
        lambda b: {"teacher_scores": rows(N, backend=b).detach()},  # (N, G) with G = D
    ),
    "guided": (
        lambda b: GuidedInfoNCELoss(0.4, backend=b),
        lambda b: named(b, query=(N,), positive_key=(N,)),
        lambda b: {"guide_query": rows(N, d=3, backend=b).detach(), "guide_key": rows(N, d=3, backend=b).detach()},
    ),
}  # fmt: skip
CALLS["sup_con by a mask"] = (
    CALLS["sup_con by labels"][0],
    lambda b: named(b, features=(D, 2)),
    lambda b: {"mask": torch.rand(D, D, dtype=torch.float64, device=DEVICE[b])},  # (N, N) with N = D
)


def explicit(loss, embeddings, rest, dims=DIMS, weights=WEIGHTS):
    terms = [
        w * loss(**{name: x[..., :d].contiguous() for name, x in embeddings.items()}, **rest)
        for d, w in zip(dims, weights, strict=True)
    ]
    return torch.stack(terms).sum(0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("backend", "by"),
    [("torch", "position"), ("torch", "name"), pytest.param("triton", "position", marks=TRITON.marks)],
)
def test_losses_and_gradients_are_those_of_an_explicit_sum(backend, name, by):
    make, embeddings, rest = CALLS[name]
    loss, embeddings, rest = make(backend), embeddings(backend), rest(backend)
    dims, weights = (DIMS, WEIGHTS) if by == "position" else ([2, 4], [0.5, 2])
    wrapped = MatryoshkaLoss(loss, dims, weights)
    tensors = [x for x in (*embeddings.values(), *rest.values()) if x.requires_grad]

    def fused(*_):  # gradcheck changes the tensors in place
        given = {**embeddings, **rest}
        return wrapped(**given) if by == "name" else wrapped(*embeddings.values(), **rest)

    got, want = fused(), explicit(loss, embeddings, rest, dims, weights)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x.sum(), tensors) for x in (got, want)]
    for ours, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)
    assert all(g.abs().max() > 1e-6 for g, x in zip(*gradients[:1], tensors, strict=True) if x.numel() > 1)
    if by == "name":
        assert torch.autograd.gradcheck(fused, tensors, fast_mode=True)


def test_arguments_that_are_kept_may_be_passed_by_position():
    query, passages, teacher = rows(N), rows(N * D), rows(N).detach()
    loss = GroupedInfoNCELoss(D, temperature=0.4, distillation="kl_div")
    want = explicit(loss, {"query": query, "passages": passages}, {"teacher_scores": teacher})
    torch.testing.assert_close(MatryoshkaLoss(loss, DIMS, WEIGHTS)(query, passages, teacher), want)
    features, mask = rows(D, 2), torch.rand(D, D, dtype=torch.float64)
    want = explicit(SupConLoss(), {"features": features}, {"mask": mask})
    torch.testing.assert_close(MatryoshkaLoss(SupConLoss(), DIMS, WEIGHTS)(features, None, mask), want)


def test_more_than_two_views_are_cut_too():
    views = [rows(N) for _ in range(4)]
    want = sum(NTXentLoss()(*(x[:, :d] for x in views)) for d in DIMS)
    torch.testing.assert_close(MatryoshkaLoss(NTXentLoss(), DIMS)(*views), want)


Pair = namedtuple("Pair", "left right")


def test_embeddings_in_lists_tuples_and_dictionaries_are_cut():
    def loss(query, documents, scores, *, options):
        assert isinstance(documents, list)
        assert isinstance(documents[1], Pair)
        seen.append([x.shape for x in (query, documents[0], *documents[1], options["more"], options["weight"], scores)])
        return info_nce(query, documents[0])

    seen, query, key = [], rows(N), rows(N)
    documents = [key, Pair(rows(3), "a text")]
    documents[1] = Pair(rows(3), rows(2, 3))
    options = {"more": rows(5), "weight": rows(5), "count": 3}
    got = MatryoshkaLoss(loss, [4], keep=["scores"])(query, documents, torch.ones(N, D), options=options)
    assert torch.equal(got, info_nce(query[:, :4], key[:, :4]))
    assert seen == [[(N, 4), (N, 4), (3, 4), (2, 3, 4), (5, 4), (5, D), (N, D)]]
    assert options["more"].shape == (5, D)  # the caller's own are left alone
    assert documents[1].left.shape == (3, D)


@both_backends
def test_the_losses_temperature_is_learnt(backend):
    loss = FusedInfoNCELoss(0.2, learnable_temperature=True, backend=backend).to(DEVICE[backend])
    wrapped = MatryoshkaLoss(loss, DIMS, WEIGHTS)
    assert list(wrapped.parameters()) == [loss.logit_scale]
    query, key = rows(N, backend=backend), rows(N, backend=backend)
    want = explicit(loss, {"query": query, "positive_key": key}, {})
    ours, truth = (torch.autograd.grad(x, loss.logit_scale)[0] for x in (wrapped(query, key), want))
    torch.testing.assert_close(ours, truth)
    assert ours.abs() > 1e-4


class Operators(TorchDispatchMode):
    """The operators that run, but for views, with the shapes that they return: of those of Triton's interpreter, which
    copies whole storages, the names alone."""

    def __init__(self, backend):
        super().__init__()
        self.shapes, self.seen = backend == "torch" or COMPILED, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name() not in ("aten::slice.Tensor", "aten::detach"):
            self.seen.append((func.name(), out.shape if isinstance(out, torch.Tensor) and self.shapes else None))
        return out


@both_backends
@pytest.mark.parametrize("name", CALLS)
def test_prefixes_are_not_copied(backend, name):
    """The loss of views runs the operators that it runs on contiguous prefixes."""
    make, embeddings, rest = CALLS[name]
    loss, embeddings, rest = make(backend), embeddings(backend), rest(backend)
    given = []
    handle = loss.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    with torch.no_grad(), Operators(backend) as views:
        MatryoshkaLoss(loss, [4])(**embeddings, **rest)
    handle.remove()
    for key, x in embeddings.items():
        assert given[0][key].data_ptr() == x.data_ptr()
        assert given[0][key].stride() == x.stride()
    contiguous = {key: x.detach()[..., :4].contiguous() for key, x in embeddings.items()}
    with torch.no_grad(), Operators(backend) as copies:
        1.0 * loss(**contiguous, **rest)
    assert copies.seen
    assert views.seen == copies.seen


def test_whole_embeddings_are_passed_as_they_are():
    query, key = rows(N), rows(N)
    loss = MatryoshkaLoss(lambda q, k: torch.tensor(float(q is query and k is key)), [D])
    assert loss(query, key) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_some_dims_a_step_are_drawn_by_the_seed(count):
    seen = []
    loss = MatryoshkaLoss(lambda x: seen.append(x.shape[-1]) or x.sum(), [1, 3, 2, 6], n_dims_per_step=count)
    x = torch.ones(2, D)
    for _ in range(60):
        loss(x)
    steps = [tuple(seen[i : i + count]) for i in range(0, len(seen), count)]
    assert set(steps) == set(itertools.combinations([6, 3, 2, 1], count))
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        seen.clear()
        for _ in range(20):
            loss(x)
        draws.append(list(seen))
    assert draws[0] == draws[1] != draws[2]


def test_weights_go_with_their_dims_and_every_dim_counts_by_default():
    loss = MatryoshkaLoss(lambda x: x.sum(), [2, 5, 3], [0.25, 1, 10])
    assert (loss.dims, loss.weights) == ((5, 3, 2), (1, 10, 0.25))
    x = torch.ones(1, D)
    assert loss(x) == 2 * 0.25 + 5 + 30
    for count in (-1, 3, 7):
        assert MatryoshkaLoss(lambda x: x.sum(), [2, 5, 3], n_dims_per_step=count)(x) == 10
    assert repr(loss).startswith("MatryoshkaLoss(dims=(5, 3, 2), weights=(1.0, 10.0, 0.25), n_dims_per_step=-1")


def test_a_moco_loss_is_refused_and_its_function_takes_the_queue_as_negatives():
    moco = MoCoLoss(D, queue_size=8, temperature=0.3)
    for loss in (moco, nn.Sequential(moco)):
        with pytest.raises(TypeError, match="must not be a MoCoLoss"):
            MatryoshkaLoss(loss, [D])
    query, key = rows(N, dtype=torch.float32), rows(N, dtype=torch.float32)
    loss = MatryoshkaLoss(lambda query, key, negatives: moco_loss(query, key, negatives.T, 0.3), DIMS, WEIGHTS)
    want = sum(w * moco_loss(query[:, :d], key[:, :d], moco.queue[:d], 0.3) for d, w in zip(DIMS, WEIGHTS, strict=True))
    torch.testing.assert_close(loss(query, key, moco.queue.T), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_the_prefixes(dtype):
    query, key = (torch.randn(N, 64).to(dtype).requires_grad_() for _ in range(2))
    loss = MatryoshkaLoss(FusedInfoNCELoss(0.1), [64, 16])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(query, key)
    assert got.dtype == torch.float32
    want = sum(info_nce(query[:, :d].bfloat16(), key[:, :d].bfloat16()) for d in (64, 16))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert torch.autograd.grad(got, query)[0].dtype == dtype


def test_compiled_equals_eager():
    query, key = (rows(9, d=16, dtype=torch.float32) for _ in range(2))
    loss = MatryoshkaLoss(FusedInfoNCELoss(0.1), [16, 8])
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(query, key)
        results.append((value, *torch.autograd.grad(value, (query, key))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)


BAD = {
    "no function": ({"loss": 3}, TypeError, "loss must be a module or a function, got int"),
    "one dim": ({"dims": 64}, TypeError, "dims must be a sequence of integers, got int"),
    "dims in words": ({"dims": "64"}, TypeError, "dims must be a sequence of integers, got str"),
    "no dims": ({"dims": []}, ValueError, "dims must hold one number or more"),
    "dim 0": ({"dims": [4, 0]}, ValueError, r"dims\[1\] must be 1 or more, got 0"),
    "dim 4.0": ({"dims": [4.0]}, TypeError, r"dims\[0\] must be an integer, got float"),
    "dim True": ({"dims": [True]}, TypeError, r"dims\[0\] must be an integer, got bool"),
    "one weight": ({"weights": 1.0}, TypeError, "weights must be a sequence of numbers or None, got float"),
    "weights": ({"weights": [1.0]}, ValueError, "weights must be 2 as dims are, got 1"),
    "weight type": ({"weights": [1.0, "1"]}, TypeError, r"weights\[1\] must be a number, got str"),
    "weight below 0": ({"weights": [1.0, -1]}, ValueError, r"weights\[1\] must not be negative, and finite, got -1"),
    "weight nan": ({"weights": [torch.nan, 1]}, ValueError, r"weights\[0\] must not be negative, and finite, got nan"),
    "0 a step": ({"n_dims_per_step": 0}, ValueError, "n_dims_per_step must be 1 or more, or -1"),
    "-2 a step": ({"n_dims_per_step": -2}, ValueError, "n_dims_per_step must be -1 or more"),
    "1.0 a step": ({"n_dims_per_step": 1.0}, TypeError, "n_dims_per_step must be an integer"),
    "one name": ({"keep": "scores"}, TypeError, "keep must be a sequence of names, got str"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_option_is_refused(what):
    replaced, kind, message = BAD[what]
    with pytest.raises(kind, match=message):
        MatryoshkaLoss(**({"loss": FusedInfoNCELoss(), "dims": [4, 2]} | replaced))


X = torch.ones(N, D)
BAD_CALLS = {
    "none": ((), ValueError, "no argument of the loss is an embedding"),
    "none that counts": ((torch.ones(D), X.long(), "text"), ValueError, "no argument of the loss is an embedding"),
    "other lengths": ((X, torch.ones(N, 3)), ValueError, r"one number of components, got \[3, 6\]: name in `keep`"),
    "too short": ((X[:, :3], X[:, :3]), ValueError, "dims must be up to 3, the components of the embeddings, got 4"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_a_bad_call_is_refused(what):
    args, kind, message = BAD_CALLS[what]
    with pytest.raises(kind, match=message):
        MatryoshkaLoss(FusedInfoNCELoss(), [2, 4])(*args)


def test_a_loss_that_returns_no_tensor_is_refused():
    with pytest.raises(TypeError, match="loss must return a tensor, got float"):
        MatryoshkaLoss(lambda x: 1.0, [2])(X)


def test_a_function_without_a_signature_is_a_loss_too():
    assert MatryoshkaLoss(torch.sum, [2])(X) == 2 * N
