"""The interpreter that the tests make faster computes what Triton's own does, to the bit."""

import pytest
import torch
from support.helpers import FACTORS, INTERPRETED, call_of, evaluate, make_call

from fused_infonce import info_nce
from fused_infonce.functional import siglip_loss

if not INTERPRETED:  # which kernels that are compiled must not see
    pytest.skip("kernels are compiled for the GPU in this process", allow_module_level=True)
interpreter = pytest.importorskip("support.interpreter", reason="triton is not installed", exc_type=ImportError)
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreter.KNOWN, reason="of Triton 3.7 and 3.8; other releases are left as they are"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WIDE = {name: values[-1] for name, values in FACTORS.items()} | {"negatives": "paired", "ids": "keys"}


def both(function, inputs, **options):
    """Pair the loss and each gradient of Triton's own interpreter with that of the faster one."""
    with interpreter.as_triton_has_it():
        theirs = evaluate(function, inputs, backend="triton", **options)
    ours = evaluate(function, inputs, backend="triton", **options)
    return [(theirs[0], ours[0]), *((theirs[1][name], ours[1][name]) for name in inputs)]


def assert_the_same_bits(pairs):
    for theirs, ours in pairs:
        assert theirs.dtype == ours.dtype
        assert theirs.isfinite().all()
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_directions_have_the_same_bits(dtype):
    assert_the_same_bits(both(info_nce, call_of(17, 20, "tight", dtype), symmetric=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_ids_and_own_negatives_have_the_same_bits(dtype):
    inputs, options = make_call(11, 13, 8, 3, dtype, **(WIDE | {"symmetric": False}))
    named = {name: inputs.pop(name) for name in [*inputs] if not inputs[name].is_floating_point()}
    assert_the_same_bits(both(info_nce, inputs, **named, **options))


def test_a_loss_of_sigmoids_has_the_same_bits():
    inputs = call_of(9, 8)
    a, b = inputs["query"], inputs["positive_key"]
    assert_the_same_bits(both(siglip_loss, {"image_features": a, "text_features": b}, logit_scale=10.0))


def test_both_interpreters_are_what_they_say():
    """Else the comparisons above compare one with itself."""

    def put():
        return [obj.__dict__.get(name, getattr(obj, name)) for obj, name, _ in interpreter.FASTER]

    with interpreter.as_triton_has_it():
        theirs = put()
    assert theirs == [part for _, _, part in interpreter.OWN]
    assert [x for x in put() if x not in theirs] == [part for _, _, part in interpreter.FASTER]
