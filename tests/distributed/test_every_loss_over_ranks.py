"""A loss over several ranks is the loss of one process that has the rows of all: its value and every gradient."""

from __future__ import annotations

import inspect
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calls_over_ranks import CASES, D
from support.ranks import Case, Outcome, apart, drawn, far, gathered, joined, of_ranks, one_after_another, outcome, same
from torch import Tensor

from fused_infonce import Distributed, functional, multiple_negatives, statistics
from fused_infonce.distributed.loopback import Loopback, LoopbackCommunicator

LOSSES = Path(__file__).parents[1] / "losses"
WORLDS = (1, 2, 8)  # and 4 in float32
REFUSED = {"sup_con": {"mask"}, "distilled_info_nce": {"teacher_scores"},
           "multiple_negatives": {"offset", "all_queries"}}  # fmt: skip  # over several ranks; see test_mistakes.py
EVERYWHERE = {"temperature", "logit_scale", "reduction", "normalize", "backend", "workspace_limit", "distributed"}
FIRST = list({title.split()[0]: title for title in reversed(CASES)}.values())  # a case of each function
OF_16_BITS = (
    "info_nce", "info_nce shared negatives and the batch's", "info_nce symmetric", "info_nce several targets, all",
    "clip_loss", "siglip_loss negatives and ids", "nt_xent", "decoupled_nt_xent", "debiased_info_nce negatives",
    "sup_con labels", "sup_con of three views", "grouped_info_nce", "multiple_negatives",
    "multiple_negatives in all directions", "guided_info_nce in all directions", "info_nce biases",
    "info_nce symmetric with negatives", "info_nce smoothed", "info_nce positives of one id", "debiased_info_nce",
    "dual_temperature_info_nce", "distilled_info_nce symmetric", "grouped_info_nce m3_kd_loss",
)  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


def counts_of(world: int, draw: random.Random) -> list[int]:
    """Return uneven numbers of samples, of which some are 0 and some are not."""
    found = [draw.choice([0, 1, 2, 3, 5]) for _ in range(world)]
    return found if max(found) > 1 else [*found[:-1], 4]  # else a temperature a row cannot be told from one for all


def prepared(
    name: str, draw: random.Random, world: int, dtype: torch.dtype = torch.float64
) -> tuple[Case, dict, list[dict[str, Tensor]], list[int]]:
    """Return the case with a temperature, options, the inputs of the ranks and their numbers of samples."""
    torch.manual_seed(draw.randrange(2**31))
    case = CASES[name].with_temperature(draw.choice(CASES[name].temperatures))
    first, *others = case.inputs.items()  # of the others, some are frozen on all ranks
    inputs = {k: kind._replace(grad=kind.grad and draw.random() < 0.8) for k, kind in others}
    case = replace(case, inputs={first[0]: first[1], **inputs})
    counts = counts_of(world, draw)
    options = {"reduction": draw.choice(case.reductions)}
    if "normalize" not in case.options:
        options["normalize"] = draw.choice([True, False])
    return case, options, drawn(case, counts, dtype), counts


def both(case: Case, options: dict, parts: list, counts: list[int], gradients: str) -> tuple[Outcome, Outcome, Outcome]:
    """Return the outcome of the ranks as one, that of one process, and that of one process in float64."""
    given = joined(case, parts)
    upstream = whole = None
    if options["reduction"] == "none":
        with torch.no_grad():
            width = case.function(**case.adapt(dict(given)), **case.options, **options).shape[1:]
        upstream = [torch.randn(case.views * n, *width, dtype=torch.float64) for n in counts]
        whole = one_after_another(upstream, views=case.views)
    alone = outcome(case, given, whole, **options)
    true = alone
    if alone.value.dtype != torch.float64:
        true = outcome(
            case, {k: x.double() if x.is_floating_point() else x for k, x in given.items()}, whole, **options
        )
    found = of_ranks(case, parts, upstream, parameter_gradients=gradients, **options)
    return gathered(case, found, options["reduction"], len(parts) if gradients == "mean" else 1), alone, true


@every_case
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_equal_one_process(name: str, world: int) -> None:
    draw = random.Random(f"{name} {world}")
    case, options, parts, counts = prepared(name, draw, world)
    options["backend"] = "reference" if draw.random() < 0.2 else "torch"
    gradients = draw.choice(["mean", "sum"])
    got, want, _ = both(case, options, parts, counts, gradients)
    said = f"{counts} {options} {gradients}"
    assert far(got.value, want.value) <= 1e-12, said
    errors = apart(got.gradients, want.gradients)
    assert max(errors.values()) <= 1e-10, f"{said} {errors}"


@every_case
def test_ranks_are_exact_in_float32(name: str) -> None:
    draw = random.Random(name)
    case, options, parts, counts = prepared(name, draw, 4, torch.float32)
    got, _, true = both(case, options | {"backend": "torch"}, parts, counts, "mean")
    assert got.value.dtype == torch.float32
    assert far(got.value, true.value) <= 1e-5, f"{counts} {options}"
    errors = apart(got.gradients, true.gradients)
    assert max(errors.values()) <= 1e-5, f"{counts} {options}: {errors}"


@pytest.mark.parametrize("name", OF_16_BITS)
def test_gradients_of_16_bits_are_rounded_once(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name].with_temperature("shared")
    parts = [
        {k: x.bfloat16() if x.shape[-1:] == (D,) else x for k, x in part.items()}
        for part in drawn(case, [24] * 8, torch.float32)
    ]
    got, alone, true = both(case, {"reduction": "mean"}, parts, [24] * 8, "mean")
    errors, known = (apart(x.gradients, true.gradients) for x in (got, alone))
    halves = [k for k, x in got.gradients.items() if x.dtype == torch.bfloat16]
    assert len(halves) >= 1
    for gradient in halves:
        assert known[gradient] > 1e-4
        assert errors[gradient] <= 1.05 * known[gradient], f"{errors}, alone {known}"


