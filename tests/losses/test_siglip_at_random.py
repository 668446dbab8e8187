"""Any call of SigLIP's loss equals dense code: shapes, options, dtypes and workspaces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.siglip import siglip_loss as dense
from support.helpers import DEVICE, TRITON, error, evaluate, on

from fused_infonce import siglip_loss

# Of the loss, of gradients of rows and of those of numbers. bfloat16's 5e-3 is for rows of many components: with two
# the roundings of coefficients do not average.
BOUNDS = {torch.float64: (1e-12, 1e-10, 1e-9), torch.float32: (1e-5, 1e-5, 1e-4), torch.bfloat16: (1e-5, 2e-2, 1e-4)}


def call(draw, dtype):
    """Return the inputs and options of a call, of which ids that compare with nothing are left out."""
    n, m, d = draw(st.integers(1, 20)), draw(st.integers(0, 9)), draw(st.integers(1, 9))
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"image_features": (n, d), "text_features": (n, d)}
    if draw(st.booleans()):
        shapes["negative_text_features"] = (m, d)
    normalize = draw(st.booleans())
    rows = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    inputs = {name: (x if normalize else x / d**0.5).to(dtype) for name, x in rows.items()}
    scale = draw(st.sampled_from([1.0, 10.0])) * (
        0.5 + torch.rand(draw(st.sampled_from([(), (1,), (n,)])), dtype=stats)
    )
    bias = torch.tensor(draw(st.sampled_from([-12.0, -3.0, 0.0, 4.0])), dtype=stats)
    options = {"normalize": normalize, "reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    for name, value in (("logit_scale", scale), ("logit_bias", bias)):
        learned = draw(st.booleans()) or value.numel() > 1
        (inputs if learned else options)[name] = value if learned else value.item()
    if draw(st.booleans()):
        inputs["weight"] = 0.1 + torch.rand(n, dtype=stats)
    if draw(st.booleans()):
        inputs["text_ids"] = torch.randint(4, (n,))
        inputs |= {"image_ids": torch.randint(4, (n,))} if draw(st.booleans()) else {}
        if "negative_text_features" in inputs and draw(st.booleans()):
            inputs["negative_ids"] = torch.randint(4, (m,))
    return inputs, options


def agree(backend, dtype, data, seed, limit):
    """Assert that a call is within its bounds of dense code in float64.

    A gradient far below the scale of the logits, or that of weights far below the losses, is the rest of terms that
    cancel, and is held to what that scale allows.
    """
    torch.manual_seed(seed)
    inputs, options = call(data.draw, dtype)
    got = evaluate(siglip_loss, on(DEVICE[backend], inputs), backend=backend, workspace_limit=limit, **options)
    want = evaluate(dense, {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}, **options)
    of_loss, of_rows, of_number = BOUNDS[dtype]
    assert error(got[0], want[0]) <= of_loss
    scale = torch.as_tensor(inputs.get("logit_scale", options.get("logit_scale"))).max().item() / 50
    for name, gradient in want[1].items():
        bound = of_rows if name.endswith("features") else of_number
        least = want[0].norm() if name == "weight" else scale
        assert (got[1][name].cpu() - gradient).norm() <= bound * max(gradient.norm(), least), name


@given(st.data(), st.sampled_from([*BOUNDS]), st.integers(0, 2**20), st.sampled_from([None, 2**16]))
@settings(max_examples=120)
def test_any_call_equals_dense_code(data, dtype, seed, limit):
    agree("torch", dtype, data, seed, limit)


@pytest.mark.parametrize("backend", [TRITON])
@given(data=st.data(), dtype=st.sampled_from([*BOUNDS]), seed=st.integers(0, 2**20))
@settings(max_examples=15)
def test_any_call_of_kernels_equals_dense_code(backend, data, dtype, seed):
    agree(backend, dtype, data, seed, None)
