"""`backend="reference"` of every loss against independent dense code, in float64, and its second derivatives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    clip,
    debiased,
    decoupled,
    distilled,
    dual_temperature,
    grouped,
    guided,
    info_nce,
    moco,
    model_aware,
    multiple_negatives,
    robust,
    siglip,
    views,
)
from support.helpers import FACTORS, Inputs, differentiable, make_call, pairwise, valid
from support.ranking_calls import SOFTMAXES

from fused_infonce import functional

Loss = Callable[..., torch.Tensor]
N, D, G = 5, 4, 3
# Losses of queries and keys: the oracle, and their options besides those of InfoNCE.
PAIRS: dict[str, tuple[Loss, dict[str, list[Any]]]] = {
    "info_nce": (info_nce.info_nce, {"weight": [None, "rows"], "label_smoothing": [0.0, 0.3]}),
    "decoupled_info_nce": (
        decoupled.decoupled_info_nce,
        {"weight": [None, "rows"], "positive_weight": [None, "rows"]},
    ),
    "debiased_info_nce": (
        debiased.debiased_info_nce,
        {"weight": [None, "rows"], "tau_plus": [0.0, 0.1, "rows"], "normalize": [True]},
    ),
    "model_aware_info_nce": (
        model_aware.model_aware_info_nce,
        {"weight": [None, "rows"], "alpha": [0.0, 0.3], "normalize": [True]},
    ),
    "dual_temperature_info_nce": (
        dual_temperature.dual_temperature_info_nce,
        {"weight": [None, "rows"], "inter_temperature": [0.2, 1.0]},
    ),
    "robust_info_nce": (robust.robust_info_nce, {"weight": [None, "rows"], "rho": [0.0, 0.3]}),
}


def rows(*shape: int, d: int = D) -> torch.Tensor:
    return torch.randn(*shape, d, dtype=torch.float64)


def per_row(n: int = N) -> torch.Tensor:
    return 0.2 + 0.3 * torch.rand(n, dtype=torch.float64)


def scalar() -> torch.Tensor:
    return torch.tensor(0.3, dtype=torch.float64)


def gradients_of(function: Loss, inputs: Inputs, **options: Any) -> list[torch.Tensor]:
    """Return the value and a gradient for every floating input, 0 where it has none."""
    leaves = {name: x.detach().requires_grad_() if differentiable(x) else x for name, x in inputs.items()}
    value = function(**leaves, **options)
    upstream = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    wanted = [x for x in leaves.values() if differentiable(x)]
    return [value, *torch.autograd.grad(value, wanted, upstream, allow_unused=True, materialize_grads=True)]


def assert_same(function: Loss, oracle: Loss, inputs: Inputs, **options: Any) -> None:
    got = gradients_of(function, inputs, backend="reference", **options)
    want = gradients_of(oracle, inputs, **options)
    for ours, truth in zip(got, want, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def pair_cases() -> Iterator[Any]:
    for name, (_, more) in PAIRS.items():
        for case in pairwise(FACTORS | more, valid):
            yield pytest.param(name, case, id="-".join([name, *map(str, case.values())]))


@pytest.mark.parametrize(("name", "case"), [*pair_cases()])
def test_losses_of_queries_and_keys_equal_dense_code(name, case):
    oracle, more = PAIRS[name]
    inputs, options = make_call(N, 7, D, 3, **{factor: case[factor] for factor in FACTORS})
    for option in more.keys() - FACTORS.keys():
        value = case[option]
        if isinstance(value, str):
            value = torch.rand(N, dtype=torch.float64) / 2
        learnt = isinstance(value, torch.Tensor) and option != "tau_plus"
        (inputs if learnt else options)[option] = value
    assert_same(getattr(functional, name), oracle, inputs, **options)


# The other losses: the function, the oracle, and calls, each the tensors that have gradients and the options.
Calls = tuple[Loss, Loss, list[Callable[[], tuple[dict[str, Any], dict[str, Any]]]]]


def of_views(function: Loss) -> Loss:
    def loss(view_a, view_b, view_c, **options):
        return function(view_a, view_b, more_views=[view_c], **options)

    return loss


def two_views(t: Loss, **more: Any) -> dict[str, torch.Tensor]:
    return {"view_a": rows(N), "view_b": rows(N), "temperature": t(), **more}


def teacher(scores: bool) -> dict[str, torch.Tensor]:
    """Return options, since a teacher gets no gradient."""
    return {"teacher_scores": rows(N, d=N)} if scores else {"teacher_query": rows(N, d=3), "teacher_key": rows(N, d=3)}


def guides() -> dict[str, torch.Tensor]:
    return {"guide_query": rows(N), "guide_key": rows(N + 2), "guide_negatives": rows(3)}


LABELS, TARGET = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([3, -100, 0, 0, 4])
PAIR = lambda: {"query": rows(N), "key": rows(N)}  # noqa: E731
GROUPS = lambda: {"query": rows(N), "passages": rows((N + 1) * G), "temperature": per_row()}  # noqa: E731
GUIDED = lambda: {"query": rows(N), "positive_key": rows(N + 2), "temperature": scalar()}  # noqa: E731
CALLS: dict[str, Calls] = {
    "nt_xent": (
        functional.nt_xent,
        views.nt_xent,
        [
            lambda: (two_views(scalar), {"reduction": "none"}),
            lambda: (two_views(lambda: per_row(2 * N)), {"normalize": False}),
            lambda: ({"view_a": rows(1), "view_b": rows(1)}, {}),
        ],
    ),
    "nt_xent of three views": (
        of_views(functional.nt_xent),
        of_views(views.nt_xent),
        [
            lambda: (two_views(scalar, view_c=rows(N)), {"reduction": "none"}),
            lambda: (two_views(lambda: per_row(3 * N), view_c=rows(N)), {"reduction": "sum", "normalize": False}),
        ],
    ),
    "model_aware_nt_xent": (
        functional.model_aware_nt_xent,
        model_aware.model_aware_nt_xent,
        [
            lambda: (two_views(scalar), {"reduction": "none", "alpha": 0.4}),
            lambda: (two_views(lambda: per_row(2 * N)), {"threshold": 0.2}),
        ],
    ),
    "decoupled_nt_xent": (
        functional.decoupled_nt_xent,
        decoupled.decoupled_nt_xent,
        [
            lambda: (two_views(scalar), {"reduction": "sum", "normalize": False}),
            lambda: (two_views(lambda: per_row(2 * N), positive_weight=per_row(2 * N)), {"reduction": "none"}),
        ],
    ),
    "debiased_nt_xent": (
        functional.debiased_nt_xent,
        debiased.debiased_nt_xent,
        [
            lambda: (two_views(scalar), {"tau_plus": 0.3}),
            lambda: (two_views(lambda: per_row(2 * N)), {"tau_plus": per_row(2 * N), "reduction": "none"}),
        ],
    ),
    "sup_con": (
        functional.sup_con,
        views.sup_con,
        [
            lambda: ({"features": rows(N, 2), "temperature": scalar()}, {"labels": LABELS, "reduction": "none"}),
            lambda: ({"features": rows(N, 1), "temperature": scalar()}, {"labels": LABELS, "normalize": False}),
            lambda: ({"features": rows(N, 3)}, {"contrast_mode": "one", "temperature": 0.3, "base_temperature": 0.1}),
            lambda: ({"features": rows(N, 2)}, {"mask": torch.rand(N, N), "temperature": 0.3, "reduction": "sum"}),
        ],
    ),
    "clip_loss": (
        functional.clip_loss,
        clip.clip_loss,
        [
            lambda: ({"image_features": rows(N), "text_features": rows(N), "logit_scale": 1 / scalar()}, {}),
            lambda: (
                {"image_features": rows(N), "text_features": rows(N), "logit_scale": 1 / per_row()[:, None]},
                {"normalize": True, "reduction": "none"},
            ),
            lambda: (
                {"image_features": rows(N), "text_features": rows(N), "logit_bias": scalar()},
                {"logit_scale": 3.0, "reduction": "sum"},
            ),
        ],
    ),
    "siglip_loss": (
        functional.siglip_loss,
        siglip.siglip_loss,
        [
            lambda: (
                {"image_features": rows(N), "text_features": rows(N), "logit_scale": scalar(), "logit_bias": -scalar()},
                {},
            ),
            lambda: (
                {"image_features": rows(N), "text_features": rows(N), "negative_text_features": rows(3)}
                | {"logit_scale": per_row()[:, None], "weight": per_row()},
                {"normalize": True, "reduction": "none", "text_ids": torch.arange(N) % 3, "logit_bias": -1.0}
                | {"negative_ids": torch.arange(3)},
            ),
        ],
    ),
    "moco_loss": (
        functional.moco_loss,
        moco.moco_loss,
        [
            lambda: (PAIR() | {"queue": rows(D, d=7), "temperature": per_row()}, {"reduction": "none"}),
            lambda: (PAIR() | {"queue": rows(D, d=7)}, {"temperature": 0.3, "normalize": False}),
        ],
    ),
    "grouped_info_nce": (
        functional.grouped_info_nce,
        grouped.grouped_info_nce,
        [
            lambda: (GROUPS(), {"group_size": G, "offset": G}),
            lambda: (GROUPS(), {"group_size": G, "in_batch_negatives": False, "reduction": "none"}),
            lambda: (GROUPS(), {"group_size": G, "target": TARGET}),
            lambda: (
                GROUPS(),
                {"group_size": G, "distillation": "kl_div", "teacher_scores": rows(N, d=G), "reduction": "none"},
            ),
            lambda: (
                GROUPS(),
                {"group_size": G, "in_batch_negatives": False}
                | {"distillation": "kl_div", "teacher_scores": rows(N, d=G)},
            ),
            lambda: (
                GROUPS(),
                {
                    "group_size": G,
                    "distillation": "m3_kd_loss",
                    "teacher_scores": rows(N, d=G),
                    "offset": G,
                    "normalize": False,
                },
            ),
        ],
    ),
    "guided_info_nce": (
        functional.guided_info_nce,
        guided.guided_info_nce,
        [
            lambda: (GUIDED(), {}),
            lambda: (GUIDED() | {"negative_keys": rows(3)}, {"margin": 0.2, "contrast_queries": True, "offset": 1}),
            lambda: (
                GUIDED() | {"negative_keys": rows(3), "temperature": per_row()},
                guides() | {"margin": -0.2, "margin_strategy": "relative", "contrast_keys": True, "normalize": False},
            ),
            lambda: (
                GUIDED() | {"negative_keys": rows(N, 3)},
                {
                    "negative_mode": "paired",
                    "spare_negatives": True,
                    "key_ids": torch.arange(N + 2) // 2,
                    "negative_ids": torch.arange(3 * N).view(N, 3) % 4,
                    "contrast_queries": True,
                    "offset": 2,
                    "reduction": "none",
                },
            ),
        ],
    ),
    "distilled_info_nce": (
        functional.distilled_info_nce,
        distilled.distilled_info_nce,
        [
            lambda: (PAIR() | {"temperature": scalar()}, teacher(False) | {"reduction": "none"}),
            lambda: (PAIR() | {"temperature": per_row()}, teacher(True) | {"symmetric": True, "alpha": 0.3}),
            lambda: (
                PAIR() | {"temperature": per_row()},
                teacher(False) | {"objective": "kl_div", "temperature_squared": True, "normalize_teacher": False},
            ),
            lambda: (
                PAIR(),
                teacher(True) | {"target": TARGET, "weight": per_row(), "teacher_temperature": 0.5, "normalize": False},
            ),
            lambda: (PAIR(), teacher(False) | {"objective": "kl_div", "alpha": 0.0, "teacher_temperature": per_row()}),
        ],
    ),
}
OTHER_CALLS = [
    pytest.param(function, oracle, call, id=f"{name}-{i}")
    for name, (function, oracle, calls) in CALLS.items()
    for i, call in enumerate(calls)
]


@pytest.mark.parametrize(("function", "oracle", "call"), OTHER_CALLS)
def test_other_losses_equal_dense_code(function, oracle, call):
    inputs, options = call()
    assert_same(function, oracle, inputs, **options)


def of_columns(function: Loss) -> Loss:
    def loss(query, positive, hard, **options):
        return function(query, [positive, hard], **options)

    return loss


@pytest.mark.parametrize("softmax", SOFTMAXES, ids=str)
@pytest.mark.parametrize("hardness", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
def test_every_softmax_and_hardness_of_multiple_negatives_equals_dense_code(softmax, hardness):
    partition, directions = softmax
    inputs = {name: rows(N + 2) for name in ("positive", "hard")} | {"query": rows(N), "temperature": per_row()}
    options: dict[str, Any] = {"directions": directions, "partition": partition, "hardness": hardness, "offset": 1}
    options |= {"reduction": "none", "hardness_strength": 2.0 if hardness else 0.0}
    every = rows(N + 2)
    if len(directions) > 1:
        inputs["all_queries"] = every
    function, oracle = functional.multiple_negatives, multiple_negatives.multiple_negatives
    assert_same(of_columns(function), of_columns(oracle), inputs, **options)


def test_no_loss_with_a_backend_is_missing_here():
    """A loss without an entry here proves its reference in a file of its own among tests/losses."""
    losses = {f for f in functional.__all__ if "backend" in inspect.signature(getattr(functional, f)).parameters}
    here = {*PAIRS, *CALLS, "multiple_negatives"} - {"nt_xent of three views"}
    texts = [file.read_text() for file in (Path(__file__).parents[1] / "losses").glob("*.py")]
    for name in losses - {"explain"} - here:
        assert any(name in text and 'backend="reference"' in text for text in texts), name
    assert here <= losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_is_at_least_float32(dtype):
    for function in (functional.info_nce, functional.nt_xent, functional.clip_loss, functional.siglip_loss):
        given = {"logit_scale": 3.0} if function in (functional.clip_loss, functional.siglip_loss) else {}
        a, b = (rows(N).to(dtype).requires_grad_() for _ in range(2))
        loss = function(a, b, **given, backend="reference")
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, a)[0].dtype == dtype


SECOND = {
    "info_nce": lambda q, k, t: functional.info_nce(q, k, q[:2], t, in_batch_negatives=True, backend="reference"),
    "symmetric info_nce": lambda q, k, t: functional.info_nce(
        q, k, temperature=t, symmetric=True, normalize=False, key_ids=torch.tensor([0, 1, 0, 2]), backend="reference"
    ),
    "nt_xent": lambda q, k, t: functional.nt_xent(q, k, t, backend="reference"),
    "sup_con": lambda q, k, t: functional.sup_con(
        torch.stack([q, k], 1), LABELS[:4], None, t, base_temperature=None, backend="reference"
    ),
    "clip_loss": lambda q, k, t: functional.clip_loss(q, k, 1 / t, backend="reference"),
    "siglip_loss": lambda q, k, t: functional.siglip_loss(q, k, 1 / t, -t, q[:2], backend="reference"),
    "moco_loss": lambda q, k, t: functional.moco_loss(q, rows(4, d=3), rows(3, d=6), t, backend="reference"),
    "decoupled_info_nce": lambda q, k, t: functional.decoupled_info_nce(q, k, temperature=t, backend="reference"),
    "decoupled_nt_xent": lambda q, k, t: functional.decoupled_nt_xent(q, k, t, backend="reference"),
    "debiased_info_nce": lambda q, k, t: functional.debiased_info_nce(q, k, temperature=t, backend="reference"),
    "debiased_nt_xent": lambda q, k, t: functional.debiased_nt_xent(q, k, t, backend="reference"),
    "robust_info_nce": lambda q, k, t: functional.robust_info_nce(q, k, temperature=t, backend="reference"),
    "grouped_info_nce": lambda q, k, t: functional.grouped_info_nce(
        q, torch.cat([k, k.flip(1)]), 2, temperature=t, distillation="kl_div", teacher_scores=rows(4, d=2).detach(),
        backend="reference",
    ),
    "guided_info_nce": lambda q, k, t: functional.guided_info_nce(q, k, temperature=t, margin=4.0, backend="reference"),
    "distilled_info_nce": lambda q, k, t: functional.distilled_info_nce(
        q, k, torch.eye(4).double(), torch.eye(4).double(), t, teacher_temperature=0.5, backend="reference"
    ),
    "multiple_negatives": lambda q, k, t: functional.multiple_negatives(
        q, [k], t, directions=("query_to_doc", "doc_to_query"), backend="reference"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_are_those_of_finite_differences(name):
    inputs = [rows(4, d=3).requires_grad_() for _ in range(2)]
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(*x):
        torch.manual_seed(0)  # of what a call draws for itself
        return SECOND[name](*x)

    assert torch.autograd.gradcheck(loss, (*inputs, t))
    assert torch.autograd.gradgradcheck(loss, (*inputs, t))
