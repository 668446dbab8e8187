"""compat.open_clip against open_clip's SigLipLoss, loaded without its models, which need torchvision."""

from __future__ import annotations

import inspect
import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import error, evaluate
from support.libraries import library, seeds, without_package
from support.processes import WORLD, in_two_processes
from support.side_by_side import assert_same, error_of, refuse_fallback

original = library("open_clip.loss", without_package)

from fused_infonce.compat import open_clip as drop_in  # noqa: E402

N, D = 6, 5
WAYS = ["bidir", "shift", "reduce", "gather"]


def features(n: int = N, d: int = D, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Unit rows, a text near its image."""
    image = F.normalize(torch.randn(n, d) + torch.randn(d), dim=-1)
    text = F.normalize(image + torch.randn(n, d) / 2, dim=-1)
    return {"image_features": image.to(dtype), "text_features": text.to(dtype)}


def draw_call(seed: int, rank: int = 0) -> tuple[dict[str, torch.Tensor], float, dict[str, Any]]:
    """Return the tensors of a random call, the same in kind in all processes, its temperature and its other options."""
    draw = random.Random(seed)
    torch.manual_seed(1000 * seed + rank)
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    inputs, options = features(draw.randint(1, 40), draw.choice([3, 8, 33]), dtype), {}
    scale, bias = 10 ** draw.uniform(0, 2), draw.choice([None, -10.0, -2.0, 0.5])
    for name, value in (("logit_scale", scale), ("logit_bias", bias)):
        kind = draw.choice(["number", "scalar", "one element"])
        if value is None or kind == "number":
            options[name] = value
        else:
            inputs[name] = torch.full(() if kind == "scalar" else (1,), value, dtype=dtype)
    return inputs, 1 / scale, options


@pytest.mark.parametrize("seed", seeds(240))
def test_equals_the_original(seed, monkeypatch):
    refuse_fallback(monkeypatch, drop_in)
    inputs, t, options = draw_call(seed)
    choices = {"cache_labels": seed % 2 == 0, "dist_impl": [None, *WAYS][seed % 5]}

    def loss_of(loss):
        def call(**arguments):
            result = loss(**arguments, output_dict=seed % 3 == 0)
            return result["contrastive_loss"] if seed % 3 == 0 else result

        return call

    assert_same(*(loss_of(module.SigLipLoss(**choices)) for module in (drop_in, original)), inputs, t, **options)


def test_names_order_and_defaults_are_the_originals():
    ours, theirs = drop_in.SigLipLoss, original.SigLipLoss
    for x, y in ((ours, theirs), (ours.forward, theirs.forward)):
        a, b = ([(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()] for f in (x, y))
        assert a == b
    assert issubclass(ours, theirs)
    assert set(drop_in.EXCHANGES) == set(WAYS)
    with pytest.raises(AssertionError):
        ours(dist_impl="ring")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_originals(dtype, autocast):
    inputs, same = features(dtype=dtype), 0
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        for shape, scale_dtype in itertools.product([(), (1,)], [dtype, torch.float32, torch.float64]):
            call = (*inputs.values(), torch.full(shape, 10, dtype=scale_dtype), torch.full(shape, -3.0))
            try:
                want = original.SigLipLoss()(*call)
            except RuntimeError:  # a scale with dimensions widens the features
                assert shape == (1,)
                continue
            got, same = drop_in.SigLipLoss()(*call), same + 1
            assert got.dtype == want.dtype
            assert error(got, want) <= (0.1 if autocast or dtype.itemsize == 2 else 1e-5)
    assert same >= 3


BAD: dict[str, dict[str, Any]] = {
    "other rows": {"text_features": torch.randn(N + 1, D)},
    "other components": {"text_features": torch.randn(N, D + 1)},
    "other dtype": {"text_features": torch.randn(N, D, dtype=torch.float64)},
    "a list": {"text_features": [[0.0] * D] * N},
    "no scale": {"logit_scale": None},
    "text for a bias": {"logit_bias": "1"},
    "scale 0": {"logit_scale": 0.0},
    "a negative scale": {"logit_scale": torch.tensor(-3.0)},
    "a scale a row": {"logit_scale": torch.rand(N, 1)},
    "a bias a column": {"logit_bias": torch.randn(N)},
    "an integer bias": {"logit_bias": torch.tensor(1)},
    "an infinite bias": {"logit_bias": float("inf")},
}
COMPUTED = {"scale 0", "a negative scale", "a scale a row", "a bias a column", "an integer bias", "an infinite bias"}


@pytest.mark.filterwarnings("ignore:.*the original's own code")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_or_returns_what_the_original_does(what):
    arguments = {**features(), "logit_scale": 10.0, "logit_bias": -2.0} | BAD[what]
    want = error_of(original.SigLipLoss(), **arguments)
    assert (want is None) == (what in COMPUTED)
    assert error_of(drop_in.SigLipLoss(), **arguments) is want
    if want is None:
        got, value = (module.SigLipLoss()(**arguments) for module in (drop_in, original))
        assert got.dtype == value.dtype
        torch.testing.assert_close(got, value, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("world", [3, 4, 7])
@pytest.mark.parametrize("way", ["bidir", "shift"])
def test_texts_travel_around_many_processes_as_in_the_original(way, world, monkeypatch):
    """Over a ring that is not there: what comes from a neighbour is what it must have been sent by then."""
    texts = [features()["text_features"].requires_grad_() for _ in range(world)]
    rank = 1

    def owner(x):
        return next(i for i, t in enumerate(texts) if torch.equal(x, t))

    def both(left, right, to_left, to_right):
        assert (left, right) == (0, 2)
        return texts[(owner(to_left) + 1) % world], texts[(owner(to_right) - 1) % world]

    def one(left, right, to_right):
        assert (left, right) == (0, 2)
        return texts[(owner(to_right) - 1) % world]

    monkeypatch.setattr(original, "neighbour_exchange_bidir_with_grad", both)
    monkeypatch.setattr(original, "neighbour_exchange_with_grad", one)
    image = features()["image_features"].requires_grad_()
    results = []
    for module in (drop_in, original):
        loss = module.SigLipLoss(rank=rank, world_size=world, dist_impl=way)(image, texts[rank], 10.0, -5.0)
        results.append([loss, *torch.autograd.grad(loss, [image, *texts])])
    for got, want in zip(*results, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_without_processes_an_exchange_fails_as_in_the_original():
    for way in WAYS:
        call = (*features().values(), 10.0, -10.0)
        want = error_of(original.SigLipLoss(world_size=2, dist_impl=way), *call)
        assert want is not None
        assert error_of(drop_in.SigLipLoss(world_size=2, dist_impl=way), *call) is want


def compare(rank: int) -> None:
    """Random calls, each with the four ways to exchange: loss, gradients of the features, the scale and the bias."""
    monkeypatch = pytest.MonkeyPatch()
    refuse_fallback(monkeypatch, drop_in)
    for seed, way in itertools.product(range(8), WAYS):
        inputs, t, options = draw_call(seed, rank)
        losses = [m.SigLipLoss(rank=rank, world_size=WORLD, dist_impl=way) for m in (drop_in, original)]
        assert_same(*losses, inputs, t, **options)
    monkeypatch.undo()
    for way in WAYS:  # the original's own code, after nothing was sent
        losses = [m.SigLipLoss(rank=rank, world_size=WORLD, dist_impl=way) for m in (drop_in, original)]
        values = [evaluate(loss, features(), logit_scale=-1.0, logit_bias=-1.0)[0] for loss in losses]
        assert all(x.isfinite() for x in values)


@pytest.mark.timeout(120)
def test_two_processes_give_what_the_original_gives(tmp_path):
    in_two_processes(compare, tmp_path)
