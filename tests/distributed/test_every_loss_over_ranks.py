"""A loss over several ranks is the loss of one process that has the rows of all: its value and every gradient."""

from __future__ import annotations

import inspect
import random

import pytest
import torch
from support.calls_over_ranks import CASES
from support.ranks import Case, Outcome, apart, drawn, far, gathered, joined, of_ranks, one_after_another, outcome, same

from fused_infonce import functional, statistics

WORLDS = (1, 2, 4, 8)
REFUSED = {"sup_con": {"mask"}, "distilled_info_nce": {"teacher_scores"},
           "multiple_negatives": {"offset", "all_queries"}}  # fmt: skip  # over several ranks; see test_mistakes.py
EVERYWHERE = {"temperature", "logit_scale", "reduction", "normalize", "backend", "workspace_limit", "distributed"}
every_case = pytest.mark.parametrize("name", CASES)


def counts_of(world: int, draw: random.Random) -> list[int]:
    """Return uneven numbers of samples, of which some are 0 and some are not."""
    found = [draw.choice([0, 1, 2, 3, 5]) for _ in range(world)]
    return found if max(found) > 1 else [*found[:-1], 4]  # else a temperature a row cannot be told from one for all


def prepared(name: str, draw: random.Random, world: int, reduction: str | None = None) -> tuple[Case, dict, list, list]:
    """Return the case with a temperature, its options, the inputs of the ranks and the gradients of their values."""
    torch.manual_seed(draw.randrange(2**31))
    case = CASES[name].with_temperature(draw.choice(CASES[name].temperatures))
    counts = counts_of(world, draw)
    options = {"reduction": reduction or draw.choice(case.reductions)}
    if "normalize" not in case.options:
        options["normalize"] = draw.choice([True, False])
    return case, options, drawn(case, counts), counts


def upstream_of(case: Case, counts: list[int], values: torch.Tensor, reduction: str) -> list[torch.Tensor] | None:
    """Return the gradients of the ranks' values: drawn for "none", else None; values: a process's value of all."""
    if reduction != "none":
        return None
    return [torch.randn(case.views * n, *values.shape[1:], dtype=torch.float64) for n in counts]


def both(
    case: Case, options: dict, parts: list, counts: list[int], gradients: str, dtype: torch.dtype = torch.float64
) -> tuple[Outcome, Outcome, list[Outcome]]:
    """Return the outcome of the ranks as one, that of one process in float64, and those of the ranks."""
    given = joined(case, parts)
    with torch.no_grad():
        shape = case.function(**case.adapt(dict(given)), **case.options, **options)
    upstream = upstream_of(case, counts, shape, options["reduction"])
    want = outcome(case, given, None if upstream is None else one_after_another(upstream, views=case.views), **options)
    rounded = [{k: x.to(dtype) if x.is_floating_point() else x for k, x in part.items()} for part in parts]
    found = of_ranks(case, rounded, upstream, parameter_gradients=gradients, **options)
    factor = len(parts) if gradients == "mean" else 1
    return gathered(case, found, options["reduction"], factor), want, found


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


def test_every_loss_has_a_case_and_every_argument_is_in_one() -> None:
    functions = {name: getattr(functional, name) for name in functional.__all__} | {"statistics": statistics}
    taking = {name: x for name, x in functions.items() if "distributed" in inspect.signature(x).parameters}
    for name, function in taking.items():
        cases = [case for title, case in CASES.items() if title.split()[0] == name]
        assert cases, f"{name} has no case in CASES"
        tried = {argument for case in cases for argument in (*case.inputs, *case.options)}
        tried |= {"positive_ids"} if "of_queries" in tried else set()
        left = set(inspect.signature(function).parameters) - tried - EVERYWHERE - REFUSED.get(name, set())
        assert not left - {"offset"}, f"no case of {name} has {left}"
