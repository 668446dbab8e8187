"""A batch of one pair has no negatives: a warning says so, once in a process, at the user's line."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import fused_infonce as f
from fused_infonce.compose import reduction

D = 6


def rows(*shape):
    return torch.randn(*shape, D, requires_grad=True)


# Calls that compare with nothing, or with nothing but one key.
ALONE = {
    "info_nce": lambda: f.info_nce(rows(1), rows(1)),
    "info_nce, symmetric": lambda: f.info_nce(rows(1), rows(1), symmetric=True),
    "info_nce, one key for all": lambda: f.info_nce(rows(3), rows(1), target=torch.zeros(3, dtype=torch.int64)),
    "FusedInfoNCELoss": lambda: f.FusedInfoNCELoss()(rows(1), rows(1)),
    "ClipLoss": lambda: f.ClipLoss()(rows(1), rows(1), 10.0),
    "DCLLoss": lambda: f.DCLLoss()(rows(1), rows(1)),
    "DCLLoss of keys": lambda: f.DCLLoss(negatives="keys")(rows(1), rows(1)),
    "DebiasedLoss": lambda: f.DebiasedLoss()(rows(1), rows(1)),
    "GroupedInfoNCELoss": lambda: f.GroupedInfoNCELoss(1)(rows(1), rows(1)),
    "GuidedInfoNCELoss": lambda: f.GuidedInfoNCELoss()(rows(1), rows(1)),
    "MatryoshkaLoss": lambda: f.MatryoshkaLoss(f.FusedInfoNCELoss(), [D, 2])(rows(1), rows(1)),
    "MultipleNegativesLoss": lambda: f.MultipleNegativesLoss()(rows(1), [rows(1)]),
    "NTXentLoss": lambda: f.NTXentLoss()(rows(1), rows(1)),
    "SupConLoss": lambda: f.SupConLoss()(rows(1, 2)),
}
# Calls of one pair that do have negatives, and calls of no pairs.
ACCOMPANIED = {
    "shared negatives": lambda: f.info_nce(rows(1), rows(1), rows(3)),
    "shared negatives, symmetric": lambda: f.info_nce(rows(1), rows(1), rows(3), symmetric=True),
    "paired negatives": lambda: f.info_nce(rows(1), rows(1), rows(1, 3), negative_mode="paired"),
    "one query, many keys": lambda: f.info_nce(rows(1), rows(4), target=torch.tensor([2])),
    "a queue": lambda: f.MoCoLoss(D, queue_size=5)(rows(1), rows(1)),
    "a group": lambda: f.GroupedInfoNCELoss(3)(rows(1), rows(3)),
    "guided, with negatives": lambda: f.GuidedInfoNCELoss()(rows(1), rows(1), rows(3)),
    "hard negatives": lambda: f.MultipleNegativesLoss()(rows(1), [rows(1), rows(1)]),
    "hard negatives, all directions": lambda: f.MultipleNegativesLoss(
        directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    )(rows(1), [rows(1), rows(1)]),
    "three views of one sample": lambda: f.SupConLoss()(rows(1, 3)),
    "two pairs": lambda: f.info_nce(rows(2), rows(2)),
    "two samples": lambda: f.NTXentLoss()(rows(2), rows(2)),
}


@pytest.fixture(autouse=True)
def a_new_process():
    reduction._said.clear()
    yield
    reduction._said.clear()


@pytest.mark.parametrize("name", ALONE)
def test_it_is_said_once_at_the_users_line(name):
    line = inspect.getsourcelines(ALONE[name])[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = [ALONE[name]() for _ in range(3)]
    assert [x.item() for x in values] == [0, 0, 0]
    (warning,) = caught
    assert warning.category is UserWarning
    assert "has no negatives" in str(warning.message)
    assert (warning.filename, warning.lineno) == (__file__, line)


@pytest.mark.parametrize("name", ACCOMPANIED)
def test_nothing_is_said_of_a_call_that_has_negatives(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ACCOMPANIED[name]().item() > 0


def test_nothing_is_said_while_torch_compile_records():
    torch._dynamo.reset()
    run = torch.compile(f.FusedInfoNCELoss(), fullgraph=True, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run(rows(1), rows(1)).item() == 0
    assert not [x for x in caught if "negatives" in str(x.message)]
