"""compat.open_clip over stand-ins for open_clip 3.3.0 and for its main branch, whose signatures differ by Horovod."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_infonce.compat
from fused_infonce import clip_loss, siglip_loss
from fused_infonce.compat import common

N, D, WORLD = 4, 6, 2
VERSIONS = ("3.3.0", "main")
both_versions = pytest.mark.parametrize("version", VERSIONS)


class Loss(nn.Module):
    """What both versions have alike."""

    def __init__(self, local_loss, gather_with_grad, cache_labels, rank, world_size):
        super().__init__()
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size = rank, world_size

    def get_ground_truth(self, device, num_logits):
        return torch.arange(num_logits, device=device) + num_logits * self.rank * (self.world_size > 1)

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        logits = logit_scale * image_features @ text_features.T
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


class Released(Loss):
    def __init__(
        self, local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1, use_horovod=False
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size)
        self.use_horovod = use_horovod


class Main(Loss):
    def __init__(self, local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size)


class SigLip(nn.Module):
    def __init__(self, cache_labels=False, rank=0, world_size=1, dist_impl=None, chunk_size=0):
        super().__init__()
        self.rank, self.world_size, self.dist_impl, self.chunk_size = rank, world_size, dist_impl or "bidir", chunk_size


def stand_in(version, calls):
    """Return an `open_clip.loss` of a version; its `gather_features` notes its arguments, and copies the features."""
    module: Any = ModuleType("open_clip.loss")

    def gathered(image_features, text_features, *options):
        calls.append(options)
        return torch.cat([image_features] * WORLD), torch.cat([text_features] * WORLD)

    def released(
        image_features, text_features, local_loss=False, gather_with_grad=False, rank=0, world_size=1, use_horovod=False
    ):
        return gathered(image_features, text_features, local_loss, gather_with_grad, rank, world_size, use_horovod)

    def main(image_features, text_features, local_loss=False, gather_with_grad=False, rank=0, world_size=1):
        return gathered(image_features, text_features, local_loss, gather_with_grad, rank, world_size)

    module.gather_features = released if version == "3.3.0" else main
    module.ClipLoss = Released if version == "3.3.0" else Main
    module.SigLipLoss = SigLip
    return module


@pytest.fixture
def over(monkeypatch):
    """Return a function that imports the drop-in anew, over a version, and gives it with the noted calls."""

    def load(version):
        calls: list[tuple] = []
        package: Any = ModuleType("open_clip")
        package.__path__ = []
        package.loss = stand_in(version, calls)
        monkeypatch.setitem(sys.modules, "open_clip", package)
        monkeypatch.setitem(sys.modules, "open_clip.loss", package.loss)
        path = Path(next(iter(fused_infonce.compat.__path__)), "open_clip.py")
        spec = importlib.util.spec_from_file_location("fused_infonce.compat.open_clip_over_a_stand_in", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, calls

    return load


def features():
    return [F.normalize(torch.randn(N, D), dim=-1) for _ in range(2)]


@both_versions
def test_the_options_are_those_of_the_version(version, over):
    drop_in, _ = over(version)
    options = inspect.signature(drop_in.ClipLoss).parameters
    assert ("use_horovod" in options) == (version == "3.3.0")
    assert isinstance(drop_in.ClipLoss(), sys.modules["open_clip.loss"].ClipLoss)


@both_versions
def test_one_process_needs_no_gathering(version, over):
    drop_in, calls = over(version)
    image, text = features()
    got = drop_in.ClipLoss()(image, text, logit_scale=10.0, output_dict=True)
    torch.testing.assert_close(got["contrastive_loss"], clip_loss(image, text, 10.0))
    assert not calls


@both_versions
def test_the_options_of_siglip_are_those_of_the_version(version, over):
    drop_in, _ = over(version)
    image, text = features()
    got = drop_in.SigLipLoss(chunk_size=2)(image, text, 10.0, -3.0, output_dict=True)
    torch.testing.assert_close(got["contrastive_loss"], siglip_loss(image, text, 10.0, -3.0))


@both_versions
@pytest.mark.parametrize("local_loss", [False, True])
def test_features_are_gathered_with_the_arguments_of_the_version(version, local_loss, over):
    drop_in, calls = over(version)
    image, text = features()
    loss = drop_in.ClipLoss(local_loss=local_loss, gather_with_grad=True, rank=1, world_size=WORLD)
    got = loss(image, text, logit_scale=10.0)
    assert calls == [(local_loss, True, 1, WORLD, *([False] if version == "3.3.0" else []))]
    logits = 10 * image @ torch.cat([text] * WORLD).T
    others = 10 * text @ torch.cat([image] * WORLD).T
    target = torch.arange(N) + N
    want = (F.cross_entropy(logits, target) + F.cross_entropy(others, target)) / 2
    if not local_loss:
        want = clip_loss(torch.cat([image] * WORLD), torch.cat([text] * WORLD), 10.0)
    torch.testing.assert_close(got, want)


@both_versions
def test_the_originals_own_code_still_runs_and_says_so_at_the_users_line(version, over):
    drop_in, _ = over(version)
    common.say_once.cache_clear()
    image, text = features()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        got = drop_in.ClipLoss()(image, text, logit_scale=-3.0)
    torch.testing.assert_close(got, Loss.forward(Main(), image, text, -3.0))
    (warning,) = caught
    assert "ClipLoss runs the original's own code here" in str(warning.message)
    assert (warning.filename, warning.lineno) == (__file__, line)
