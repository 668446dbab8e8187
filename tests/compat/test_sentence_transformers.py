"""Multiple negatives ranking beside sentence-transformers' own."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from support.helpers import error
from support.libraries import library
from support.side_by_side import assert_same, error_of, refuse_fallback

library("sentence_transformers")

from sentence_transformers import util  # noqa: E402
from support.sentence_models import (  # noqa: E402
    CACHED,
    GTE,
    KINDS,
    PLAIN,
    Model,
    assert_same_in,
    both,
    call,
    columns_of,
    configuration,
    drop_in,
    features,
    originals,
)

from fused_infonce.compat import common  # noqa: E402

both_classes = pytest.mark.parametrize("name", [PLAIN, CACHED])


@both_classes
@pytest.mark.parametrize("part", range(4))
def test_random_configurations_equal_the_original(name, part, monkeypatch):
    refuse_fallback(monkeypatch, drop_in)
    options = {"mini_batch_size": 7} if name == CACHED else {}
    for seed in range(90 * part, 90 * part + 90):
        torch.manual_seed(seed)
        assert_same_in(configuration(seed), name, **options)


@pytest.mark.parametrize("directions", [("query_to_doc",), GTE])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@both_classes
def test_autocast_gives_what_the_original_gives(name, directions, given, monkeypatch):
    """The original's dtypes; values at least as near to the exact ones, but for the rounding of what is returned."""
    refuse_fallback(monkeypatch, drop_in)
    columns = columns_of(31, 24, 3, given)
    ours, theirs = both(name, directions=directions, hardness_mode="all_negatives", hardness_strength=2.0)
    results = []
    for loss, dtype in ((ours, given), (theirs, given), (theirs, torch.float64)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in columns.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float64):
            value = call(loss, **leaves)
        results.append([value, *torch.autograd.grad(value, list(leaves.values()))])
    for got, want, exact in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert error(got, exact) <= max(5e-3, error(want, exact))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("hardness", KINDS)
def test_a_scale_that_learns(shape, hardness, monkeypatch):
    refuse_fallback(monkeypatch, drop_in)
    losses = both(PLAIN, hardness_mode=hardness, hardness_strength=3.0)

    def scaled(loss, logit_scale, **columns):
        loss.scale = logit_scale
        return call(loss, **columns)

    for dtype in (torch.float32, torch.float64):
        inputs = columns_of(9, 16, 3, dtype) | {"logit_scale": torch.full(shape, 14.0, dtype=dtype)}
        assert_same(*(partial(scaled, loss) for loss in losses), inputs, 1 / 14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [torch.float32, torch.float64])
def test_a_scale_of_another_dtype(dtype, rows, monkeypatch):
    """Its value as it is, its inverse not rounded to its dtype."""
    refuse_fallback(monkeypatch, drop_in)
    columns = columns_of(9, 16, 3, rows)
    ours, theirs = (call(loss, **columns) for loss in both(PLAIN, scale=torch.tensor(30.0, dtype=dtype)))
    assert ours.dtype == theirs.dtype
    assert error(ours, theirs) <= (1e-5 if rows == torch.float32 else 1e-12)


def test_columns_of_different_dtypes(monkeypatch):
    refuse_fallback(monkeypatch, drop_in)
    columns = columns_of(9, 16, 3)
    columns["column_1"] = columns["column_1"].bfloat16()
    results = []
    for loss in both(PLAIN):
        leaves = {name: x.clone().requires_grad_() for name, x in columns.items()}
        value = call(loss, **leaves)
        results.append([value, *torch.autograd.grad(value, list(leaves.values()))])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert error(got, want) <= (1e-5 if got.dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "doc_to_query"), GTE])
def test_few_rows_give_what_the_original_gives(n, directions):
    columns = columns_of(n, 8, 3, torch.float64)
    got, want = (call(loss, **columns) for loss in both(PLAIN, directions=directions))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14, equal_nan=True)


class Metric:
    """A similarity of the user's own, as an object and as a method of a model of another kind."""

    similarity_fn_name = "cosine"

    def __call__(self, a, b):
        return 0.5 * util.cos_sim(a, b)

    def halved(self, a, b):
        return self(a, b)


@pytest.mark.parametrize("similarity", [util.euclidean_sim, Metric(), Metric().halved, partial(util.cos_sim)])
@both_classes
def test_other_similarities_are_the_originals_own(name, similarity):
    common.say_once.cache_clear()
    ours, theirs = both(name, similarity_fct=similarity)
    columns = columns_of(6, 8, 3)
    with pytest.warns(UserWarning, match=f"{name} runs the original's own code here.*similarity_fct must be cos_sim"):
        got = call(ours, **columns)
    assert torch.equal(got, call(theirs, **columns))
    assert torch.equal(got, call(ours, **columns))  # said once: another warning would be an error


def test_ragged_and_sparse_columns_are_the_originals_own():
    common.say_once.cache_clear()
    query, positive, hard = columns_of(6, 8, 3).values()
    ours, theirs = (loss.compute_loss_from_embeddings for loss in both(PLAIN))
    with pytest.warns(UserWarning, match="columns must be dense tensors of one shape"):
        got = ours([query, positive, hard[:4]], None)
    assert torch.equal(got, theirs([query, positive, hard[:4]], None))
    sparse = [x.to_sparse() for x in (query, positive)]
    assert error_of(ours, sparse, None) is error_of(theirs, sparse, None)


