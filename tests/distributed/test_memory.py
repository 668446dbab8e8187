"""What a rank holds for a step of every kind of loss: the rows of all ranks as they came, and one gradient of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from support.calls_over_ranks import CASES, D
from support.ranks import drawn
from torch import Tensor

from benchmarks.contest import peak_bytes
from fused_infonce import Distributed

WORLD, ROWS, WIDE, LIMIT = 8, 128, 512, 2**16


class Echo:
    """Rank 0 of W ranks that all have what it has, so that no other thread allocates."""

    def __init__(self, world: int):
        self.rank, self.world = 0, world

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        found = torch.cat([x] * self.world)
        return lambda: found

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        found = x[: counts[0]] * self.world
        return lambda: found

    def all_to_all(self, x: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        found = torch.stack([x[: counts[0]]] * self.world)
        return lambda: found

    def all_gather_host(self, message: Tensor) -> Tensor:
        return torch.stack([message] * self.world)


class Held(NamedTuple):
    """How many times a rank holds, of N rows, the rows themselves and their gradient, N being those of one input of all
    ranks; and what it holds beside these, in float32 rows of one input of its own."""

    rows: int
    gradients: int
    own: float


HELD = {
    "info_nce": Held(1, 1, 5.5),
}


@pytest.mark.serial
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HELD)
def test_a_step_holds_the_rows_of_all_and_one_gradient(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    title, _, kind = name.partition(" / ")
    case = CASES[title].with_temperature(kind or "number")
    given = {}
    for key, x in drawn(case, [ROWS], torch.float32)[0].items():
        x = torch.randn(*x.shape[:-1], WIDE, dtype=dtype) if x.shape[-1:] == (D,) else x
        given[key] = x.requires_grad_(x.is_floating_point() and case.inputs[key].grad)
    options = {"normalize": True, "workspace_limit": LIMIT, **case.options}
    options["reduction"] = "none" if "mean" not in case.reductions else "mean"
    options["distributed"] = Distributed(Echo(WORLD), exchange="gather")

    def step() -> None:
        case.function(**case.adapt(dict(given)), **options).sum().backward()

    peak, _ = peak_bytes(step, torch.device("cpu"))
    rows, gradients, own = HELD[name]
    each = ROWS * WIDE * 4
    bound = WORLD * ROWS * WIDE * (rows * dtype.itemsize + gradients * 4) + 2 * LIMIT
    assert peak <= bound + own * each, (peak - bound) / each
