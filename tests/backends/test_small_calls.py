"""What a small call makes on a CPU, where operators and Python, and not arithmetic, are what it costs."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_infonce.functional import clip_loss, info_nce, nt_xent, sup_con

VIEWS = {"detach", "diagonal", "permute", "slice", "split_with_sizes", "squeeze", "unbind", "unsqueeze"}
FREE = {"empty_like", "_local_scalar_dense", "fill_"}  # conftest fills what is allocated


class Operators(TorchDispatchMode):
    """The names of the operators that compute something."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS | FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


CALLS = {  # the call, and its operators without and with gradients and their backward
    "one direction": (lambda q, k: info_nce(q, k, temperature=0.05), 15, 29),
    "both directions": (lambda q, k: info_nce(q, k, temperature=0.05, symmetric=True), 17, 33),
    "self-similarity": (lambda a, b: nt_xent(a, b, 0.05), 18, 34),
    "of given rows": (lambda q, k: clip_loss(q, k, 20.0), 13, 24),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_small_call_makes_few_operators(name):
    call, forward, training = CALLS[name]
    query, key = F.normalize(torch.randn(2, 32, 16), dim=-1)
    with Operators() as seen:
        call(query, key)
    assert len(seen.names) <= forward, seen.names
    query, key = query.requires_grad_(), key.requires_grad_()
    with Operators() as seen:
        call(query, key).backward()
    assert len(seen.names) <= training, seen.names


def test_no_function_of_a_loss_has_its_signature_inspected(monkeypatch):
    """A Function with `setup_context` has that at every call, which costs as much as ten operators."""
    features, labels = torch.randn(8, 2, 4, requires_grad=True), torch.arange(8) // 2
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "signature", None)
        sup_con(features, labels).backward()
    assert features.grad.isfinite().all()