@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_the_similarity_of_a_model(kind, monkeypatch):
    refuse_fallback(monkeypatch, drop_in)

    class WithSimilarity(Model):
        similarity_fn_name = kind

        def similarity(self, a, b):
            return util.SimilarityFunction.to_similarity_fn(self.similarity_fn_name)(a, b)

    losses = both(PLAIN, similarity_fct=WithSimilarity().similarity, scale=3)
    assert_same(*(partial(call, loss) for loss in losses), columns_of(6, 8, 3), 1 / 3)


BAD_OPTIONS = [
    {"scale": 0}, {"scale": -1.0}, {"scale": "1"}, {"directions": ()}, {"directions": ("doc_to_query",)},
    {"directions": ("query_to_doc", "both")}, {"partition_mode": "row"}, {"hardness_mode": "hard"},
    {"directions": GTE, "partition_mode": "per_direction"}, {"hardness_strength": -1.0}, {"temperature": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
@both_classes
def test_a_bad_option_raises_what_the_original_raises(name, options):
    classes = [error_of(getattr(where, name), Model(), **options) for where in (drop_in, originals)]
    assert classes[0] is not None
    assert classes[0] is classes[1]


X = torch.ones(4, 3)
BAD_COLUMNS: dict[str, list[Any]] = {
    "no column": [], "one column": [X], "lists": [[[1.0]], [[1.0]]], "integers": [X.long(), X.long()],
    "components": [X, torch.ones(4, 2)], "mixed": [X, X.double()], "too few positives": [X, X[1:]],
    "three dimensions": [X[None], X[None]], "anchors alone": [X, None],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*own code here")
@pytest.mark.parametrize("what", BAD_COLUMNS)
@pytest.mark.parametrize("options", [{}, {"directions": GTE, "hardness_mode": KINDS[3], "hardness_strength": 1.0}])
@both_classes
def test_bad_columns_raise_what_the_original_raises(name, options, what):
    classes = []
    for loss in both(name, **options):
        if name == CACHED:
            classes.append(error_of(loss.calculate_loss, [[x] for x in BAD_COLUMNS[what]]))
        else:
            classes.append(error_of(loss.compute_loss_from_embeddings, BAD_COLUMNS[what], None))
    assert classes[0] is not None
    assert classes[0] is classes[1]


@both_classes
def test_too_few_columns_of_features(name):
    assert [error_of(loss, features(1), None) for loss in both(name)] == [ValueError, ValueError]


@both_classes
def test_it_is_the_original_to_its_trainer(name):
    options = {"scale": 30.0, "directions": GTE, "hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}
    ours, theirs = both(name, **options)
    assert isinstance(ours, type(theirs))
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.citation == theirs.citation
    assert ours.temperature == theirs.temperature == 1 / 30
    assert getattr(ours, "uses_gradient_cache", False) == (name == CACHED)
    ours.scale = 5.0
    assert ours.get_config_dict()["scale"] == 5.0


WRAPPERS = {
    "bare": lambda model, loss: loss,
    "matryoshka": lambda model, loss: originals.MatryoshkaLoss(model, loss, [12, 8, 3], [1, 0.5, 0.25]),
    "two of its dimensions": lambda model, loss: originals.MatryoshkaLoss(model, loss, [12, 8, 3], n_dims_per_step=2),
}


def through_a_model(where, name, wrapper, options, batch, gradients):
    """[loss, *gradients of the model's parameters]"""
    random.seed(0)  # dimensions of a step
    torch.manual_seed(1)  # weights and dropout
    model = Model()
    loss = WRAPPERS[wrapper](model, getattr(where, name)(model, **options))
    with torch.set_grad_enabled(gradients):
        value = loss(batch, None)
    if not gradients:
        return [value]
    (1.7 * value).backward()
    return [value.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("name", "mini_batch"),
    [(PLAIN, {}), (CACHED, {"mini_batch_size": 2}), (CACHED, {}), (CACHED, {"mini_batch_num_tokens": 9})],
    ids=str,
)
def test_through_a_model(name, mini_batch, wrapper, monkeypatch):
    """Forward and backward through a model with dropout, with GradCache's second pass and inside MatryoshkaLoss."""
    refuse_fallback(monkeypatch, drop_in)
    options = mini_batch | {"directions": GTE, "hardness_mode": "hard_negatives", "hardness_strength": 5.0}
    batch = features()
    for gradients in (True, False):
        ours, theirs = (
            through_a_model(where, name, wrapper, options, batch, gradients) for where in (drop_in, originals)
        )
        assert len(ours) == len(theirs) == (4 if gradients else 1)
        for got, want in zip(ours, theirs, strict=True):
            assert error(got, want) <= 1e-5


def test_mini_batches_change_nothing():
    columns = columns_of(17, 8, 3)
    one, many = (getattr(drop_in, CACHED)(Model(), mini_batch_size=k) for k in (99, 2))
    assert torch.equal(call(one, **columns), call(many, **columns))


@both_classes
def test_a_temperature_may_be_assigned(name):
    columns = columns_of(17, 8, 3)
    ours, theirs = both(name)
    ours.temperature = 0.25
    theirs.scale = 4.0
    assert (ours.scale, ours.temperature) == (4, 0.25)
    assert error(call(ours, **columns), call(theirs, **columns)) <= 1e-6
