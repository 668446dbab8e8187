"""What ranks add to the memory of a step of every loss: the rows of all as they came, and one gradient of them."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from support.calls_over_ranks import CASES, D
from support.ranks import Echo, drawn
from torch import Tensor

from benchmarks.contest import peak_bytes
from fused_infonce import Distributed

WORLD, ROWS, WIDE, LIMIT = 32, 32, 2048, 2**21  # few own rows, so that what a process holds of them hides nothing

# How many sets of rows of all ranks are held, and how many gradients of such
HELD = {
    "info_nce": (1, 1),
    "info_nce / rows": (1, 1),
    "info_nce symmetric": (1, 1),  # a block of scores serves both directions
    "clip_loss biases": (1, 1),
    "siglip_loss": (1, 1),
    "debiased_info_nce": (1, 1),
    "statistics of columns": (1, 1),
    "guided_info_nce": (1, 1),
    "info_nce smoothed targets": (1, 1),
    "info_nce several targets, all": (1, 1),
    "sup_con labels of one view": (1, 1),
    "distilled_info_nce": (1, 1),
    "nt_xent": (2, 0),  # the rows of both views
    "info_nce shared negatives and the batch's": (2, 2),
    "grouped_info_nce m3_kd_loss": (3, 3),  # three passages a query
    # directions whose scores are not those of one block, one after the other in the backward
    "info_nce symmetric / rows": (2, 1),
    "info_nce symmetric with negatives": (3, 2),
    "info_nce smoothed": (2, 1),
    "dual_temperature_info_nce": (2, 1),
    "distilled_info_nce symmetric": (2, 1),
    "guided_info_nce in all directions": (4, 3),
    "multiple_negatives in all directions": (6, 5),
    "score_std": (2, 2),  # scores of the loss, and of their deviation
}


def prepared(name: str, dtype: torch.dtype, width: int, world: int = WORLD) -> Callable[[], None]:
    """Return a step of rank 0, forward and backward, of a case with its kind of temperature; world: 0 for no ranks."""
    torch.manual_seed(0)
    title, _, kind = name.partition(" / ")
    case = CASES[title].with_temperature(kind or "number")
    given = {}
    for key, x in drawn(case, [ROWS], torch.float32)[0].items():
        x = torch.randn(*x.shape[:-1], width, dtype=dtype) if x.shape[-1:] == (D,) else x
        given[key] = x.requires_grad_(x.is_floating_point() and case.inputs[key].grad)
    options = {"normalize": True, "workspace_limit": LIMIT, **case.options}
    options["reduction"] = "none" if "mean" not in case.reductions else "mean"
    options["distributed"] = Distributed(Echo(world), exchange="gather") if world else False

    def step() -> None:
        case.function(**case.adapt(dict(given)), **options).sum().backward()

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HELD)
def test_ranks_add_the_rows_of_all_and_one_gradient_of_them(name: str, dtype: torch.dtype) -> None:
    """The peak of a step is at most that of one process with a rank's own rows, N D (b + 4) and a workspace."""
    alone, among = (peak_bytes(prepared(name, dtype, WIDE, world), torch.device("cpu"))[0] for world in (0, WORLD))
    rows, gradients = HELD[name]
    exchanged = WORLD * ROWS * WIDE * (rows * dtype.itemsize + gradients * 4)
    assert among <= alone + exchanged + LIMIT, (among - alone) / (WORLD * ROWS * WIDE)


@pytest.mark.parametrize("name", HELD)
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
