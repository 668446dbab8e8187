"""GISTEmbed, plain and cached, beside sentence-transformers' own."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.helpers import error
from support.libraries import library
from support.processes import in_two_processes
from support.side_by_side import assert_same, error_of, refuse_fallback
from torch import nn

originals = library("sentence_transformers.sentence_transformer.losses")

from support.sentence_models import Given  # noqa: E402

from fused_infonce.compat import common  # noqa: E402
from fused_infonce.compat import sentence_transformers as drop_in  # noqa: E402

PLAIN, CACHED = "GISTEmbedLoss", "CachedGISTEmbedLoss"
both_classes = pytest.mark.parametrize("name", [PLAIN, CACHED])


def both(name, **options):
    return [getattr(where, name)(Given("rows"), Given("guide"), **options) for where in (drop_in, originals)]


def call(loss, guides, **columns):
    """The loss of embeddings and the guide's, of a cached loss in mini-batches."""
    rows = list(columns.values())
    guides = [x.to(rows[0].dtype) if x.dtype != torch.float32 else x for x in guides]
    guides = [x.double() for x in guides] if rows[0].dtype == torch.float64 else guides
    if hasattr(loss, "mini_batch_size"):
        return loss.calculate_loss(*([list(x.split(loss.mini_batch_size)) for x in part] for part in (rows, guides)))
    return loss([{"rows": x, "guide": g} for x, g in zip(rows, guides, strict=True)], None)


def configuration(seed, most=3):
    """(rows, components, those of the guide, columns, dtype, options) of a random call."""
    draw = random.Random(seed)
    options = {
        "temperature": draw.choice([0.01, 0.02, 0.05, 0.1, 1]),
        "margin_strategy": draw.choice(["absolute", "relative"]),
        "margin": draw.choice([0.0, 0.0, 0.05, 0.3]),
        "contrast_anchors": draw.random() < 0.6,
        "contrast_positives": draw.random() < 0.6,
    }
    dtype = draw.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16])
    return draw.randint(1, 40), draw.randint(2, 48), draw.randint(2, 40), draw.randint(2, most), dtype, options


def columns_of(n, d, g, count, dtype, options):
    """(columns, guide's): anchors, positives somewhat alike, negatives. No cosine of the guide's is near its ceiling,
    where rounding decides."""
    while True:
        tables = []
        for size in (d, g):
            anchor = torch.randn(n, size, dtype=torch.float64)
            others = [0.6 * anchor + torch.randn(n, size, dtype=torch.float64) for _ in range(count - 1)]
            tables.append([x.to(dtype) for x in (anchor, *others)])
        rows, guides = tables
        views = [F.normalize(x.double(), dim=1) for x in guides]
        pair = (views[0] * views[1]).sum(1, keepdim=True)
        margin = options["margin"] * (pair.abs() if options["margin_strategy"] == "relative" else 1)
        differences = torch.cat([views[0] @ torch.cat(views).T, views[1] @ views[1].T], 1) - pair + margin
        differences[torch.arange(n), n + torch.arange(n)] = 1  # the pair itself
        if differences.abs().min() > 1e-5:
            return {f"column_{i}": x for i, x in enumerate(rows)}, guides


def assert_same_in(configuration, name, **more):
    n, d, g, count, dtype, options = configuration
    columns, guides = columns_of(n, d, g, count, dtype, options)
    try:
        losses = both(name, **options, **more)
        assert_same(*(partial(call, loss, guides) for loss in losses), columns, options["temperature"])
    except AssertionError as why:
        raise AssertionError(f"{n} x {d}, {g} of the guide, {count} columns, {dtype}, {options}") from why


@both_classes
@pytest.mark.parametrize("part", range(4))
def test_random_configurations_equal_the_original(name, part, monkeypatch):
    refuse_fallback(monkeypatch, drop_in)
    more = {"mini_batch_size": 7} if name == CACHED else {}
    for seed in range(90 * part, 90 * part + 90):
        torch.manual_seed(seed)
        assert_same_in(configuration(seed, most=5 if name == CACHED else 3), name, **more)


