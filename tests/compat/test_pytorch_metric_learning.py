"""NTXentLoss and SupConLoss against those of pytorch-metric-learning."""

from __future__ import annotations

import contextlib
import copy
import random
from types import SimpleNamespace

import pytest
import torch
from support.helpers import DEVICE, cases
from support.libraries import library
from support.side_by_side import error_of, refuse_fallback

library("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu  # noqa: E402

from fused_infonce.compat import common  # noqa: E402
from fused_infonce.compat import pytorch_metric_learning as fused  # noqa: E402

NAMES = ["NTXentLoss", "SupConLoss"]
both_losses = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def says_again():
    common.say_once.cache_clear()


@pytest.fixture
def only_fused(monkeypatch):
    refuse_fallback(monkeypatch, fused)


def all_pairs(labels, ref_labels, own):
    """As the wrappers make it."""
    pairs = lmu.get_all_pairs_indices(labels, ref_labels)
    return lmu.remove_self_comparisons(pairs, torch.arange(len(labels)), len(ref_labels)) if own else pairs


def configuration(seed, name):
    """A random call that is fused: rows, labels and what they are compared with, and the options of the loss."""
    draw = random.Random(f"{seed} {name}")
    torch.manual_seed(seed)
    n, m, d, classes = draw.randint(2, 40), draw.randint(1, 50), draw.randint(2, 48), draw.randint(1, 12)
    kind = draw.choice(["self", "self", "twins", "ref", "ref", "ref frozen", "same labels", "tuple", "tuple with own"])
    dtype, autocast = draw.choice(
        [(torch.float32, None)] * 12 + [(torch.float64, None), (torch.bfloat16, None), (torch.float16, None)]
        + [(torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
    )  # fmt: skip
    narrow = dtype in (torch.bfloat16, torch.float16) or (autocast and dtype != torch.float64)
    if kind == "twins":
        n = 2 * ((n + 1) // 2)
        labels = torch.randperm(n) % (n // 2)
    else:
        labels = torch.randint(classes, (n,))
    if kind in ("same labels", "tuple with own"):
        m = n
    ref_labels = labels if kind in ("same labels", "tuple with own") else torch.randint(classes, (m,))
    some = [reducers.MeanReducer(), reducers.SumReducer(), reducers.ClassWeightedReducer(torch.rand(n + 50)), None]
    some += [reducers.DoNothingReducer(), reducers.PerAnchorReducer()] if kind in ("self", "twins") else []
    if not narrow:  # where a loss that was rounded may pass a threshold and another not
        some += [reducers.AvgNonZeroReducer(), reducers.ThresholdReducer(low=0.3, high=3)]
        if draw.random() < 0.3:
            change = draw.choice([lambda x: x.float() - 5, lambda x: x.to(torch.uint8), lambda x: x.int() - 7])
            labels, ref_labels = change(labels), change(ref_labels)
            some = [x for x in some if not isinstance(x, reducers.ClassWeightedReducer)]  # which index with labels
    plain = draw.random() < 0.25  # rows as they are
    options = {
        "reducer": draw.choice(some),
        "distance": distances.DotProductSimilarity(normalize_embeddings=False) if plain
        else draw.choice([distances.DotProductSimilarity, distances.CosineSimilarity])(),
        "embedding_regularizer": regularizers.LpRegularizer() if draw.random() < 0.15 and not narrow else None,
    }  # fmt: skip
    if isinstance(options["reducer"], reducers.DoNothingReducer):
        options["embedding_regularizer"] = None
    t = draw.choice([0.07, 0.1, 0.3, 1.0]) * (2 * d**0.5 if plain else 1)
    kind_of_t = draw.choice(["number", "number", "default", "scalar", "one"])
    inputs = {"embeddings": torch.randn(n, d).to(dtype)}
    if kind_of_t != "number":
        inputs["temperature"] = torch.tensor([t] if kind_of_t == "one" else t)
        inputs["temperature"] = inputs["temperature"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    if kind_of_t != "default" or plain:
        options["temperature"] = t
    else:
        inputs.pop("temperature")
    indices = None
    if kind not in ("self", "twins"):
        inputs["ref_emb"] = torch.randn(m, d).to(dtype)
        if kind.startswith("tuple"):
            indices = all_pairs(labels, ref_labels, kind == "tuple with own")
    else:
        ref_labels = None
    frozen = ("ref_emb",) if kind == "ref frozen" else ()
    return SimpleNamespace(
        name=name, inputs=inputs, labels=labels, indices=indices, ref_labels=ref_labels, options=options, frozen=frozen,
        dtype=dtype, autocast=autocast, narrow=narrow,
    )  # fmt: skip


def run(source, call, dtype=None, round_to=None):
    """(loss, gradients) of a call, in `dtype` if one is given, and in None what a DoNothingReducer gave beside."""
    values = {key: x if round_to is None or key == "temperature" else x.to(round_to) for key, x in call.inputs.items()}
    leaves = {key: (x if dtype is None else x.to(dtype)).clone() for key, x in values.items()}
    for key, leaf in leaves.items():
        leaf.requires_grad_(key not in call.frozen)
    loss = getattr(source, call.name)(**copy.deepcopy(call.options))
    if "temperature" in leaves:
        loss.temperature = leaves["temperature"]
    autocast = torch.autocast("cpu", call.autocast) if call.autocast and dtype is None else contextlib.nullcontext()
    with autocast:
        value = loss(leaves["embeddings"], call.labels, call.indices, leaves.get("ref_emb"), call.ref_labels)
    beside = None
    if isinstance(value, dict):
        ((key, beside),) = value.items()
        assert key == "loss"
        value = beside.pop("losses")
    if not isinstance(value, torch.Tensor):  # DoNothingReducer, without pairs
        return {"loss": torch.tensor(float(value))}, beside
    upstream = torch.linspace(1, 2, value.numel()).reshape(value.shape).to(value)
    wanted = {key: x for key, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(value, [*wanted.values()], upstream, materialize_grads=True)
    return {"loss": value.detach(), **dict(zip(wanted, gradients, strict=True))}, beside


def same(x, y):
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("seed", range(330))
@both_losses
def test_equals_the_original(name, seed, only_fused):
    call = configuration(seed, name)
    ours, beside = run(fused, call)
    theirs, beside_theirs = run(losses, call)
    exact, _ = run(losses, call, torch.float64, call.autocast if call.narrow else None)
    bound = 1e-2 if call.narrow else 1e-5 if call.dtype == torch.float32 else 1e-10
    assert ours.keys() == theirs.keys()
    for key, got in ours.items():
        want, true = theirs[key].double(), exact[key]
        assert got.dtype == theirs[key].dtype, key
        assert got.shape == theirs[key].shape, key
        allowed = bound * (10 if key == "temperature" else 1) * true.norm() + torch.finfo(got.dtype).tiny
        assert (got.double() - true).norm() <= allowed, key
        if not (call.narrow and want.isnan().any()):  # 0 / 0, of rows without positives in 16 bits
            assert (got.double() - want).norm() <= allowed + (want - true).norm(), key
    if beside is not None:
        assert beside["reduction_type"] == beside_theirs["reduction_type"]
        assert type(beside["indices"]) is type(beside_theirs["indices"])
        pairs = beside["indices"] if isinstance(beside["indices"], tuple) else (beside["indices"],)
        theirs = beside_theirs["indices"] if isinstance(beside["indices"], tuple) else (beside_theirs["indices"],)
        assert all(same(x, y) for x, y in zip(pairs, theirs, strict=True))


def test_random_configurations_are_of_every_kind():
    calls = [configuration(seed, name) for seed in range(330) for name in NAMES]
    used = {type(call.options["reducer"]).__name__ for call in calls}
    assert used >= {"MeanReducer", "SumReducer", "AvgNonZeroReducer", "DoNothingReducer", "PerAnchorReducer"}
    assert used >= {"ThresholdReducer", "ClassWeightedReducer", "NoneType"}
    assert {call.dtype for call in calls} == {torch.float32, torch.float64, torch.float16, torch.bfloat16}
    assert sum(call.dtype == torch.float32 and not call.autocast for call in calls) >= 400
    assert sum(call.options["embedding_regularizer"] is not None for call in calls) >= 20
    assert sum("ref_emb" in call.inputs for call in calls) >= 200
    assert sum(call.indices is not None for call in calls) >= 50
    assert sum("temperature" in call.inputs for call in calls) >= 100


@cases(name=NAMES, kind=["self", "twins", "ref", "same labels"], normalize=[True, False], pairs=True)
def test_gradients_are_those_of_finite_differences(backend, name, kind, normalize):
    device = DEVICE[backend]
    n, d = 6, 3
    x, y = (torch.randn(size, d, dtype=torch.float64, device=device, requires_grad=True) for size in (n, 5))
    t = torch.tensor(0.6, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 2, 0, 1] if kind == "twins" else [0, 1, 0, 2, 0, 1], device=device)
    ref_labels = torch.tensor([1, 0, 0, 3, 1], device=device)

    def f(x, y, t):
        loss = getattr(fused, name)(t, distance=distances.DotProductSimilarity(normalize_embeddings=normalize))
        loss.backend = backend
        if kind == "ref":
            return loss(x, labels, None, y, ref_labels)
        if kind == "same labels":
            return loss(x[:5], ref_labels, None, y, ref_labels)
        return loss(x, labels) + 0 * y.sum()

    assert torch.autograd.gradcheck(f, (x, y, t), fast_mode=backend == "triton")
    assert all(g.any() for g in torch.autograd.grad(f(x, y, t), (x, t)))


ZERO = {
    "no positives": ([0, 1, 2, 3], None),
    "no negatives": ([0, 0, 0], None),
    "one row": ([3], None),
    "no rows": ([], None),
    "no keys": ([0, 1], []),
    "one positive, one negative": ([0], [0, 1]),
    "one positive": ([0, 1], [0]),
    "two positives, one negative": ([0], [0, 1, 0]),
    "one positive, two negatives": ([0], [0, 1, 2]),
    "rows without positives": ([0, 1, 1, 2], None),
    "rows without negatives": ([0, 1, 0], [0, 0, 0]),
    "one key, equal": ([0, 0, 1], [0]),
    "one positive of each": ([0, 1], [0, 1]),
}


@pytest.mark.parametrize("what", ZERO)
@pytest.mark.parametrize("reducer", [None, "mean", "nothing", "nonzero"])
@both_losses
def test_few_pairs_give_what_the_original_gives(name, what, reducer, only_fused):
    """Where the original gives zeros, with its gradients and its statement of what they are of."""
    labels, ref_labels = (None if x is None else torch.tensor(x, dtype=torch.long) for x in ZERO[what])
    made = {
        None: None, "mean": reducers.MeanReducer(), "nothing": reducers.DoNothingReducer(),
        "nonzero": reducers.AvgNonZeroReducer(),
    }[reducer]  # fmt: skip
    inputs = {"embeddings": torch.randn(len(labels), 4)}
    if ref_labels is not None:
        inputs["ref_emb"] = torch.randn(len(ref_labels), 4)
    call = SimpleNamespace(
        name=name, inputs=inputs, labels=labels, indices=None, ref_labels=ref_labels, frozen=(), autocast=None,
        options={"reducer": made, "temperature": 0.5},
    )  # fmt: skip
    (ours, beside), (theirs, beside_theirs) = run(fused, call), run(losses, call)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-7)
    if beside is not None:
        assert beside["reduction_type"] == beside_theirs["reduction_type"]


X, Y, A, B = torch.randn(5, 4), torch.randn(3, 4), torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 1, 0])
BAD = {
    "no labels": ((X,), {}),
    "a list": (([[1.0]], A), {}),
    "labels of another number": ((X, A[:4]), {}),
    "labels in a column": ((X, A[:, None]), {}),
    "labels in a list": ((X, [0, 1, 0, 1, 2]), {}),
    "one dimension": ((torch.randn(5), A), {}),
    "three dimensions": ((torch.randn(5, 4, 2), A), {}),
    "integers": ((X.long(), A), {}),
    "components": ((X, A, None, torch.randn(3, 5), B), {}),
    "dtypes": ((X, A, None, Y.double(), B), {}),
    "ref_labels of another number": ((X, A, None, Y, A), {}),
    "fewer keys than labels": ((X, A, None, Y), {}),
    "a pair of indices": ((X, A, (A, A)), {}),
    "indices out of range": ((X, A, (A + 9, A, A, A)), {}),
    "indices that are words": ((X, A, ("ab", "bc", "cd", "de")), {}),
    "temperature": ((X, A), {"temperature": None}),
    "a word": ((X, A), {"temperature": "0.1"}),
    "an option": ((X, A), {"normalize": True}),
    "weights of two dimensions": ((X, A), {"reducer": reducers.ThresholdReducer}),
}


@pytest.mark.parametrize("what", BAD)
@both_losses
@pytest.mark.filterwarnings("ignore:.*runs the original's own code")
def test_bad_input_raises_what_the_original_raises(name, what):
    args, options = BAD[what]
    ours, theirs = (
        error_of(lambda source=source: getattr(source, name)(**options)(*args)) for source in (fused, losses)
    )
    assert ours is theirs is not None


PAIRS = all_pairs(A, A, True)
OTHERS = {
    "some negatives": (PAIRS[0], PAIRS[1], PAIRS[2][::2], PAIRS[3][::2]),
    "a negative twice": (PAIRS[0], PAIRS[1], PAIRS[2].roll(1), torch.cat([PAIRS[3][-1:], PAIRS[3][:-2], PAIRS[3][:1]])),
    "another order": (PAIRS[0].flip(0), PAIRS[1].flip(0), *PAIRS[2:]),
    "negatives in another order": (*PAIRS[:2], PAIRS[2].flip(0), PAIRS[3].flip(0)),
    "too many positives missing": (PAIRS[0][:0], PAIRS[1][:0], *PAIRS[2:]),
    "triplets": tuple(lmu.get_all_triplets_indices(A)),
    "a positive in place of a negative": (
        *PAIRS[:2],
        torch.cat([A[:1], PAIRS[2][1:]]),
        torch.cat([A[:1], PAIRS[3][1:]]),
    ),
    "a key before the first": (torch.cat([A[:1], PAIRS[0]]), torch.cat([A[:1] - 1, PAIRS[1]]), *PAIRS[2:]),
    "negative indices": (PAIRS[0] - 5, *PAIRS[1:]),
    "positives among the negatives": (*PAIRS[2:], *PAIRS[:2]),
}


@both_losses
def test_tuples_are_read_in_parts(name, monkeypatch, only_fused):
    for size in (1, 2, 3, 1000):
        monkeypatch.setattr(fused, "CHECKED", size)
        torch.testing.assert_close(getattr(fused, name)()(X, A, PAIRS), getattr(losses, name)()(X, A))


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("size", [1, 2**20])
@both_losses
def test_other_tuples_are_the_originals(name, what, size, monkeypatch):
    monkeypatch.setattr(fused, "CHECKED", size)  # of the parts in which a tuple is read
    x = torch.randn(5, 4, requires_grad=True)
    if refused := error_of(getattr(losses, name)(), x, A, OTHERS[what]):
        assert error_of(getattr(fused, name)(), x, A, OTHERS[what]) is refused
        return
    with pytest.warns(
        UserWarning, match=f"{name} runs the original's own code here.*indices_tuple is not all pairs.*miner"
    ):
        got = getattr(fused, name)()(x, A, OTHERS[what])
    want = getattr(losses, name)()(x, A, OTHERS[what])
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True):
        assert torch.equal(a, b)


OTHER_LABELS = {
    "NaN": (torch.tensor([0.0, 1, 0, 1, torch.nan]), B),
    "NaN among the keys": (A, torch.tensor([0.0, torch.nan, 0])),
    "none of more keys": (A[:3], None),
}


@pytest.mark.parametrize("what", OTHER_LABELS)
@both_losses
def test_other_labels_are_the_originals(name, what):
    labels, ref_labels = OTHER_LABELS[what]
    call = (X[: len(labels)], labels, None, torch.randn(5 if ref_labels is None else 3, 4), ref_labels)
    with pytest.warns(UserWarning, match=f"{name} runs the original's own code here.*labels"):
        got = getattr(fused, name)()(*call)
    assert torch.equal(got, getattr(losses, name)()(*call))


@both_losses
def test_one_tensor_as_the_labels_of_rows_and_keys(name, only_fused):
    """Then the original takes key i for row i itself, whatever it holds."""
    labels = torch.arange(4).repeat(2)
    x, y = torch.randn(2, 8, 4)
    got, want = (getattr(source, name)()(x, labels, None, y, labels) for source in (fused, losses))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
