"""A margin of the positive, as CosFace has it, and masks of ragged hard negatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import DEVICE, both_backends, cases, error, interpreted, watch_plans
from torch import Tensor

from fused_infonce import FusedInfoNCELoss, explain, info_nce
from fused_infonce.backends import plan

N, M, H, D = 7, 9, 3, 5


def unit(x: Tensor, normalize: bool = True) -> Tensor:
    return F.normalize(x, dim=-1) if normalize else x


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def cosface(query: Tensor, key: Tensor, t: Tensor, target: Tensor, margin: float, normalize: bool = True) -> Tensor:
    """The rows' losses from all logits, (N,): the margin is taken off where the one-hot label is 1."""
    cosines = unit(query, normalize) @ unit(key, normalize).T
    logits = (cosines - margin * F.one_hot(target, len(key)).to(key.dtype)) / t.reshape(-1, 1)
    return F.cross_entropy(logits, target, reduction="none")


@cases(
    targets=[False, True],
    symmetric=[False, True],
    normalize=[True, False],
    temperature=["number", "scalar", "per row"],
    reduction=["mean", "none"],
    blocks=["default", "several"],
    valid=lambda c: not (c["targets"] and c["symmetric"]),
    pairs=True,
)
def test_a_margin_is_that_of_cosface(
    backend, targets, symmetric, normalize, temperature, reduction, blocks, monkeypatch
):
    if blocks == "several":
        monkeypatch.setattr(plan, "DENSE", 0)
        watch_plans(monkeypatch, rows=4, cols=5)
    query, key = leaf(N, D), leaf(M if targets else N, D)
    target = torch.randint(M, (N,)) if targets else torch.arange(N)
    t = 0.2 + 0.2 * torch.rand(N if temperature == "per row" else (), dtype=torch.float64)
    leaves = [query, key] if temperature == "number" else [query, key, t.requires_grad_()]
    want = cosface(query, key, t, target, 0.35, normalize)
    if symmetric:
        want = (want + cosface(key, query, t, target, 0.35, normalize)) / 2
    want = want.mean() if reduction == "mean" else want

    number = t.item() if temperature == "number" else 0.0

    def fused(query: Tensor, key: Tensor, t: Tensor | float = number) -> Tensor:
        device = DEVICE[backend]
        options: dict[str, Any] = {"target": target.to(device)} if targets else {}
        return info_nce(
            query.to(device), key.to(device), temperature=t if isinstance(t, float) else t.to(device), margin=0.35,
            symmetric=symmetric, normalize=normalize, reduction=reduction, backend=backend, **options,
        ).cpu()  # fmt: skip

    got = fused(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    for ours, truth in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (got, want)), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    assert interpreted(backend) or torch.autograd.gradcheck(fused, leaves, fast_mode=True)


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_classes_without_their_logits_keep_the_bounds(backend, dtype):
    """`info_nce(x, W, target=y, margin=0.35, temperature=1/64)`, the setting of CosFace."""
    x, w = (unit(leaf(n, 32)).detach().to(dtype) for n in (40, 70))
    y = torch.randint(70, (40,))
    exact = [z.double().requires_grad_() for z in (x, w)]
    leaves = [z.to(DEVICE[backend]).requires_grad_() for z in (x, w)]
    want = cosface(*exact, torch.tensor(1 / 64), y, 0.35).mean()
    options = {"temperature": 1 / 64, "target": y.to(DEVICE[backend]), "margin": 0.35, "backend": backend}
    (chosen,) = explain(*leaves, **options)
    assert chosen.one_pass
    assert chosen.flops == 6
    got = info_nce(*leaves, **options)
    assert error(got, want) <= 1e-5 * max(1, 0.05 * 64 if dtype == torch.float32 else 1)
    for ours, truth in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, exact), strict=True):
        assert error(ours, truth) <= (5e-3 if dtype == torch.bfloat16 else 1e-5 * 0.05 * 64)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_masked_negatives_are_as_if_they_were_not_there(backend, in_batch, biased):
    """The last row keeps none: of its own gradients none is NaN, nor of the temperature's."""
    query, key, negatives = leaf(N, D), leaf(N, D), leaf(N, H, D)
    bias = leaf(N, H) if biased else None
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(N, H) < 0.6
    mask[0], mask[-1] = True, False
    leaves = [query, key, negatives, t, *([bias] if biased else [])]
    device = DEVICE.get(backend, "cpu")
    got = info_nce(
        query.to(device), key.to(device), negatives.to(device), t, negative_mode="paired", in_batch_negatives=in_batch,
        negative_mask=mask.to(device), negative_bias=None if bias is None else bias.to(device), reduction="none",
        backend=backend,
    ).cpu()  # fmt: skip
    scores = torch.einsum("nd,nhd->nh", unit(query), unit(negatives)) / t + (0 if bias is None else bias)
    logits = unit(query) @ unit(key).T / t
    own = torch.arange(N)
    if not in_batch:
        logits, own = logits.diagonal()[:, None], torch.zeros(N, dtype=torch.int64)
    want = F.cross_entropy(torch.cat([logits, scores.masked_fill(~mask, -math.inf)], 1), own, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for ours, truth in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (got, want)), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    if not in_batch:
        assert got[-1] == 0


def test_the_module_takes_both_and_says_so():
    query, key, negatives = (leaf(*shape).detach().float() for shape in ((N, D), (N, D), (N, H, D)))
    mask = torch.rand(N, H) < 0.5
    loss = FusedInfoNCELoss(0.1, negative_mode="paired", margin=0.2)
    want = info_nce(query, key, negatives, 0.1, negative_mode="paired", margin=0.2, negative_mask=mask)
    assert torch.equal(loss(query, key, negatives, negative_mask=mask), want)
    assert "margin=0.2" in repr(loss)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"margin": -0.1}, ValueError, "margin must not be negative"),
        ({"margin": "0.1"}, TypeError, "margin must be a number, got str"),
        ({"margin": 0.1, "label_smoothing": 0.1}, ValueError, "label_smoothing cannot be used with"),
        ({"negative_mask": torch.ones(N, H, dtype=torch.bool)}, ValueError, "needs negative_mode='paired'"),
        ({"negative_mask": torch.ones(N, H)}, TypeError, r"negative_mask must be a bool tensor of shape \(7, 3\)"),
        ({"negative_mask": torch.ones(N, dtype=torch.bool)}, ValueError, r"must have shape \(7, 3\), got \(7,\)"),
    ],
)
def test_refusals(options, error, message):
    query, key = torch.randn(2, N, D)
    paired = "needs" not in message and "negative_mask" in options
    more = {"negative_keys": torch.randn(N, H, D), "negative_mode": "paired"} if paired else {}
    with pytest.raises(error, match=message):
        info_nce(query, key, **more, **options)
