"""A refusal says what to do instead: units, the way to stack views, the option that was meant."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.helpers import set_limit
from support.losses import LOSSES

import fused_infonce as f
from fused_infonce import FusedInfoNCELoss, MoCoLoss, SupConLoss, explain, guided_info_nce, info_nce, sup_con
from fused_infonce.backends import plan

N, D = 4, 6
ROWS = torch.randn(N, D)
VARIABLE = "FUSED_INFONCE_WORKSPACE_LIMIT"


@pytest.mark.least_limit
@pytest.mark.parametrize("limit", [256, 65535, 0, -1, 2**63])
def test_a_workspace_limit_in_mib_is_refused_by_argument_and_by_environment(limit, monkeypatch):
    message = rf"must be a number of bytes, 65536 \(64 KiB\) or more \(256 MiB is 256 \* 2\*\*20.*got {limit}"
    for call in (lambda: info_nce(ROWS, ROWS, workspace_limit=limit), lambda: FusedInfoNCELoss(workspace_limit=limit)):
        with pytest.raises(ValueError, match=f"workspace_limit {message}"):
            call()
    if limit >= 0:
        set_limit(monkeypatch, str(limit))
        with pytest.raises(ValueError, match=f"{VARIABLE} {message}"):
            info_nce(ROWS, ROWS)


@pytest.mark.least_limit
@pytest.mark.parametrize("text", ["64M", "1e9", "-1", "0x100000"])
def test_an_environment_variable_that_is_no_number_is_refused(text, monkeypatch):
    set_limit(monkeypatch, text)
    with pytest.raises(ValueError, match=f"{VARIABLE} must be a number of bytes.*got '{text}'"):
        info_nce(ROWS, ROWS)


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_environment_variable_counts_as_unset(text, monkeypatch):
    set_limit(monkeypatch, text)
    assert explain(ROWS, ROWS)[0].limit == 64 * plan.MIB


@pytest.mark.parametrize("limit", ["70000", "", 1e9, True])
def test_a_workspace_limit_of_another_type_is_refused(limit):
    with pytest.raises(TypeError, match="workspace_limit must be an integer number of bytes or None"):
        info_nce(ROWS, ROWS, workspace_limit=limit)


@pytest.mark.least_limit
def test_the_least_limit_is_accepted():
    assert explain(ROWS, ROWS, workspace_limit=65536)[0].limit == 65536


VIEWS = torch.randn(N, 2, D)
TEACHES = {
    "SupCon: (N, D)": (lambda: sup_con(ROWS), r"torch\.stack\(\[view_a, view_b\], dim=1\).*\.unsqueeze\(1\)"),
    "SupCon: views stacked on dimension 0": (
        lambda: SupConLoss()(torch.stack([ROWS, ROWS]), torch.arange(N)), r"torch\.stack\(\[view_a, view_b\], dim=1\)",
    ),
    "SupCon: one-hot labels": (lambda: sup_con(VIEWS, torch.eye(N).long()), r"labels\.argmax\(1\)"),
    "SupCon: one-hot float labels": (lambda: sup_con(VIEWS, torch.eye(N)), r"labels\.argmax\(1\)"),
    "SupCon: several labels a sample": (lambda: sup_con(VIEWS, torch.ones(N, 3).long()), r"mask="),
    "paired negatives as unpaired": (lambda: info_nce(ROWS, ROWS, torch.randn(N, 3, D)), "negative_mode='paired'"),
    "unpaired negatives as paired": (
        lambda: info_nce(ROWS, ROWS, ROWS, negative_mode="paired"), "negative_mode='unpaired'",
    ),
    "Guided: paired negatives as unpaired": (
        lambda: guided_info_nce(ROWS, ROWS, torch.randn(N, 3, D)), "negative_mode='paired'",
    ),
    "Guided: unpaired negatives as paired": (
        lambda: guided_info_nce(ROWS, ROWS, ROWS, negative_mode="paired"), "negative_mode='unpaired'",
    ),
    "MoCo: a queue of another dim": (lambda: MoCoLoss(8)(ROWS, ROWS), r"MoCoLoss\(dim=8\).*need dim=6"),
    "MoCo: keys of another dim": (lambda: MoCoLoss(8).enqueue(ROWS), "the dim of this loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEACHES)
def test_a_refusal_says_what_to_do(name):
    call, message = TEACHES[name]
    with pytest.raises(ValueError, match=message):
        call()


# Every tensor that a call takes, by the name that its error says.
SPARSE = {
    "query": lambda x: info_nce(x(ROWS), ROWS),
    "positive_key": lambda x: info_nce(ROWS, x(ROWS)),
    "negative_keys": lambda x: info_nce(ROWS, ROWS, x(ROWS)),
    "target": lambda x: info_nce(ROWS, ROWS, target=x(torch.arange(N))),
    "query_ids": lambda x: info_nce(ROWS, ROWS, query_ids=x(torch.arange(N)), key_ids=torch.arange(N)),
    "key_ids": lambda x: info_nce(ROWS, ROWS, key_ids=x(torch.arange(N))),
    "key_bias": lambda x: info_nce(ROWS, ROWS, key_bias=x(torch.ones(N))),
    "weight": lambda x: info_nce(ROWS, ROWS, weight=x(torch.ones(N))),
    "temperature": lambda x: info_nce(ROWS, ROWS, temperature=x(torch.ones(N))),
    "view_b": lambda x: f.nt_xent(ROWS, x(ROWS)),
    "more_views": lambda x: f.nt_xent(ROWS, ROWS, more_views=[x(ROWS)]),
    "features": lambda x: sup_con(x(VIEWS)),
    "labels": lambda x: sup_con(VIEWS, x(torch.arange(N))),
    "mask": lambda x: sup_con(VIEWS, mask=x(torch.eye(N))),
    "image_features": lambda x: f.clip_loss(x(ROWS), ROWS, 1.0),
    "text_features": lambda x: f.clip_loss(ROWS, x(ROWS), 1.0),
    "logit_scale": lambda x: f.clip_loss(ROWS, ROWS, x(torch.ones(N))),
    "logit_bias": lambda x: f.clip_loss(ROWS, ROWS, 1.0, x(torch.ones(1))),
    "negative_text_features": lambda x: f.siglip_loss(ROWS, ROWS, 1.0, 0.0, x(ROWS)),
    "queue": lambda x: f.moco_loss(ROWS, ROWS, x(torch.randn(D, 9))),
    "key": lambda x: f.moco_loss(ROWS, x(ROWS), torch.randn(D, 9)),
    "passages": lambda x: f.grouped_info_nce(ROWS, x(ROWS), 1),
    "teacher_scores": lambda x: f.distilled_info_nce(ROWS, ROWS, teacher_scores=x(torch.randn(N, N))),
    "teacher_key": lambda x: f.distilled_info_nce(ROWS, ROWS, ROWS, x(ROWS)),
    "guide_key": lambda x: guided_info_nce(ROWS, ROWS, guide_query=ROWS, guide_key=x(ROWS)),
    "documents": lambda x: f.multiple_negatives(ROWS, [x(ROWS)]),
    "tau_plus": lambda x: f.debiased_info_nce(ROWS, ROWS, tau_plus=x(torch.full((N,), 0.1))),
    "positive_weight": lambda x: f.decoupled_info_nce(ROWS, ROWS, positive_weight=x(torch.ones(N))),
}  # fmt: skip


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_tensors_are_refused(name):
    for sparse in (torch.Tensor.to_sparse, *([torch.Tensor.to_sparse_csr] if name in ("query", "queue") else [])):
        with pytest.raises(TypeError, match=rf"^{name}(\[0\])? must be a dense tensor \(use \.to_dense\(\)\)"):
            SPARSE[name](sparse)


SWITCHES = ("symmetric", "in_batch_negatives", "temperature_squared", "spare_negatives", "contrast_keys", "normalize")


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_a_word_is_no_answer_to_yes_or_no(make):
    taken = inspect.signature(make).parameters
    for name in filter(taken.__contains__, SWITCHES):
        more = {"negatives": "keys"} if "negatives" in taken else {}
        with pytest.raises(ValueError, match=f"{name} must be one of True, False(, None)?, got 'no'"):
            make(**{name: "no"}, **more)
    if "ignore_index" in taken:
        with pytest.raises(TypeError, match="ignore_index must be an integer, got str"):
            make(ignore_index="x")


META = {
    "query": lambda x: info_nce(x, x),
    "view_a": lambda x: f.nt_xent(x, x),
    "image_features": lambda x: f.clip_loss(x, x, 1.0),
    "features": lambda x: sup_con(x[:, None]),
}


@pytest.mark.parametrize("name", META)
def test_tensors_without_values_are_refused(name):
    with pytest.raises(TypeError, match=f"^{name} must hold values, got a tensor on the meta device"):
        META[name](ROWS.to("meta"))


def test_nested_tensors_are_refused():
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([ROWS, ROWS[:2]], layout=layout)
        with pytest.raises(TypeError, match="query must be a dense tensor, got a nested tensor"):
            info_nce(nested, nested)
