"""SigLIP's loss in compiled kernels: accuracy at sizes of many tiles, the capture of a graph, no synchronisation.

See conftest.py for these without a GPU.
"""

import pytest
import torch
from oracles.siglip import siglip_loss as dense
from support.helpers import bounds, embeddings, error, evaluate
from support.stand_in import DEVICE, captured, forbid_waiting, size

from fused_infonce import siglip_loss

pytestmark = pytest.mark.usefixtures("triton_device")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs_of(n, d, dtype, scale=20.0, bias=-10.0):
    rows = embeddings("medium", n, d, size(300, 7))
    names = ("image_features", "text_features", "negative_text_features")
    inputs = {name: x.to(DEVICE, dtype) for name, x in zip(names, rows, strict=True)}
    return inputs | {name: torch.tensor(x, device=DEVICE) for name, x in (("logit_scale", scale), ("logit_bias", bias))}


@pytest.mark.parametrize("shape", [(4096, 768), (5003, 100), (700, 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_keep_the_bounds(shape, dtype):
    n, d = (size(there, here) for there, here in zip(shape, (40, 24), strict=True))
    inputs = inputs_of(n, d, dtype)
    upstream = 2.0**12 if dtype == torch.float16 else 1.0
    loss, gradients = evaluate(siglip_loss, inputs, torch.tensor(upstream), backend="triton")
    want, exact = evaluate(dense, {name: x.double() for name, x in inputs.items()})
    of_loss, of_gradients = bounds(dtype, 1 / 20, n)
    assert error(loss, want) <= of_loss
    for name, gradient in exact.items():
        allowed = 1e-4 if name.startswith("logit") else of_gradients
        assert error(gradients[name].double() / upstream, gradient) <= allowed, name


@pytest.fixture
def no_synchronisation():
    yield lambda: forbid_waiting(True)
    forbid_waiting(False)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_call_does_not_wait_for_the_gpu(backend, reduction, no_synchronisation):
    leaves = {name: x.requires_grad_() for name, x in inputs_of(size(500, 20), size(64, 8), torch.bfloat16).items()}
    weight = torch.ones(len(leaves["image_features"]), device=DEVICE)
    ids = torch.arange(len(weight), device=DEVICE) // 2

    def step():
        loss = siglip_loss(**leaves, weight=weight, text_ids=ids, reduction=reduction, backend=backend)
        return torch.autograd.grad(loss.sum(), list(leaves.values()))

    step()  # compiles
    no_synchronisation()
    gradients = step()
    forbid_waiting(False)
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_a_captured_graph_replays_on_other_values():
    static = {name: x.requires_grad_() for name, x in inputs_of(size(500, 20), size(96, 8), torch.bfloat16).items()}

    def step():
        loss = siglip_loss(**static, backend="triton")
        return loss, torch.autograd.grad(loss, list(static.values()))

    replay, (loss, gradients) = captured(step)
    torch.manual_seed(1)
    fresh = inputs_of(size(500, 20), size(96, 8), torch.bfloat16, 15.0, -7.0)
    with torch.no_grad():
        for name, x in fresh.items():
            static[name].copy_(x)
    replay()
    want_loss, want_gradients = step()
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(x, y) for x, y in zip(gradients, want_gradients, strict=True))
