"""compat.supcontrast against the formula of SupContrast's losses.py in dense PyTorch: the original is no package."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import evaluate
from support.libraries import seeds
from support.side_by_side import assert_same, error_of
from torch import Tensor

from fused_infonce.compat.supcontrast import SupConLoss

N, V, D = 6, 2, 5


def dense(features, labels=None, mask=None, temperature=0.07, contrast_mode="all", base_temperature=0.07):
    """-(t / t_base) mean_i sum_p w_ip log softmax_{a != i}(x_i . x_a / t)_p / sum_p w_ip; the weights are float32, and
    so is what 16-bit features give. No weights at all: 0."""
    samples, views = features.shape[:2]
    rows = torch.cat(features.flatten(2).unbind(1))
    anchors = {"all": rows, "one": rows[:samples]}[contrast_mode]
    others = 1 - torch.eye(len(rows))[: len(anchors)]
    if mask is None:
        classes = torch.arange(samples) if labels is None else labels.flatten()
        mask = classes[:, None] == classes
    weights = others * mask.float().repeat(len(anchors) // samples, views)
    logits = anchors @ rows.T / temperature
    logits = logits - logits.detach().amax(1, keepdim=True)
    log_prob = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
    total = weights.sum(1)
    mean = (weights * log_prob).sum(1) / torch.where(total == 0, 1, total)
    return -(temperature / base_temperature) * mean.mean()


def positives(kind: str, n: int) -> dict[str, Tensor]:
    labels = torch.randint(max(n // 2, 1), (n,))
    if kind in ("labels", "column", "row", "floats", "booleans", "int32"):
        change = {"column": labels[:, None], "row": labels[None], "floats": labels / 3 - 1, "booleans": labels > 0}
        return {"labels": change.get(kind, labels.int() if kind == "int32" else labels)}
    mask = torch.rand(n, n) < torch.rand(n, 1)
    weighted = mask * torch.randint(1, 9, (n, n)) / 8  # which float32 holds
    same = labels[:, None] == labels
    masks = {"mask": same, "asymmetric": mask.float(), "weights": weighted, "int": same.long()}
    masks["wide"] = weighted.double()
    return {"mask": masks[kind]} if kind in masks else {}


KINDS = [
    "views", "labels", "column", "row", "floats", "booleans", "int32", "mask", "asymmetric", "weights", "wide", "int",
]  # fmt: skip


@pytest.mark.parametrize("seed", seeds(560))
def test_equals_the_formula(seed):
    """Shapes, labels and masks of every kind, both contrast modes, temperatures, dtypes."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    n, views = draw.randint(3, 24), draw.randint(1, 3)
    shape = draw.choice([(2,), (8,), (33,), (4, 3), (2, 3, 2)])
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    t, base = 10 ** draw.uniform(-1.5, 0.3), draw.choice([0.07, 1.0])
    features = (torch.randn(n, 1, *shape) + torch.randn(n, views, *shape)).flatten(2)
    length = draw.uniform(0.5, 1.5)  # of the rows: the caller normalises, or not
    features = (F.normalize(features, dim=-1) * length).unflatten(2, shape).to(dtype)
    given, mode = positives(draw.choice(KINDS), n), draw.choice(["all", "one"])
    inputs: dict[str, Any] = {"features": features}
    options = {"base_temperature": base, "contrast_mode": mode}
    if draw.random() < 0.5:
        options["temperature"] = t
    else:  # in the wider dtype, in which the original's quotient t / t_base is
        inputs["temperature"] = torch.tensor(t, dtype=torch.promote_types(dtype, torch.float32))

    def ours(features, **rest):
        return SupConLoss(**rest)(features, **given)

    def original(features, **rest):
        return dense(features, **given, **rest)

    assert_same(ours, original, inputs, t, **options)


