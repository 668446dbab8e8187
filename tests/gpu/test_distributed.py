"""Losses over processes on a GPU: over NCCL with one process, a captured graph, no synchronisation.

See conftest.py for these without a GPU, where the process talks to itself through gloo. With one process the gathered
rows are its own, so that everything but the network is seen.
"""

import pytest
import torch
import torch.distributed as dist
from support.helpers import embeddings, error
from support.stand_in import DEVICE, captured, forbid_waiting, size

from fused_infonce import Distributed, info_nce, nt_xent, siglip_loss

pytestmark = pytest.mark.usefixtures("triton_device", "group")
LOSSES = {
    "one direction": info_nce,
    "both directions": lambda a, b, **o: info_nce(a, b, symmetric=True, **o),
    "views": nt_xent,
    "sigmoids": lambda a, b, temperature, **o: siglip_loss(a, b, 1 / temperature, normalize=True, **o),
}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group(
        "nccl" if DEVICE.type == "cuda" else "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def inputs_of(n, d, dtype=torch.bfloat16):
    return [x.to(DEVICE, dtype).requires_grad_() for x in embeddings("medium", n, d)[:2]]


@pytest.mark.parametrize("exchange", ["gather", "stream"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_process_that_gathers_from_itself_has_its_own_loss(name, exchange):
    a, b = inputs_of(size(3000, 20), size(384, 8))
    given = {"temperature": torch.tensor(0.05, device=DEVICE, requires_grad=True), "backend": "triton"}
    found = []
    for distributed in (False, Distributed(exchange=exchange)):
        value = LOSSES[name](a, b, distributed=distributed, **given)
        found.append((value, *torch.autograd.grad(value, (a, b, given["temperature"]))))
    assert error(found[1][0], found[0][0]) <= 1e-5
    for mine, alone in zip(found[1][1:], found[0][1:], strict=True):
        assert error(mine.double(), alone.double()) <= 5e-3


@pytest.fixture
def no_synchronisation():
    yield lambda: forbid_waiting(True)
    forbid_waiting(False)


@pytest.mark.parametrize("exchange", ["gather", "stream"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_silent_call_does_not_wait_for_the_gpu(name, exchange, no_synchronisation):
    a, b = inputs_of(size(500, 20), size(64, 8))
    t = torch.tensor(0.05, device=DEVICE, requires_grad=True)
    silent = Distributed(exchange=exchange, check="none")

    def step():
        value = LOSSES[name](a, b, temperature=t, distributed=silent, backend="triton")
        return torch.autograd.grad(value, (a, b, t))

    step()  # compiles
    no_synchronisation()
    gradients = step()
    forbid_waiting(False)
    assert all(g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_a_captured_graph_replays_on_other_values(name):
    static = inputs_of(size(500, 20), size(96, 8))
    silent = Distributed(check="none")

    def step():
        value = LOSSES[name](*static, temperature=0.05, distributed=silent, backend="triton")
        return value, torch.autograd.grad(value, static)

    replay, (value, gradients) = captured(step)
    torch.manual_seed(1)
    with torch.no_grad():
        for old, new in zip(static, inputs_of(size(500, 20), size(96, 8)), strict=True):
            old.copy_(new)
    replay()
    want, wanted = step()
    assert torch.equal(value, want)
    assert all(torch.equal(x, y) for x, y in zip(gradients, wanted, strict=True))
