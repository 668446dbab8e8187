"""`explain` speaks to a stranger: every loss has it, it takes the arguments of a call, and a reason has no jargon."""

from __future__ import annotations

import pytest
import torch

import fused_infonce as f
from fused_infonce.backends import plan

D = 6


def rows(*shape):
    return torch.randn(*shape, D, requires_grad=True)


CALLS = {
    "ClipLoss": lambda: (f.ClipLoss(), (rows(4), rows(4), 10.0), {}),
    "DCLLoss": lambda: (f.DCLLoss(), (rows(4), rows(4)), {}),
    "DebiasedLoss": lambda: (f.DebiasedLoss(), (rows(4), rows(4)), {}),
    "DistillationLoss": lambda: (f.DistillationLoss(), (rows(4), rows(4)), {"teacher_scores": torch.randn(4, 4)}),
    "FusedInfoNCELoss": lambda: (f.FusedInfoNCELoss(), (rows(4), rows(4)), {"key_ids": torch.arange(4)}),
    "GroupedInfoNCELoss": lambda: (f.GroupedInfoNCELoss(2), (rows(4), rows(8)), {"offset": 0}),
    "GuidedInfoNCELoss": lambda: (f.GuidedInfoNCELoss(), (rows(4), rows(4)), {}),
    "MatryoshkaLoss": lambda: (f.MatryoshkaLoss(f.FusedInfoNCELoss(), [D, 3]), (rows(4), rows(4)), {}),
    "MoCoLoss": lambda: (f.MoCoLoss(D, queue_size=8), (rows(4), rows(4)), {}),
    "MultipleNegativesLoss": lambda: (f.MultipleNegativesLoss(), (rows(4), [rows(4)]), {}),
    "NTXentLoss": lambda: (f.NTXentLoss(), (rows(4), rows(4)), {}),
    "SigLipLoss": lambda: (f.SigLipLoss(), (rows(4), rows(4), 10.0, -10.0), {"text_ids": torch.arange(4)}),
    "SupConLoss": lambda: (f.SupConLoss(), (rows(4, 2),), {"labels": torch.arange(4) % 2}),
}
# Words of this library's sources, or names of its internals.
JARGON = ("chunk", "coefficient", "upstream", "column", "accumulator", "exp(", "logit", "tile", "late", "the limit")
REASONS = sorted({reason for rules, _ in plan.RULES.values() for *_, reason in rules})


@pytest.mark.parametrize("name", CALLS)
def test_every_loss_explains_the_arguments_of_its_call(name):
    loss, arguments, options = CALLS[name]()
    said = str(loss.explain(*arguments, **options))
    for line in said.splitlines():
        assert " on the torch backend, because " in line
        assert any(reason in line for reason in REASONS), line
        assert "FLOPs" in line
    assert len(said.splitlines()) >= (2 if name == "MatryoshkaLoss" else 1)
    with pytest.raises(TypeError, match=r"Loss\.forward\(\) got an unexpected keyword argument 'temprature'"):
        loss.explain(*arguments, **options, temprature=0.02)


def test_a_misspelt_argument_is_answered_with_the_function_that_the_user_called():
    with pytest.raises(TypeError, match=r"^info_nce\(\) got an unexpected keyword argument 'temprature'"):
        f.explain(rows(4), rows(4), temprature=0.02)


def test_a_symmetric_call_with_explicit_negatives_has_two_plans():
    inputs = rows(4), rows(4), rows(3)
    options = {"temperature": 0.2, "symmetric": True}
    plans = f.explain(*inputs, **options)
    assert plans == f.FusedInfoNCELoss(**options).explain(*inputs)
    assert len(plans) == len(str(plans).splitlines()) == 2
    assert len(f.explain(*inputs[:2], **options)) == len(f.explain(*inputs)) == 1


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_has_no_jargon(reason):
    assert not [word for word in JARGON if word in reason]


def test_an_explanation_says_what_its_numbers_mean():
    said = str(f.explain(rows(3000), rows(3000)))
    assert said.startswith("onepass on the torch backend, because a block of queries meets all keys at once")
    assert "6 N M D FLOPs forward and backward" in said
    assert "a matrix product of N queries and M keys is 2" in said
    assert "at most 64 MiB of workspace" in said
    with torch.no_grad():
        assert "2 N M D FLOPs forward (" in str(f.explain(rows(3000), rows(3000)))
    assert "workspace" not in str(f.explain(rows(4), rows(4), backend="reference"))
    assert "reduction='none'" in str(f.explain(rows(3000), rows(3000), reduction="none"))
    small = str(f.explain(rows(3000), rows(3000), workspace_limit=2**17))
    assert "workspace_limit" in small