def test_names_order_and_defaults_are_the_originals():
    """As in losses.py; the class has the name that code asks for."""
    parameters = inspect.signature(SupConLoss).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [
        ("temperature", 0.07), ("contrast_mode", "all"), ("base_temperature", 0.07),
    ]  # fmt: skip
    parameters = inspect.signature(SupConLoss.forward).parameters.values()
    assert [(p.name, p.default) for p in parameters][1:] == [
        ("features", inspect.Parameter.empty), ("labels", None), ("mask", None),
    ]  # fmt: skip
    features, labels = torch.randn(N, V, D), torch.arange(N) % 3
    want = dense(features, labels, None, 0.2, "one", 0.1)
    torch.testing.assert_close(SupConLoss(0.2, "one", 0.1)(features, labels), want)
    torch.testing.assert_close(SupConLoss()(features / 3, None, torch.eye(N)), dense(features / 3))
    assert not list(SupConLoss().parameters())
    assert not SupConLoss().state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [{}, {"labels": torch.arange(N) % 3}])
def test_the_dtype_is_the_originals(dtype, autocast, given):
    features = F.normalize(torch.randn(N, V, D), dim=-1).to(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        got = SupConLoss()(features, **given)
        try:
            want = dense(features, **given)
        except RuntimeError:  # CPU autocast meets its other 16-bit dtype
            assert autocast is not None
            want = dense(features.to(autocast), **given)
    assert got.dtype == want.dtype
    seen = features if autocast is None or dtype == torch.float64 else features.to(autocast)  # by the products
    exact = dense(seen.double(), **given)
    assert abs(got.double() - exact) <= max(1e-5, torch.finfo(got.dtype).eps) * exact


# What the original checks itself is a ValueError, raised by the call and not by the constructor.
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception]]] = {
    "two dimensions": ({}, {"features": torch.randn(N, D)}, ValueError),
    "labels and mask": ({}, {"labels": torch.arange(N), "mask": torch.eye(N)}, ValueError),
    "too few labels": ({}, {"labels": torch.arange(N - 1)}, ValueError),
    "too many labels": ({}, {"labels": torch.arange(2 * N).view(N, 2)}, ValueError),
    "mode": ({"contrast_mode": "two"}, {}, ValueError),
    # stricter than the original, or with another class than torch's
    "a mask of other samples": ({}, {"mask": torch.eye(N + 1)}, ValueError),
    "a negative mask": ({}, {"mask": -torch.eye(N)}, ValueError),
    "a mask with a gradient": ({}, {"mask": torch.eye(N, requires_grad=True)}, ValueError),
    "a list of labels": ({}, {"labels": [0] * N}, TypeError),
    "integers": ({}, {"features": torch.ones(N, V, D, dtype=torch.int64)}, TypeError),
    "a list of features": ({}, {"features": [[[1.0]]]}, TypeError),
    "temperature 0": ({"temperature": 0.0}, {}, ValueError),
    "a negative temperature": ({"temperature": -0.1}, {}, ValueError),
    "a negative base temperature": ({"base_temperature": -0.1}, {}, ValueError),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_what_the_original_raises(what):
    options, arguments, kind = BAD[what]
    loss = SupConLoss(**options)
    assert error_of(loss, **({"features": torch.randn(N, V, D)} | arguments)) is kind


def test_anchors_without_positives_have_loss_0_here():
    """An anchor without positives, and a row that is alone."""
    features = torch.randn(4, 1, D)
    loss, gradients = evaluate(SupConLoss(), {"features": features}, labels=torch.tensor([0, 1, 1, 2]))
    pair = dense(features, mask=torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]))
    torch.testing.assert_close(loss, pair)
    assert gradients["features"].isfinite().all()
    assert SupConLoss()(torch.randn(1, 1, D)) == 0
    assert SupConLoss()(features) == 0
    assert dense(torch.randn(1, 1, D)).isnan()


def test_options_may_be_assigned():
    features = F.normalize(torch.randn(N, V, D), dim=-1)
    loss = SupConLoss()
    loss.temperature, loss.contrast_mode, loss.base_temperature = 0.3, "one", 0.2
    torch.testing.assert_close(loss(features), dense(features, None, None, 0.3, "one", 0.2))
