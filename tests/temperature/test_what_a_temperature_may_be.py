"""A temperature is a number, a tensor, a Parameter, a callable or a module; each replaces each, nonsense is refused."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from support.helpers import two
from support.losses import LOSSES
from torch import nn
from torch.nn.utils import parametrize

from fused_infonce import (
    ClipLoss,
    FusedInfoNCELoss,
    NTXentLoss,
    clip_loss,
    info_nce,
)

every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self):
        return self.value


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, x):
        return x.log()


class Square(nn.Module):
    """A parametrization that has no right_inverse."""

    def forward(self, x):
        return x**2


KINDS = {
    "number": lambda t: t,
    "integer": lambda t: math.ceil(t),
    "numpy number": np.float32,
    "tensor": torch.tensor,
    "parameter": lambda t: nn.Parameter(torch.tensor(t)),
    "callable": lambda t: lambda: t,
    "module": Holder,
}
PARAMETERS = {"parameter": ["temperature"], "module": ["temperature.value"]}


def of(value):
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KINDS, 2)))
def test_each_kind_replaces_each(first, second):
    query, key = two()
    loss = FusedInfoNCELoss(KINDS[first](0.5))
    for kind, t in ((first, 0.5), (second, 0.25)):
        loss.temperature = held = KINDS[kind](t)
        value = math.ceil(t) if kind == "integer" else t
        assert loss.held_temperature is held
        assert of(loss.temperature) == value
        assert [name for name, _ in loss.named_parameters()] == PARAMETERS.get(kind, [])
        assert list(loss.state_dict()) == PARAMETERS.get(kind, [])
        assert list(loss.children()) == ([held] if kind == "module" else [])
        torch.testing.assert_close(loss(query, key), info_nce(query, key, temperature=value), rtol=1e-7, atol=0)
        assert "temperature" in repr(loss)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_assigned_to_a_shallow_copy_leaves_the_original_alone(kind):
    query, key = two()
    loss = FusedInfoNCELoss(KINDS[kind](0.5))
    before = loss(query, key)
    for other in KINDS.values():
        again = copy.copy(loss)
        again.temperature = other(0.25)
        assert torch.equal(loss(query, key), before)


def test_a_temperature_may_change_at_every_call():
    query, key = two()
    schedule = iter([0.5, 0.2, torch.tensor(0.1), torch.rand(6) + 0.1])
    used = []

    def following():
        used.append(next(schedule))
        return used[-1]

    loss = FusedInfoNCELoss(following)
    for i in range(4):
        value = loss(query, key)
        assert len(used) == i + 1  # once a forward
        assert torch.equal(value, info_nce(query, key, temperature=used[-1]))


BAD = {
    "a negative number": (-1.0, ValueError),
    "zero": (0, ValueError),
    "infinity": (math.inf, ValueError),
    "not a number": (math.nan, ValueError),
    "too small for float32": (1e-40, ValueError),
    "a bool": (True, TypeError),
    "text": ("0.1", TypeError),
    "a list": ([0.1], TypeError),
    "a complex number": (0.1j, TypeError),
    "a negative tensor": (torch.tensor(-1.0), ValueError),
    "a tensor of zero": (torch.zeros(1), ValueError),
    "a tensor that is not a number": (torch.tensor([0.1, math.nan]), ValueError),
    "an infinite tensor": (torch.tensor(math.inf), ValueError),
    "integers": (torch.tensor(1), TypeError),
    "bools": (torch.tensor(True), TypeError),
    "complex": (torch.tensor(0.1j), TypeError),
    "a negative Parameter": (nn.Parameter(torch.tensor(-1.0)), ValueError),
}


@pytest.mark.parametrize("what", BAD)
def test_nonsense_is_refused_by_the_constructor_and_by_the_assignment(what):
    value, kind = BAD[what]
    for make in LOSSES.values():
        with pytest.raises(kind, match="temperature must be"):
            make(temperature=value)
    with pytest.raises(kind, match="temperature must be"):
        FusedInfoNCELoss(temperature=value, learnable_temperature=True)
    for options in ({}, {"learnable_temperature": True}):
        loss = FusedInfoNCELoss(0.5, **options)
        with pytest.raises(kind, match="temperature must be"):
            loss.temperature = value
        assert of(loss.temperature) == pytest.approx(0.5)  # what was refused has changed nothing


@every_loss
def test_a_tensor_computed_from_others_is_refused_with_the_remedy(make):
    """Its graph would be gone after the first backward: "backward through the graph a second time" at step 2."""
    scale = nn.Parameter(torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"pass learnable_temperature=True, or a callable such as lambda: torch\.exp"):
        make(temperature=torch.exp(-scale))
    loss = make(temperature=torch.exp(-scale).detach())
    loss.temperature = torch.exp(-scale)  # for the next call, whose graph it is
    assert loss.temperature.requires_grad


@every_loss
def test_what_would_not_be_trained_is_refused_where_the_temperature_is_learnable(make):
    for value, kind in (
        (nn.Parameter(torch.tensor(0.1)), "Parameter"),
        (torch.tensor(0.1, requires_grad=True), "tensor"),
        (torch.tensor(0.1, requires_grad=True).exp(), "tensor"),
        (lambda: 0.1, "callable"),
        (Holder(0.1), "callable"),
    ):
        with pytest.raises(ValueError, match=f"would not train the {kind}"):
            make(temperature=value, learnable_temperature=True)
        loss = make(temperature=0.5, learnable_temperature=True)
        with pytest.raises(ValueError, match=f"would not train the {kind}"):
            loss.temperature = value


@every_loss
def test_a_largest_scale_needs_a_learnable_temperature(make):
    with pytest.raises(ValueError, match="pass learnable_temperature=True"):
        make(temperature=0.1, max_logit_scale=100)
    for bad, kind in ((0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("100", TypeError)):
        with pytest.raises(kind, match="max_logit_scale must be"):
            make(temperature=0.1, learnable_temperature=True, max_logit_scale=bad)
    for start in (0.00999, torch.tensor(0.00999)):
        with pytest.raises(ValueError, match="max_logit_scale must be 1 / temperature or more, got 100 and"):
            make(temperature=start, learnable_temperature=True, max_logit_scale=100)
        make(temperature=1.0011 * start, learnable_temperature=True, max_logit_scale=100)
    loss = make(temperature=0.01, learnable_temperature=True, max_logit_scale=100)
    loss.temperature = 0.001
    loss.clamp_logit_scale_()
    assert loss.logit_scale.item() == pytest.approx(math.log(100))
    assert "max_logit_scale=100" in repr(loss)


@pytest.mark.parametrize("make", [FusedInfoNCELoss, ClipLoss, NTXentLoss])
@pytest.mark.parametrize(
    ("returned", "kind"),
    [("x", TypeError), (None, TypeError), (-1, ValueError), (torch.tensor(0.0), ValueError),
     (torch.ones(7), ValueError), (torch.tensor(1), TypeError), (lambda: 0.1, TypeError)],
)  # fmt: skip
def test_a_callable_that_returns_nonsense_is_named_at_the_call(make, returned, kind):
    query, key = two()
    loss = make(temperature=lambda: returned)
    with pytest.raises(kind, match="temperature must be"):
        loss(query, key)


def test_an_attribute_that_a_callable_lacks_is_not_said_to_be_the_losss():
    loss = FusedInfoNCELoss(lambda: math.exp(-math.logit_scale))  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="AttributeError: module 'math' has no attribute 'logit_scale'"):
        loss(*two())


def test_a_parametrized_temperature_takes_what_is_assigned():
    """Before, an assignment was lost without a word."""
    query, key = two()
    loss = FusedInfoNCELoss(nn.Parameter(torch.tensor(0.2)))
    parametrize.register_parametrization(loss, "temperature", Exp())
    assert of(loss.temperature) == pytest.approx(0.2)
    for value in (torch.tensor(0.3), 0.4):
        loss.temperature = value
        assert of(loss.temperature) == pytest.approx(of(value))
        torch.testing.assert_close(loss(query, key), info_nce(query, key, temperature=of(value)))
    assert "temperature=tensor(0.4" in repr(loss)
    for value in (nn.Parameter(torch.tensor(0.5)), lambda: 0.5):
        with pytest.raises(ValueError, match="remove_parametrizations"):
            loss.temperature = value
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss.temperature = -1.0
    loss(query, key).backward()
    assert loss.parametrizations["temperature"].original.grad is not None

    parametrize.remove_parametrizations(loss, "temperature")
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    loss.temperature = 0.5
    assert loss.temperature == 0.5


def test_a_parametrized_logit_scale_takes_what_is_assigned_and_clamped():
    loss = FusedInfoNCELoss(0.2, learnable_temperature=True, max_logit_scale=10)
    parametrize.register_parametrization(loss, "logit_scale", Exp())
    for t in (0.3, 0.01):
        loss.temperature = t
        assert of(loss.temperature) == pytest.approx(t)
    loss.clamp_logit_scale_()
    assert of(loss.temperature) == pytest.approx(0.1)


def test_a_parametrization_that_cannot_take_a_value_says_so():
    for name, loss in (
        ("temperature", FusedInfoNCELoss(nn.Parameter(torch.tensor(0.2)))),
        ("logit_scale", FusedInfoNCELoss(0.2, learnable_temperature=True)),
    ):
        parametrize.register_parametrization(loss, name, Square())
        with pytest.raises(RuntimeError, match="right_inverse"):
            loss.temperature = 0.3


def test_clip_without_a_scale_says_what_is_missing():
    image, text = two()
    loss = ClipLoss()
    assert loss.temperature is None
    assert "temperature" not in repr(loss)
    with pytest.raises(ValueError, match="logit_scale is missing: pass it, or make the loss with learnable_temp"):
        loss(image, text)
    loss.temperature = 0.1
    torch.testing.assert_close(loss(image, text), clip_loss(image, text, 10.0))
    loss.temperature = None
    with pytest.raises(ValueError, match="logit_scale is missing"):
        loss(image, text)
    with pytest.raises(TypeError, match="temperature must be"):
        FusedInfoNCELoss(None)


def test_a_scale_of_one_call_wins_in_clip():
    image, text = two()
    want = clip_loss(image, text, torch.tensor(10.0), normalize=True)
    for options in ({}, {"temperature": 0.5}, {"learnable_temperature": True}, {"temperature": lambda: "unused"}):
        loss = ClipLoss(normalize=True, **options)
        assert torch.equal(loss(image, text, torch.tensor(10.0)), want)
        assert torch.equal(loss(image, text, logit_scale=torch.tensor(10.0)), want)
    learned = ClipLoss(learnable_temperature=True, normalize=True)
    assert learned.temperature.item() == pytest.approx(0.07)
    torch.testing.assert_close(
        learned(image, text), info_nce(image, text, temperature=0.07, symmetric=True), rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match="text_features must have shape"):
        learned(image, text[1:])