def in_one_of_two_processes(rank):
    """Its anchors against the candidates of both."""
    for seed in range(20):
        for name in (PLAIN, CACHED):
            torch.manual_seed(100 * seed + rank)
            with pytest.MonkeyPatch.context() as patch:
                refuse_fallback(patch, drop_in)
                assert_same_in(configuration(seed), name, gather_across_devices=True)


def test_two_processes_give_what_the_original_gives(tmp_path):
    in_two_processes(in_one_of_two_processes, tmp_path)


@both_classes
def test_autocast_and_a_temperature_that_learns(name, monkeypatch):
    refuse_fallback(monkeypatch, drop_in)
    columns, guides = columns_of(13, 24, 16, 3, torch.float32, {"margin": 0.0, "margin_strategy": "absolute"})
    for given in (torch.float32, torch.bfloat16):
        ours, theirs = both(name)
        results = []
        for loss, dtype in ((ours, given), (theirs, given), (theirs, torch.float64)):
            loss.temperature = torch.tensor(0.1, requires_grad=True)
            leaves = [x.to(given).to(dtype).requires_grad_() for x in columns.values()]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float64):
                value = call(loss, guides, **{f"column_{i}": x for i, x in enumerate(leaves)})
            results.append([value, *torch.autograd.grad(value, [*leaves, loss.temperature])])
        of_temperature = results[0].pop()
        assert of_temperature.isfinite()  # theirs is NaN: what is left out has a logit of -inf / t there
        for got, want, exact in zip(*results, strict=False):
            assert got.dtype == want.dtype
            assert error(got, exact) <= max(5e-3, error(want, exact))


def test_what_cannot_be_fused_is_the_originals_own():
    common.say_once.cache_clear()
    columns, guides = columns_of(6, 8, 5, 3, torch.float32, {"margin": 0.0, "margin_strategy": "absolute"})
    ours, theirs = both(PLAIN)
    for loss in (ours, theirs):
        loss.similarity_fct = nn.PairwiseDistance()
        loss.sim_matrix = lambda x, y: 0.5 * F.cosine_similarity(x[:, None], y[None], dim=-1)
    with pytest.warns(UserWarning, match="GISTEmbedLoss runs the original's own code here.*similarity_fct"):
        got = call(ours, guides, **columns)
    assert torch.equal(got, call(theirs, guides, **columns))


def test_a_negative_margin_is_the_originals_own():
    """There an anchor may then be its own negative."""
    common.say_once.cache_clear()
    columns, guides = columns_of(6, 8, 5, 3, torch.float32, {"margin": -0.5, "margin_strategy": "absolute"})
    ours, theirs = both(PLAIN, margin=-0.5)
    with pytest.warns(UserWarning, match="margin must not be negative"):
        got = call(ours, guides, **columns)
    assert torch.equal(got, call(theirs, guides, **columns))


X = torch.randn(4, 3)
BAD_COLUMNS = {
    "none": [], "one": [X], "four": [X] * 4, "integers": [X.long(), X.long()], "components": [X, torch.ones(4, 2)],
    "too few positives": [X, X[1:]],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*own code here")
@pytest.mark.parametrize("what", BAD_COLUMNS)
def test_bad_columns_raise_what_the_original_raises(what):
    features = [{"rows": x, "guide": x.float()} for x in BAD_COLUMNS[what]]
    classes = [error_of(loss, features, None) for loss in both(PLAIN)]
    assert classes[0] is not None
    assert classes[0] is classes[1]


@both_classes
@pytest.mark.parametrize("options", [{"margin_strategy": "both"}, {"mode": 1}], ids=str)
def test_a_bad_option_raises_what_the_original_raises(name, options):
    classes = [
        error_of(getattr(where, name), Given("rows"), Given("guide"), **options) for where in (drop_in, originals)
    ]
    assert classes[0] is not None
    assert classes[0] is classes[1]


def test_it_is_the_original_to_its_trainer():
    for name in (PLAIN, CACHED):
        ours, theirs = both(name, margin=0.1)
        assert isinstance(ours, type(theirs))
        assert type(ours).__name__ == type(theirs).__name__
        assert {k: v for k, v in ours.get_config_dict().items() if k != "guide"} == {
            k: v for k, v in theirs.get_config_dict().items() if k != "guide"
        }
        assert getattr(ours, "citation", "") == getattr(theirs, "citation", "")
