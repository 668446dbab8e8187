"""A warning about the backend, or about a fallback, names the line of the user's code."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch

from fused_infonce import FusedInfoNCELoss, MatryoshkaLoss, NTXentLoss, info_nce, sup_con
from fused_infonce.backends import registry

CALLS = {
    "a function": lambda x: info_nce(x, x),
    "a function that calls another": lambda x: sup_con(torch.stack([x, x], dim=1)),
    "a module": lambda x: FusedInfoNCELoss()(x, x),
    "a module of views": lambda x: NTXentLoss()(x, x, x),
    "a module in a module": lambda x: MatryoshkaLoss(FusedInfoNCELoss(), [4, 2])(x, x),
    "an explanation": lambda x: FusedInfoNCELoss().explain(x, x),
}


@pytest.fixture
def no_triton(monkeypatch):
    """Let every call see a GPU on which Triton cannot run. The stand-in's frame lies in the package, as resolve's."""
    scope = {
        "resolve": registry.resolve,
        "gpu": SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32),
    }
    code = "def stand_in(backend, tensor):\n    return resolve(backend, gpu)\n"
    exec(compile(code, registry.__file__, "exec"), scope)
    monkeypatch.setattr(registry, "resolve", scope["stand_in"])
    monkeypatch.setattr(registry, "unavailable", lambda *_: "of a reason")


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_about_the_backend_names_the_users_line(name, no_triton):
    line = inspect.getsourcelines(CALLS[name])[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name](torch.randn(4, 4))
    assert caught
    for warning in caught:
        assert str(warning.message) == "backend='auto' runs in PyTorch, slower: of a reason"
        assert (warning.filename, warning.lineno) == (__file__, line)
