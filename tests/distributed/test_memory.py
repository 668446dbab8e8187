"""What a rank holds for a step of every kind of loss: the rows of all ranks as they came, and one gradient of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from support.calls_over_ranks import CASES, D
from support.ranks import Echo, drawn
from torch import Tensor

from benchmarks.contest import peak_bytes
from fused_infonce import Distributed

WORLD, ROWS, WIDE, LIMIT = 8, 128, 1024, 2**16


class Held(NamedTuple):
    """How many times a rank holds, of N rows, the rows themselves and their gradient, N being those of one input of all
    ranks; and what it holds beside these, in float32 rows of one input of its own."""

    rows: int
    gradients: int
    own: float


HELD = {
    # one gathering of rows and their gradient
    "info_nce": Held(1, 1, 5.1),
    "info_nce / rows": Held(1, 1, 6.1),
    "info_nce symmetric": Held(1, 1, 5.2),
    "clip_loss biases": Held(1, 1, 5.2),
    "siglip_loss": Held(1, 1, 5.5),
    "debiased_info_nce": Held(1, 1, 5.2),
    "statistics of columns": Held(1, 1, 5.2),
    "guided_info_nce": Held(1, 1, 6.1),
    "nt_xent": Held(2, 0, 10.3),  # of two views
    # sums of the same rows are made a part at a time, and their gradient is added to that of the scores
    "info_nce smoothed targets": Held(1, 1, 13.2),
    "info_nce several targets, all": Held(1, 1, 7.9),
    "sup_con labels of one view": Held(1, 1, 7.7),
    "distilled_info_nce": Held(1, 1, 8.7),
    # more than one set of rows
    "info_nce shared negatives and the batch's": Held(2, 2, 5.3),
    "grouped_info_nce m3_kd_loss": Held(3, 3, 9.2),  # three passages a query
    # both sides, one after the other in the backward
    "info_nce symmetric / rows": Held(2, 1, 7.2),
    "info_nce symmetric with negatives": Held(3, 2, 3.8),
    "info_nce smoothed": Held(2, 1, 18.6),
    "dual_temperature_info_nce": Held(2, 1, 6.2),
    "distilled_info_nce symmetric": Held(2, 1, 11.2),
}
# Several problems of the same rows, whose gradients are alive together, and what is made of rows beside scores: what is
# held in all, in float32 rows of one input of all ranks, with inputs of float32 and of bfloat16
MORE = {
    "guided_info_nce in all directions": (7.1, 10.2),
    "multiple_negatives in all directions": (10.0, 7.1),
    "score_std": (6.6, 6.1),
}


def prepared(name: str, dtype: torch.dtype, width: int) -> Callable[[], None]:
    """Return a step of rank 0, forward and backward, of a case with its kind of temperature."""
    torch.manual_seed(0)
    title, _, kind = name.partition(" / ")
    case = CASES[title].with_temperature(kind or "number")
    given = {}
    for key, x in drawn(case, [ROWS], torch.float32)[0].items():
        x = torch.randn(*x.shape[:-1], width, dtype=dtype) if x.shape[-1:] == (D,) else x
        given[key] = x.requires_grad_(x.is_floating_point() and case.inputs[key].grad)
    options = {"normalize": True, "workspace_limit": LIMIT, **case.options}
    options["reduction"] = "none" if "mean" not in case.reductions else "mean"
    options["distributed"] = Distributed(Echo(WORLD), exchange="gather")

    def step() -> None:
        case.function(**case.adapt(dict(given)), **options).sum().backward()

    return step


@pytest.mark.serial
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HELD)
def test_a_step_holds_the_rows_of_all_and_one_gradient(name: str, dtype: torch.dtype) -> None:
    peak, _ = peak_bytes(prepared(name, dtype, WIDE), torch.device("cpu"))
    rows, gradients, own = HELD[name]
    each = ROWS * WIDE
    bound = WORLD * each * (rows * dtype.itemsize + gradients * 4) + 2 * LIMIT
    assert peak <= bound + own * each * 4, (peak - bound) / (each * 4)


@pytest.mark.serial
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MORE)
def test_what_holds_more_holds_no_more_than_is_said(name: str, dtype: torch.dtype) -> None:
    peak, _ = peak_bytes(prepared(name, dtype, WIDE), torch.device("cpu"))
    times = MORE[name][dtype != torch.float32]
    assert peak <= times * WORLD * ROWS * WIDE * 4, peak / (WORLD * ROWS * WIDE * 4)


@pytest.mark.parametrize("name", [*HELD, *MORE])
def test_what_a_step_held_is_free_without_the_garbage_collector(name: str) -> None:
    """Rows of all ranks in a cycle of objects would stay until Python looks for cycles."""
    step = prepared(name, torch.float32, 8)
    step()
    gc.freeze()  # what is there before takes no time below
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        step()
        gc.collect()
        left = [x.shape for x in gc.garbage if isinstance(x, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()
    assert left == []
