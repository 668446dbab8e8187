"""CLIP's loss against open_clip's and against dense code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import clip as dense
from support.helpers import DEVICE, both_backends, cases, elsewhere, error, interpreted
from support.libraries import library, without_package

from fused_infonce import ClipLoss, clip_loss

N, D = 7, 5


def pair(n: int = N, d: int = D, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[torch.Tensor]:
    image = torch.randn(n, d, dtype=torch.float64)
    text = image + torch.randn(n, d, dtype=torch.float64)
    return [F.normalize(x, dim=-1).to(device, dtype).requires_grad_() for x in (image, text)]


@cases(
    normalize=[False, True],
    reduction=["mean", "sum", "none"],
    scale=["float", "scalar", "one element", "per pair"],
)
def test_gradients_are_those_of_finite_differences_and_of_dense_code(backend, normalize, reduction, scale):
    device = DEVICE[backend]
    inputs = [x.detach().mul(1 if not normalize else 3).requires_grad_() for x in pair(device=device)]
    shape = {"float": None, "scalar": (), "one element": (1,), "per pair": (N, 1)}[scale]
    if shape is not None:
        inputs.append((5 + torch.rand(shape, dtype=torch.float64, device=device)).requires_grad_())
    loss = ClipLoss(normalize=normalize, reduction=reduction, backend=backend)

    def fused(image, text, scale=6.5):
        return loss(image, text, scale)

    def truth(image, text, scale=6.5):
        return dense.clip_loss(image, text, scale, normalize=normalize, reduction=reduction)

    assert interpreted(backend) or torch.autograd.gradcheck(fused, inputs, fast_mode=True)
    got, want = fused(*inputs), truth(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(x.sum(), inputs) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert b.abs().max() > 1e-6


@pytest.fixture
def original():
    """open_clip's loss, without its models, which need torchvision."""
    return library("open_clip.loss", without_package).ClipLoss()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("bias", [None, -10.0])
def test_equals_open_clip(original, seed, bias):
    torch.manual_seed(seed)
    n, d = (int(x) for x in torch.randint(1, 70, (2,)))
    image, text = pair(n, d, torch.float32)
    scale = torch.empty(()).uniform_(1, 100).requires_grad_()
    both = []
    for loss in (ClipLoss(), original):
        value = loss(image, text, scale, bias if bias is None else torch.tensor(bias))
        both.append([value, *torch.autograd.grad(value, (image, text, scale))])
    exact = [x.detach().double().requires_grad_() for x in (image, text, scale)]
    value = dense.clip_loss(*exact)
    truth = [value, *torch.autograd.grad(value, exact)]
    for ours, theirs, true in zip(*both, truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        # where theirs is itself that exact: at scale 100 it cancels in logsumexp - positive, and with a bias more so
        allowed = 1e-5 * true.norm() + 2 * (theirs - true).norm()
        assert (ours - theirs).norm() <= allowed + 1e-30
        assert n == 1 or error(ours, true) <= 2e-5


def test_at_a_moderate_scale_open_clip_is_equal_to_one_part_in_100000(original):
    for n, d in ((2, 3), (16, 8), (33, 24), (64, 64)):
        image, text = pair(n, d, torch.float32)
        scale = torch.tensor(10.0, requires_grad=True)
        both = []
        for loss in (ClipLoss(), original):
            value = loss(image, text, scale)
            both.append([value, *torch.autograd.grad(value, (image, text, scale))])
        for ours, theirs in zip(*both, strict=True):
            assert error(ours, theirs) <= 1e-5


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("value", [-10.0, math.inf, math.nan])
def test_a_bias_changes_nothing_and_has_a_gradient_of_zero(backend, reduction, value):
    image, text = pair(device=DEVICE[backend])
    bias = torch.tensor([value], requires_grad=True)
    loss = clip_loss(image, text, 10.0, bias, reduction=reduction, backend=backend)
    assert torch.equal(loss, clip_loss(image, text, 10.0, reduction=reduction, backend=backend))
    assert torch.equal(loss, clip_loss(image, text, 10.0, -10, reduction=reduction, backend=backend))
    loss.sum().backward()
    assert torch.equal(bias.grad, torch.zeros(1))
    with torch.no_grad():
        assert torch.equal(loss, clip_loss(image, text, 10.0, bias, reduction=reduction, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_scale_is_inverted_in_float32(dtype):
    image, text = pair(dtype=dtype)
    scale = torch.tensor(14.28, dtype=dtype, requires_grad=True)
    got = clip_loss(image, text, scale)
    got.backward()
    exact = [x.detach().double().requires_grad_() for x in (image, text, scale)]
    want = dense.clip_loss(*exact)
    want.backward()
    assert error(got, want) <= 1e-5
    assert scale.grad.dtype == dtype
    assert error(scale.grad, exact[2].grad) <= 1e-2


ONE = torch.ones(N, D)
BAD = {
    "an array": ({"image_features": [[1.0]]}, TypeError, "image_features must be a tensor"),
    "no text": ({"text_features": None}, TypeError, "text_features must be a tensor"),
    "three dimensions": ({"text_features": torch.ones(N, D, 1)}, ValueError, "text_features must have 2 dimensions"),
    "fewer texts": ({"text_features": torch.ones(N - 1, D)}, ValueError, r"text_features must have shape \(7, 5\)"),
    "integers": ({"image_features": ONE.long()}, TypeError, "image_features must be float16"),
    "mixed dtypes": ({"text_features": ONE.double()}, TypeError, "text_features must be torch.float32"),
    "mixed devices": ({"text_features": elsewhere(*ONE.shape)}, ValueError, "text_features must be on cpu"),
    "no scale": ({"logit_scale": None}, TypeError, "logit_scale must be a number"),
    "scale 0": ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive and finite"),
    "infinite scale": ({"logit_scale": torch.tensor(float("inf"))}, ValueError, "logit_scale must be positive"),
    "negative scale": ({"logit_scale": torch.tensor(-1.0)}, ValueError, "logit_scale must be positive and finite"),
    "integer scale": ({"logit_scale": torch.tensor(3)}, TypeError, "logit_scale must be a number or a floating"),
    "scales": ({"logit_scale": torch.ones(N + 1)}, ValueError, "logit_scale must be .*one value per row"),
    "scales elsewhere": ({"logit_scale": elsewhere(N)}, ValueError, "logit_scale must be on cpu"),
    "bias": ({"logit_bias": "0"}, TypeError, "logit_bias must be a number"),
    "boolean bias": ({"logit_bias": True}, TypeError, "logit_bias must be a number"),
    "integer bias": ({"logit_bias": torch.tensor(3)}, TypeError, "logit_bias must be a number"),
    "biases": ({"logit_bias": torch.ones(N)}, ValueError, "logit_bias must be a number or a one-element"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "workspace": ({"workspace_limit": 0}, ValueError, "workspace_limit must be a number of bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_refused(what):
    replaced, kind, message = BAD[what]
    call = {"image_features": ONE, "text_features": ONE, "logit_scale": 10.0} | replaced
    with pytest.raises(kind, match=message):
        clip_loss(**call)
    options = {k: v for k, v in call.items() if k in ("reduction", "backend", "workspace_limit")}
    if options:
        with pytest.raises(kind, match=message):
            ClipLoss(**options)


def test_module_equals_function():
    image, text = pair(dtype=torch.float32)
    got = ClipLoss(normalize=True, reduction="none")(2 * image, text, 10.0)
    assert torch.equal(got, clip_loss(2 * image, text, 10.0, normalize=True, reduction="none"))
    assert ClipLoss()(image[:0], text[:0], 10.0).isnan()
