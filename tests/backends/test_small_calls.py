"""What a small call makes on a CPU, where operators and Python, and not arithmetic, are what it costs."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.helpers import forget_plans
from torch.utils._python_dispatch import TorchDispatchMode

import fused_infonce
from fused_infonce import contrast, explain
from fused_infonce.backends import device, registry
from fused_infonce.backends.plan import MIB
from fused_infonce.functional import clip_loss, info_nce, nt_xent, siglip_loss, sup_con

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


# the call; its operators, without and with gradients and their backward; and its calls of Python, so too
CALLS = {
    "one direction": (lambda q, k: info_nce(q, k, temperature=0.05), (18, 29), (8, 42)),
    "both directions": (lambda q, k: info_nce(q, k, temperature=0.05, symmetric=True), (20, 33), (8, 45)),
    "self-similarity": (lambda a, b: nt_xent(a, b, 0.05), (18, 31), (7, 44)),
    "sigmoids": (lambda q, k: siglip_loss(q, k, 20.0, -10.0), (10, 20), (66, 85)),
    "of given rows": (lambda q, k: clip_loss(q, k, 20.0), (13, 24), (36, 53)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_small_call_makes_few_operators(name):
    call, (forward, training), _ = CALLS[name]
    query, key = F.normalize(torch.randn(2, 32, 16), dim=-1)
    for _ in range(2):  # the first loads the backend, and what the second was is remembered
        call(query, key)
    with Operators() as seen:
        call(query, key)
    assert len(seen.names) <= forward, seen.names
    query, key = query.requires_grad_(), key.requires_grad_()
    with Operators() as seen:
        call(query, key).backward()
    assert len(seen.names) <= training, seen.names


@pytest.mark.parametrize("name", CALLS)
def test_a_small_call_makes_few_calls_of_python(name, monkeypatch):
    """Calls of this package's functions; comprehensions are none, which have no frames from Python 3.12 on."""
    call, _, (forward, training) = CALLS[name]
    folder = str(Path(fused_infonce.__file__).parent)
    query, key = F.normalize(torch.randn(2, 32, 16), dim=-1)

    def count(run):
        seen = []

        def note(frame, event, _):
            code = frame.f_code
            if event == "call" and code.co_filename.startswith(folder) and not code.co_name.endswith("comp>"):
                seen.append(code.co_name)

        for _ in range(2):  # all that there is to remember is remembered from then on
            run()
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
        return seen

    seen = count(lambda: call(query, key))
    assert len(seen) <= forward, seen
    query, key = query.requires_grad_(), key.requires_grad_()
    seen = count(lambda: call(query, key).backward())
    assert len(seen) <= training, seen


def rows(n=6, d=4, **options):
    return torch.randn(n, d, **options)


FACTS = {  # what a plan depends on, one thing after another
    "pairs": lambda: info_nce(rows(), rows()),
    "more rows": lambda: info_nce(rows(7), rows(7)),
    "longer rows": lambda: info_nce(rows(6, 5), rows(6, 5)),
    "float64": lambda: info_nce(rows().double(), rows().double()),
    "bfloat16": lambda: info_nce(rows().bfloat16(), rows().bfloat16()),
    "a gradient": lambda: info_nce(rows(requires_grad=True), rows()),
    "that of a temperature": lambda: info_nce(rows(), rows(), temperature=torch.tensor(0.1, requires_grad=True)),
    "a temperature a row": lambda: info_nce(rows(), rows(), temperature=torch.full((6,), 0.1)),
    "cold": lambda: info_nce(rows(), rows(), temperature=0.001),
    "not normalised": lambda: info_nce(rows(), rows(), normalize=False),
    "rows": lambda: info_nce(rows(), rows(), reduction="none"),
    "both directions": lambda: info_nce(rows(), rows(), symmetric=True),
    "views": lambda: nt_xent(rows(3), rows(3)),
    "weights": lambda: info_nce(rows(), rows(), weight=torch.ones(6)),
    "targets": lambda: info_nce(rows(), rows(), target=torch.arange(6)),
    "more keys": lambda: info_nce(rows(), rows(9), target=torch.arange(6)),
    "ids": lambda: info_nce(rows(), rows(), query_ids=torch.arange(6), key_ids=torch.arange(6)),
    "a bias": lambda: info_nce(rows(), rows(), key_bias=torch.zeros(6)),
    "a margin": lambda: info_nce(rows(), rows(), margin=0.1),
    "negatives": lambda: info_nce(rows(), rows(), rows(5)),
    "theirs beside": lambda: info_nce(rows(), rows(), rows(5), in_batch_negatives=True),
    "paired": lambda: info_nce(rows(), rows(), torch.randn(6, 2, 4), negative_mode="paired"),
    "a table": lambda: info_nce(rows(), rows(), rows(5), negative_index=torch.zeros(6, 3, dtype=torch.int64)),
    "a workspace": lambda: info_nce(rows(), rows(), workspace_limit=1 << 17),
    "reference": lambda: info_nce(rows(), rows(), backend="reference"),
}


def plans(calls):
    found = {}
    for name, call in calls.items():
        with contrast.explaining() as found[name]:
            call()
    return found


def test_a_plan_is_remembered_for_calls_alike_alone():
    """Twenty-five calls, each of which differs from the first in one fact, get the plans that they get alone."""
    alone = {}
    for name, call in FACTS.items():
        forget_plans()
        alone |= plans({name: call})
    forget_plans()
    plans(FACTS)
    known = len(registry.remembered)
    assert plans(FACTS) == alone
    assert len(registry.remembered) == known == len(FACTS)


def test_autocast_is_a_fact_of_a_plan():
    query, key = rows(6, 4), rows(6, 4)
    plain = explain(query, key)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = explain(query, key)[0]
        assert explain(query.bfloat16(), key.bfloat16())[0].as_is is cast.as_is is False
    assert plain.as_is
    assert explain(query, key)[0] == plain


def test_the_plans_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(registry, "MOST_PLANS", 3)
    for n in range(2, 9):
        info_nce(rows(n), rows(n))
        assert 0 < len(registry.remembered) <= 3


def test_the_environment_is_read_at_the_first_call(monkeypatch):
    assert explain(rows(), rows())[0].limit == 64 * MIB
    monkeypatch.setenv("FUSED_INFONCE_WORKSPACE_LIMIT", str(MIB))
    assert explain(rows(), rows())[0].limit == 64 * MIB
    device._FACTS.clear()
    assert explain(rows(), rows())[0].limit == MIB


@pytest.mark.parametrize("number", [0.05, 0.1, 1 / 3])
def test_a_number_is_the_temperature_that_its_tensor_holds(number):
    query, key = rows(8), rows(8)
    for options in ({}, {"symmetric": True}, {"reduction": "none"}):
        of_number, of_tensor = (info_nce(query, key, temperature=t, **options) for t in (number, torch.tensor(number)))
        assert torch.equal(of_number, of_tensor)


def test_no_function_of_a_loss_has_its_signature_inspected(monkeypatch):
    """A Function with `setup_context` has that at every call, which costs as much as ten operators."""
    features, labels = torch.randn(8, 2, 4, requires_grad=True), torch.arange(8) // 2
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "signature", None)
        sup_con(features, labels).backward()
    assert features.grad.isfinite().all()