@pytest.mark.parametrize(("name", "times"), [*((name, 3) for name in FIRST), ("info_nce symmetric with negatives", 50)])
def test_repeated_calls_are_bitwise_the_same(name: str, times: int) -> None:
    case, options, parts, _ = prepared(name, random.Random(name), 4)
    options["reduction"] = case.reductions[0]
    upstream = None
    if options["reduction"] == "none":
        upstream = [x.value for x in of_ranks(case, parts, **options | {"reduction": "none"})]
    first, *others = (of_ranks(case, parts, upstream, **options) for _ in range(times))
    for again in others:
        for one, other in zip(first, again, strict=True):
            assert same(one.value, other.value)
            assert all(same(one.gradients[k], other.gradients[k]) for k in one.gradients)


@pytest.mark.parametrize("counts", [[0, 0, 0], [2, 0, 1]])
def test_a_mean_of_nothing_is_nan_on_all_ranks_and_a_sum_0(counts: list[int]) -> None:
    case = CASES["info_nce symmetric"].with_temperature("number")
    parts = drawn(case, counts)
    for part in parts:
        part["weight"].zero_()
    for reduction, value in (("mean", torch.nan), ("sum", 0.0)):
        for found in of_ranks(case, parts, reduction=reduction):
            torch.testing.assert_close(found.value.item(), value, equal_nan=True)


@pytest.mark.parametrize("counts", [[3, 2, 4], [2, 0, 5]])
def test_two_losses_have_one_backward_that_may_be_repeated(counts: list[int]) -> None:
    def both_losses(query: Tensor, positive_key: Tensor, temperature: Tensor, **options: Any) -> Tensor:
        options["temperature"] = temperature
        first = functional.info_nce(query, positive_key, symmetric=True, **options)
        return first + 2 * functional.nt_xent(query, positive_key, **options)

    def twice(**arguments: Any) -> Tensor:
        loss = both_losses(**arguments)
        loss.backward(torch.full_like(loss, 0.25), retain_graph=True)
        return loss

    case = replace(CASES["info_nce"], function=both_losses).with_temperature("shared")
    parts = drawn(case, counts)
    want = outcome(case, joined(case, parts), None)
    got = gathered(case, of_ranks(case, parts), "mean", len(counts))
    again = gathered(case, of_ranks(replace(case, function=twice), parts), "mean", len(counts))
    for found, factor in ((got, 1), (again, (1.5 + 0.25) / 1.5)):
        assert far(found.value, want.value) <= 1e-12
        expected = {name: factor * x for name, x in want.gradients.items()}
        assert max(apart(found.gradients, expected).values()) <= 1e-10


def test_gradients_of_biases_of_16_bits_are_added_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    begin = LoopbackCommunicator.reduce_scatter

    def watched(self: LoopbackCommunicator, x: Tensor, counts: Any) -> Any:
        added.append(x.dtype)
        return begin(self, x, counts)

    monkeypatch.setattr(LoopbackCommunicator, "reduce_scatter", watched)

    def one(communicator: LoopbackCommunicator) -> torch.dtype:
        query, key, hard = torch.randn(3, 4, 8, dtype=torch.bfloat16).requires_grad_()
        biases = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
        options = Distributed(communicator)
        multiple_negatives(query, [key, hard], key_bias=biases, distributed=options).backward()
        assert biases.grad is not None
        return biases.grad.dtype

    assert Loopback(2, 10).run(one) == [torch.bfloat16] * 2
    assert set(added) == {torch.float32}


def test_every_loss_has_a_case_and_every_argument_is_in_one() -> None:
    functions = {name: getattr(functional, name) for name in functional.__all__} | {"statistics": statistics}
    taking = {name: x for name, x in functions.items() if "distributed" in inspect.signature(x).parameters}
    files = [path.read_text() for path in LOSSES.glob("test_*.py")]
    for name, function in taking.items():
        if any(re.search(rf"\b{name}\b", text) and "of_ranks(" in text for text in files):
            continue  # a loss whose own tests compare it over ranks
        cases = [case for title, case in CASES.items() if title.split()[0] == name]
        assert cases, f"{name} has no case in CASES"
        tried = {argument for case in cases for argument in (*case.inputs, *case.options)}
        tried |= {"positive_ids"} if "of_queries" in tried else set()
        left = set(inspect.signature(function).parameters) - tried - EVERYWHERE - REFUSED.get(name, set())
        assert not left - {"offset"}, f"no case of {name} has {left}"


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_rank_of_small_biases_sees_the_large_ones_of_others(symmetric):
    """Of exp(95) float32 has no range, which a rank cannot tell by its own biases."""
    case = CASES["info_nce biases"]
    case = replace(case, options={"temperature": 0.1, "symmetric": symmetric})
    parts = drawn(case, [40, 40], torch.float32)
    for part, size in zip(parts, (0.0, 95.0), strict=True):
        part["key_bias"].data += size
    want = outcome(case, {name: x.double() for name, x in joined(case, parts).items()}, None, reduction="mean")
    found = gathered(case, of_ranks(case, parts, reduction="mean"), "mean", 2)
    assert far(found.value, want.value) <= 1e-6
    assert max(apart(found.gradients, want.gradients).values()) <= 1e-5
