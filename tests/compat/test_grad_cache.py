"""compat.grad_cache against the step by hand, and against the original where it is installed.

It is on no index: pip install git+https://github.com/luyug/GradCache
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import random
import warnings
from collections import UserDict

import pytest
import torch
from support.encoders import WIDTH, Encoder, assert_gradients, by_hand, gradients, softmax_loss

from fused_infonce import FusedInfoNCELoss
from fused_infonce.compat.grad_cache import GradCache

N = 50


def pair(dtype=torch.float64):
    torch.manual_seed(0)
    models = [Encoder(dtype), Encoder(dtype)]
    return models, torch.randn(2, N, WIDTH, dtype=dtype), [x for model in models for x in model.parameters()]


SHAPES = {
    "tensor": lambda x: x,
    "list": lambda x: [x],
    "dict": lambda x: {"rows": x},
    "UserDict": lambda x: UserDict(rows=x),
    "arguments": lambda x: ([x], {}),
    "names": lambda x: ([], {"rows": x}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_sizes", [16, [16, 16]], ids=["one", "list"])
def test_gradients_and_loss_are_those_by_hand(shape, chunk_sizes):
    models, rows, parameters = pair()
    value = by_hand(softmax_loss, *zip(models, rows, strict=True), chunk_size=16, scale=3.0)
    torch.manual_seed(1)
    loss = GradCache(models, chunk_sizes, softmax_loss)(*map(SHAPES[shape], rows), scale=3.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, value.detach(), rtol=1e-14, atol=0)
    assert_gradients(parameters, gradients(value, parameters))


def test_steps_accumulate_with_a_learned_temperature_and_a_shared_model():
    models, rows, _ = pair(torch.float32)
    criterion = FusedInfoNCELoss(0.1, learnable_temperature=True)
    parameters = [*models[0].parameters(), *criterion.parameters()]
    towers = [(models[0], x) for x in rows]
    wanted = [2 * x for x in gradients(by_hand(criterion, *towers, chunk_size=16), parameters)]
    cache = GradCache([models[0]] * 2, 16, criterion)
    for _ in range(2):
        torch.manual_seed(1)
        cache.cache_step(*rows)
    assert_gradients(parameters, wanted, 1e-6)


def test_functions_and_overridden_methods_are_used():
    models, rows, parameters = pair()

    class Own(GradCache):
        def compute_loss(self, *reps, **arguments):
            return 2 * super().compute_loss(*reps, **arguments)

        def model_call(self, model, model_input):
            return {"reps": super().model_call(model, model_input)}

    cache = Own(models, [16, 30], softmax_loss, lambda x, size: x.flip(0).split(size), lambda out: out["reps"].flip(1))
    torch.manual_seed(1)
    cache(*rows)
    torch.manual_seed(1)
    parts = [x.flip(0).split(size) for x, size in zip(rows, (16, 30), strict=True)]
    reps = [torch.cat([model(x) for x in part]).flip(1) for model, part in zip(models, parts, strict=True)]
    assert_gradients(parameters, gradients(2 * softmax_loss(*reps), parameters))


def test_fp16_scales_the_gradients():
    models, rows, parameters = pair()
    wanted = gradients(by_hand(softmax_loss, *zip(models, rows, strict=True), chunk_size=16), parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast, which is CUDA's, is off without it
        GradCache(models, 16, softmax_loss, fp16=True, scaler=scaler)(*rows)
    if not torch.cuda.is_available():
        assert_gradients(parameters, [256 * x for x in wanted])


def test_refusals():
    models, rows, _ = pair()
    with pytest.raises(AssertionError, match="scaler"):
        GradCache(models, 16, softmax_loss, fp16=True)
    with pytest.raises(AssertionError, match="DistributedDataParallel"):
        GradCache(models, 16, softmax_loss)(*rows, no_sync_except_last=True)
    for wrong in ("text", ["text"], {"rows": 3}, ([rows[0]], [rows[0]])):
        with pytest.raises(NotImplementedError):
            GradCache(models, 16, softmax_loss)(wrong, rows[1])
    with pytest.raises(NotImplementedError):
        GradCache(models, 16, softmax_loss, lambda x, size: [3])(*rows)


@pytest.mark.skipif(importlib.util.find_spec("grad_cache") is None, reason="GradCache is not installed: see the module")
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.filterwarnings("ignore")
def test_equals_the_original(seed):
    original = importlib.import_module("grad_cache").GradCache
    draw = random.Random(seed)
    models, _, _ = pair()
    models = models if draw.random() < 0.7 else models[:1] * 2
    shape = SHAPES[draw.choice(["tensor", "list", "dict", "UserDict"])]
    rows = torch.randn(2, draw.randrange(1, 80), WIDTH, dtype=torch.float64)
    sizes = draw.choice([draw.randrange(1, 90), [draw.randrange(1, 90), draw.randrange(1, 90)]])
    found = []
    for kind in (GradCache, original):
        own = copy.deepcopy(models)  # one model that comes twice stays one
        torch.manual_seed(seed)
        loss = kind(own, sizes, softmax_loss)(*map(shape, rows), scale=4.0)
        found.append([loss, *(x.grad for model in own for x in model.parameters()), torch.get_rng_state().double()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
