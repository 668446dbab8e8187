"""What a rank receives for one call and its backward, counted to the byte by simulated ranks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fused_infonce import functional
from fused_infonce.distributed import Distributed
from fused_infonce.distributed.loopback import Loopback, LoopbackCommunicator

N, M, H, D = 6, 5, 3, 16  # rows of a rank, explicit negatives of a rank and of a row, components
TOTAL = 2 * 8  # the sum of the losses and the number of rows, float64, of each other rank
LEARNED = 8  # the gradient of a temperature, float64


class Call(NamedTuple):
    """A call, and the bytes that each other rank sends for it beside the rows of the first set and its `TOTAL`.

    gathered, scattered: a number of rows of D components, whose bytes are known from their dtype; more_gathered and
    more_scattered: bytes of everything else, where `acc` is the size of an accumulator's number
    """

    inputs: dict[str, tuple[int, ...]]
    options: Mapping[str, Any] = MappingProxyType({})
    function: Any = functional.info_nce
    gathered: int = N
    scattered: int = N
    more_gathered: int = 0
    columns_gathered: int = 0  # numbers of the accumulators' dtype, one a row
    columns_scattered: int = 0
    fixed: tuple[str, ...] = ()  # inputs without a gradient


LABELS = torch.arange(N) % 3
PAIR = {"query": (N, D), "positive_key": (N, D)}
CALLS = {
    "one direction": Call(PAIR),
    "queries alone learn": Call(PAIR, scattered=0, fixed=("positive_key",)),
    "ids": Call(PAIR, {"query_ids": LABELS, "key_ids": LABELS}, more_gathered=8 * N),
    "two ids a row": Call(PAIR, {"key_ids": LABELS[:, None].repeat(1, 2)}, more_gathered=16 * N),
    "a target of wide keys": Call({"query": (N, D), "positive_key": (M, D)}, {"target": LABELS}, gathered=M,
        scattered=M),
    "biases": Call(PAIR | {"key_bias": (N,)}, columns_gathered=N, columns_scattered=N),
    "weights": Call(PAIR | {"weight": (N,)}, fixed=("weight",)),
    "a learned temperature": Call(PAIR | {"temperature": ()}, more_gathered=LEARNED),
    "a temperature a row": Call(PAIR | {"temperature": (N,)}),
    "shared negatives": Call(PAIR | {"negative_keys": (M, D)}, gathered=M, scattered=M),  # no key but one's own is one
    "shared negatives beside the batch's": Call(PAIR | {"negative_keys": (M, D)}, {"in_batch_negatives": True},
        gathered=N + M, scattered=N + M),
    "paired negatives": Call(PAIR | {"negative_keys": (N, H, D)}, {"negative_mode": "paired"}, gathered=0, scattered=0),
    "places in a table": Call(PAIR | {"negative_keys": (M, D)}, {"negative_index": torch.arange(N)[:, None] % M},
        gathered=0, scattered=0),
    "a queue": Call({"query": (N, D), "key": (N, D), "queue": (D, M)}, {}, functional.moco_loss, 0, 0, fixed=("key",
        "queue")),
}  # fmt: skip


def received(call: Call, world: int, dtype: torch.dtype, backward: bool = True) -> list[dict[str, int]]:
    """Return what each simulated rank has received by the end of a call."""

    def work(communicator: LoopbackCommunicator) -> dict[str, int]:
        generator = torch.Generator().manual_seed(communicator.rank)
        rows = {D, *[shape[-1] for name, shape in call.inputs.items() if name == "queue"]}
        given: dict[str, Tensor] = {}
        for name, shape in call.inputs.items():
            x = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            x = x.to(dtype if len(shape) > 1 and shape[-1] in rows else wide)
            given[name] = x.requires_grad_(name not in call.fixed)
        loss = call.function(**given, **call.options, distributed=Distributed(communicator))
        if backward:
            loss.backward()
        return communicator.received

    found: list[Any] = Loopback(world, 10).run(work)
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return found


def expected(call: Call, world: int, dtype: torch.dtype) -> dict[str, int]:
    b, acc = dtype.itemsize, 8 if dtype == torch.float64 else 4
    row = D * b + (acc if b == acc else 0)  # a unit row comes with its norm; one of 16 bits comes as it is
    gathered = call.gathered * row + call.columns_gathered * acc + call.more_gathered + TOTAL
    scattered = call.scattered * D * acc + call.columns_scattered * acc
    return {name: (world - 1) * x for name, x in (("all_gather", gathered), ("reduce_scatter", scattered)) if x}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_bytes_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    for world in (1, 2, 8):
        want = expected(CALLS[name], world, dtype)
        want = want if world > 1 else dict.fromkeys(want, 0)
        assert received(CALLS[name], world, dtype) == [want] * world


def test_without_a_backward_no_gradient_travels() -> None:
    want = {"all_gather": 3 * (N * (D + 1) * 4 + TOTAL)}
    assert received(CALLS["one direction"], 4, torch.float32, backward=False) == [want] * 4


def test_uneven_rows_are_those_of_the_other_ranks() -> None:
    counts = [3, 0, 5]

    def work(communicator: LoopbackCommunicator) -> dict[str, int]:
        query, key = torch.randn(2, counts[communicator.rank], D, requires_grad=True)
        functional.info_nce(query, key, distributed=Distributed(communicator)).backward()
        return communicator.received

    for rank, found in enumerate(Loopback(3, 10).run(work)):
        others = sum(counts) - counts[rank]
        assert found == {"all_gather": 4 * (D + 1) * others + 2 * TOTAL, "reduce_scatter": 2 * 4 * D * counts[rank]}
