"""A drop-in beside the original: one call of both, and of the original in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_infonce.compat import common

from .helpers import Inputs, bounds, differentiable, error, evaluate

Loss = Callable[..., Tensor]


def refuse_fallback(monkeypatch: pytest.MonkeyPatch, drop_in: Any) -> None:
    """Make every later call fail that runs the original's own code."""

    def fail(what: str, why: str) -> None:
        pytest.fail(f"{what} falls back on the original: {why}")

    monkeypatch.setattr(common, "say_once", fail)
    if hasattr(drop_in, "say_once"):  # some say it themselves
        monkeypatch.setattr(drop_in, "say_once", fail)


SCALARS = ("temperature", "logit_scale", "logit_bias")  # their gradients are sums over all rows, in which most cancels


def assert_same(ours: Loss, original: Loss, inputs: Inputs, t: float, **options: Any) -> None:
    """Assert that loss and gradients at a temperature of about t have the dtypes, shapes and values of the original.

    Its values are those in float64 on the same numbers. In 32 bits ours are also within 1e-5 of its own, or twice as
    far from them as they are from those in float64.
    """
    got, want = evaluate(ours, inputs, **options), evaluate(original, inputs, **options)
    exact = evaluate(original, {k: x.double() if differentiable(x) else x for k, x in inputs.items()}, **options)
    dtype = next(iter(inputs.values())).dtype
    loss_bound, gradient_bound = bounds(dtype, t)
    found = {"loss": (got[0], want[0], exact[0], max(loss_bound, torch.finfo(want[0].dtype).eps))}
    for name in exact[1]:
        x, y, truth = got[1][name], want[1][name], exact[1][name]
        bound = max(1e-4, gradient_bound, error(y, truth)) if name in SCALARS else gradient_bound
        found[name] = (x, y, truth, bound)
    for name, (x, y, truth, bound) in found.items():
        assert x.dtype == y.dtype, name
        assert x.shape == y.shape, name
        allowed = bound * truth.norm() + 4e-15 / t  # in float64 the original's logsumexp - positive leaves as much
        assert (x - truth).norm() <= allowed, name
        if dtype == torch.float32:
            assert (x - y).double().norm() <= max(allowed, 2 * (y - truth).norm()), name


def error_of(loss: Loss, *arguments: Any, **options: Any) -> type[Exception] | None:
    """Return the class of the exception that a loss raises, None if it raises none."""
    try:
        loss(*arguments, **options)
    except Exception as error:
        return type(error)
    return None
