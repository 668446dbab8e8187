"""compat.open_clip against open_clip's ClipLoss, loaded without its models, which need torchvision."""

from __future__ import annotations

import inspect
import itertools
import random
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import DEVICE, both_backends, error, evaluate
from support.libraries import library, seeds, without_package
from support.processes import WORLD, in_two_processes
from support.side_by_side import assert_same, error_of, refuse_fallback

original = library("open_clip.loss", without_package)

from fused_infonce.backends import registry  # noqa: E402
from fused_infonce.compat import common  # noqa: E402
from fused_infonce.compat import open_clip as drop_in  # noqa: E402

N, D = 6, 5


def features(n: int = N, d: int = D, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Unit rows, a text near its image."""
    image = F.normalize(torch.randn(n, d) + torch.randn(d), dim=-1)
    text = F.normalize(image + torch.randn(n, d) / 2, dim=-1)
    return {"image_features": image.to(dtype), "text_features": text.to(dtype)}


@pytest.mark.parametrize("seed", seeds(440))
def test_equals_the_original(seed, monkeypatch):
    """Shapes, scales and biases of every kind, constructor options that change nothing in one process, dtypes."""
    refuse_fallback(monkeypatch, drop_in)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    inputs = features(draw.randint(2, 50), draw.choice([3, 8, 17, 64]), dtype)
    scale, options = 10 ** draw.uniform(0, 2), {}
    kind = draw.choice(["float", "scalar", "one element", "1 x 1"])
    if kind == "float":
        options["logit_scale"] = scale
    else:
        shape = {"scalar": (), "one element": (1,), "1 x 1": (1, 1)}[kind]
        inputs["logit_scale"] = torch.full(shape, scale, dtype=dtype)
    bias = draw.choice([None, None, -10.0, torch.tensor(-2.0), torch.tensor([3.0])])
    choices = {"cache_labels": draw.random() < 0.5, "local_loss": draw.random() < 0.5, "rank": 0, "world_size": 1}
    classes = [module.ClipLoss(**choices) for module in (drop_in, original)]
    as_dict = draw.random() < 0.5

    def loss_of(loss):
        def call(**arguments):
            result = loss(**arguments, logit_bias=bias, output_dict=as_dict)
            assert (list(result) == ["contrastive_loss"]) if as_dict else isinstance(result, torch.Tensor)
            return result["contrastive_loss"] if as_dict else result

        return call

    assert_same(*map(loss_of, classes), inputs, 1 / scale, **options)


def test_names_order_and_defaults_are_the_originals():
    for ours, theirs in ((drop_in.ClipLoss, original.ClipLoss), (drop_in.ClipLoss.forward, original.ClipLoss.forward)):
        a, b = ([(p.name, p.default, p.kind) for p in inspect.signature(x).parameters.values()] for x in (ours, theirs))
        assert a == b
    loss = drop_in.ClipLoss(cache_labels=True)
    assert isinstance(loss, original.ClipLoss)
    assert type(loss).__name__ == "ClipLoss"
    image, text = features().values()
    logits = [x.get_logits(image, text, 10.0, -1.0) for x in (loss, original.ClipLoss())]
    assert all(torch.equal(got, want) for got, want in zip(*logits, strict=True))
    assert torch.equal(loss.get_ground_truth(image.device, N), torch.arange(N))
    assert torch.equal(loss(image, text, 10.0, None, True)["contrastive_loss"], loss(image, text, logit_scale=10.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_originals(dtype, autocast):
    inputs = features(dtype=dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        for shape, scale_dtype in itertools.product([(), (1,)], [dtype, torch.float32, torch.float64]):
            scale = torch.full(shape, 10, dtype=scale_dtype)
            try:
                want = original.ClipLoss()(**inputs, logit_scale=scale)
            except RuntimeError:  # a scale with dimensions widens the features
                assert shape == (1,)
                continue
            got = drop_in.ClipLoss()(**inputs, logit_scale=scale)
            assert got.dtype == want.dtype
            assert error(got, want) <= (0.1 if autocast or dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_rounded_once(dtype):
    inputs = features(33, 16, dtype)
    exact, gradients = evaluate(original.ClipLoss(), {k: x.double() for k, x in inputs.items()}, logit_scale=10.0)
    got = evaluate(drop_in.ClipLoss(), inputs, logit_scale=10.0)
    assert error(got[0], exact) <= torch.finfo(dtype).eps / 2
    for name, gradient in gradients.items():
        assert error(got[1][name], gradient) <= 5e-3


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bias_has_a_gradient_and_it_is_zero(shape):
    inputs = features() | {"logit_bias": torch.full(shape, -10.0)}
    want, got = (evaluate(module.ClipLoss(), inputs, logit_scale=10.0)[1] for module in (original, drop_in))
    assert torch.equal(got["logit_bias"], torch.zeros(shape))
    assert want["logit_bias"].abs() < 1e-6


BAD: dict[str, dict[str, Any]] = {
    "other rows": {"text_features": torch.randn(N + 1, D)},
    "other components": {"text_features": torch.randn(N, D + 1)},
    "other dtype": {"text_features": torch.randn(N, D, dtype=torch.float64)},
    "three dimensions": {"image_features": torch.randn(N, 1, D)},
    "a list": {"text_features": [[0.0] * D] * N},
    "no scale": {"logit_scale": None},
    "text for a scale": {"logit_scale": "10"},
    "scale 0": {"logit_scale": 0.0},
    "a negative scale": {"logit_scale": torch.tensor(-3.0)},
    "an integer scale": {"logit_scale": torch.tensor(3)},
    "a scale a row": {"logit_scale": torch.rand(N, 1)},
    "a scale a component": {"logit_scale": torch.rand(D)},
    "scales that do not fit": {"logit_scale": torch.rand(N + D)},
    "a scale of 3 dimensions": {"logit_scale": torch.ones(1, 1, 1)},
    "a bias a column": {"logit_bias": torch.randn(N)},
    "a bias that does not fit": {"logit_bias": torch.randn(N + 1)},
    "text for a bias": {"logit_bias": "1"},
    "an integer bias": {"logit_bias": torch.tensor(1)},
    "integers": {"image_features": torch.ones(N, D).long(), "text_features": torch.ones(N, D).long()},
    "no rows": {"image_features": torch.ones(0, D), "text_features": torch.ones(0, D)},
}
COMPUTED = {
    "scale 0", "a negative scale", "an integer scale", "a scale a row", "a scale a component", "a bias a column",
    "an integer bias", "no rows",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*the original's own code")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_or_returns_what_the_original_does(what):
    arguments = {**features(), "logit_scale": 10.0} | BAD[what]
    want = error_of(original.ClipLoss(), **arguments)
    assert (want is None) == (what in COMPUTED)
    assert error_of(drop_in.ClipLoss(), **arguments) is want
    if want is None:
        got, value = (module.ClipLoss()(**arguments) for module in (drop_in, original))
        assert got.dtype == value.dtype
        torch.testing.assert_close(got, value, rtol=1e-6, atol=0, equal_nan=True)


def test_the_originals_own_code_is_said_once():
    common.say_once.cache_clear()
    inputs = features()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scale in (-10.0, -10.0, -5.0):
            assert torch.equal(*(m.ClipLoss()(**inputs, logit_scale=scale) for m in (drop_in, original)))
    assert len(caught) == 1
    assert "ClipLoss runs the original's own code here" in str(caught[0].message)


def test_without_processes_gathering_fails_as_in_the_original():
    for options in ({"gather_with_grad": True}, {"local_loss": True}, {"use_horovod": True}):
        want = error_of(original.ClipLoss(world_size=2, **options), **features(), logit_scale=10.0)
        assert want is not None
        assert error_of(drop_in.ClipLoss(world_size=2, **options), **features(), logit_scale=10.0) is want


@both_backends
def test_gradients_of_the_local_loss_are_those_of_finite_differences(backend, monkeypatch):
    """Of rank 1 of two, which holds the last rows of all."""
    monkeypatch.setattr(registry, "resolve", lambda *_: backend)
    image, text = (torch.randn(2 * 2, 3, dtype=torch.float64, device=DEVICE[backend]) for _ in range(2))
    scale = torch.tensor(2.0, dtype=torch.float64, device=DEVICE[backend])
    monkeypatch.setattr(original, "gather_features", lambda *_: (image, text))
    loss = drop_in.ClipLoss(local_loss=True, rank=1, world_size=2)
    assert torch.autograd.gradcheck(
        lambda *_: loss(image[2:], text[2:], scale), [x.requires_grad_() for x in (image, text, scale)]
    )


def compare(rank: int) -> None:
    """Random calls, each with the four ways to gather: loss, gradients of the features and the scale."""
    monkeypatch = pytest.MonkeyPatch()
    refuse_fallback(monkeypatch, drop_in)
    for seed, local_loss, gather_with_grad in itertools.product(range(25), [False, True], [False, True]):
        draw = random.Random(seed)  # the same in all processes
        torch.manual_seed(1000 * seed + rank)
        n, d, t = draw.randint(2, 20), draw.choice([3, 8, 33]), 10 ** draw.uniform(-1.5, 0)
        dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        inputs = features(n, d, dtype) | {"logit_scale": torch.tensor(1 / t, dtype=dtype)}
        options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "cache_labels": draw.random() < 0.5}
        losses = [module.ClipLoss(**options, rank=rank, world_size=WORLD) for module in (drop_in, original)]
        assert_same(*losses, inputs, t, logit_bias=draw.choice([None, -10.0, torch.tensor([-2.0])]))
    bias = torch.tensor(-10.0)
    for local_loss in (False, True):
        loss = drop_in.ClipLoss(local_loss=local_loss, rank=rank, world_size=WORLD)
        _, gradients = evaluate(loss, features() | {"logit_bias": bias}, logit_scale=10.0)
        assert torch.equal(gradients["logit_bias"], torch.tensor(0.0))
    monkeypatch.undo()
    call = features()
    for local_loss in (False, True):
        losses = [m.ClipLoss(local_loss=local_loss, rank=rank, world_size=WORLD) for m in (drop_in, original)]
        assert torch.equal(*(loss(**call, logit_scale=-1.0) for loss in losses))  # the original's own code


def test_two_processes_give_what_the_original_gives(tmp_path):
    in_two_processes(compare, tmp_path)


def exact(rank):
    """`distributed` is assigned: value and gradients are those of one process, whatever the constructor was told."""
    torch.manual_seed(0)
    every = features(2 * N)
    own = slice(rank * N, (rank + 1) * N)
    whole, wanted = evaluate(drop_in.ClipLoss(), every, logit_scale=torch.tensor(20.0))
    loss = drop_in.ClipLoss(rank=rank, world_size=WORLD)
    loss.distributed = True
    value, found = evaluate(loss, {name: x[own] for name, x in every.items()}, logit_scale=torch.tensor(20.0))
    torch.testing.assert_close(value, whole, rtol=1e-5, atol=0)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name] / WORLD, gradient[own], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError if rank else RuntimeError, match="logit_scale"):
        loss(**{name: x[own] for name, x in every.items()}, logit_scale=-1.0 if rank else 20.0)


def test_distributed_is_exact_over_two_processes(tmp_path):
    in_two_processes(exact, tmp_path)
