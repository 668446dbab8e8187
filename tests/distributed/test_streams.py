"""Rows that stream in parts: the loss of one process, a memory that is bounded, and exchanges that hide."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import INTERPRETED, TRITON
from support.ranks import Echo
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.contest import peak_bytes
from fused_infonce import (
    Distributed,
    backends,
    clip_loss,
    debiased_info_nce,
    debiased_nt_xent,
    decoupled_info_nce,
    info_nce,
    nt_xent,
    statistics,
)
from fused_infonce.backends.contract import KeySet, Problem, Temperature
from fused_infonce.distributed import Call
from fused_infonce.distributed.block import _Columns
from fused_infonce.distributed.exchange import FEWEST, exchange_of
from fused_infonce.distributed.loopback import Loopback, LoopbackCommunicator

IN_INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="compiled kernels take no tensors of a CPU")
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "one direction": info_nce,
    "sum": lambda a, b, **o: info_nce(a, b, reduction="sum", **o),
    "both directions": lambda a, b, **o: info_nce(a, b, symmetric=True, **o),
    "rows": lambda a, b, **o: info_nce(a, b, symmetric=True, reduction="none", **o).square().sum(),
    "decoupled": lambda a, b, **o: decoupled_info_nce(a, b, symmetric=True, **o),
    "raw rows": lambda a, b, temperature, **o: clip_loss(a, b, 1 / temperature, **o),
    "margin": lambda a, b, **o: info_nce(a, b, symmetric=True, margin=0.2, **o),
    "ids": lambda a, b, **o: info_nce(
        a, b, symmetric=True, query_ids=a.detach()[:, 0].long(), key_ids=b.detach()[:, 0].long(), **o
    ),
    "biases": lambda a, b, temperature, **o: clip_loss(
        a,
        b,
        1 / temperature,
        image_bias=a[:, 0],
        text_bias=b[:, 1].masked_fill(b[:, 0] > 2, -torch.inf),
        positive_bias=False,
        **o,
    ),
    "biases of keys": lambda a, b, **o: info_nce(a, b, key_bias=9 * b[:, 0], **o),
    "weights of positives": lambda a, b, **o: decoupled_info_nce(a, b, symmetric=True, positive_weight=a[:, 0], **o),
    "debiased": lambda a, b, **o: debiased_info_nce(
        a, b, symmetric=True, query_ids=a.detach()[:, 0].long(), key_ids=b.detach()[:, 0].long(), **o
    ),
    "debiased views": debiased_nt_xent,
    "statistics": lambda a, b, **o: sum(x.sum() for side in statistics(a, b, columns=True, **o) for x in side[:2]),
    "views": nt_xent,
}


def over_ranks(
    loss: Loss,
    counts: list[int],
    options: dict[str, Any],
    loopback: Loopback,
    d: int = 6,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Any], list[Tensor]]:
    """Return what every rank finds, its value and gradients, and the rows of all."""
    torch.manual_seed(0)
    rows = [(2 * torch.randn(sum(counts), d, dtype=torch.float64)).to(dtype) for _ in range(2)]

    def one(communicator: LoopbackCommunicator) -> tuple[Tensor, ...]:
        own = [x.split(counts)[communicator.rank].clone().requires_grad_() for x in rows]
        t = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        value = loss(*own, temperature=t, distributed=Distributed(communicator, **options))
        value.backward()
        return value.detach(), t.grad, *(x.grad for x in own)

    found = loopback.run(one)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found, rows


@pytest.mark.parametrize("counts", [[5], [3, 0, 9], [1, 2, 4, 20]], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_stream_equals_one_process(name: str, counts: list[int]) -> None:
    found, rows = over_ranks(LOSSES[name], counts, {"exchange": "stream"}, Loopback(len(counts)))
    a, b = (x.clone().requires_grad_() for x in rows)
    t = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    value = LOSSES[name](a, b, temperature=t)
    value.backward()
    values = torch.stack([each[0] for each in found])
    want = value.detach()
    if name in ("rows", "statistics"):  # a sum of numbers of each rank's own rows
        values, want = values.sum(), want
    torch.testing.assert_close(values, want.expand_as(values), rtol=1e-12, atol=1e-12)
    for each in found:
        torch.testing.assert_close(each[1], t.grad, rtol=1e-10, atol=1e-12)
    for place, x in ((2, a), (3, b)):
        got = torch.cat([each[place] for each in found]) / len(counts)
        torch.testing.assert_close(got, x.grad, rtol=1e-10, atol=1e-12)


def test_a_block_makes_nothing_on_the_host() -> None:
    """What is made there is copied to a GPU, for which the host would wait, and which no CUDA graph records."""
    made = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **kwargs or {})
            made.extend([func] if isinstance(found, Tensor) and found.device.type == "cpu" else [])
            return found

    communicator = Loopback(2).ranks[0]
    rows = torch.empty(6, 4, device="meta")
    t = Temperature(torch.empty(1, device="meta"), 0.1)
    own = Problem(KeySet(rows), (KeySet(rows),), t, torch.empty(6, dtype=torch.int64, device="meta"), self_similar=True)
    exchange = exchange_of("gather", [6, 6], 0, 4, 4, 4, 2**20, gradients=False)
    with Watched():
        call: Any = Call(communicator, Distributed(communicator))
        coming: Any = KeySet(rows)._replace(rows=lambda: rows.repeat(2, 1))
        block = _Columns(own, call, exchange).block(0, coming)
    assert block.keys[0].ids is not None
    assert len(block.keys[0].ids) == 12
    assert made == []


def test_parts_take_every_row_once() -> None:
    counts = [3, 0, 17, 9]
    for rank, count in enumerate(counts):
        found = exchange_of("stream", counts, rank, 8, 2, 4, 2**20, gradients=True)
        assert len(found.parts) == FEWEST
        assert [place for part in found.parts for place in range(count)[part.own]] == list(range(count))
        assert [sum(part.counts[other] for part in found.parts) for other in range(4)] == counts


def test_auto_streams_where_rows_take_more_than_their_room() -> None:
    few, many = (exchange_of("auto", [n] * 4, 0, 64, 2, 4, 2**20, gradients=True) for n in (2**10, 2**18))
    assert (few.name, len(few.parts)) == ("gather", 1)
    assert many.name == "stream"
    assert many.held <= 1.01 * 16 * 2**20  # parts differ by a row of each rank
    assert "stream over 4 processes" in str(many)


def test_ranks_of_different_memory_agree_on_the_parts() -> None:
    """Of two GPUs the smaller says how many parts there are, and whether there are any."""
    n, d, limits = 2048, 64, [2**20, 2**16]
    torch.manual_seed(0)
    rows = [torch.randn(2 * n, d) for _ in range(2)]

    def one(communicator: LoopbackCommunicator) -> int:
        a, b = (x.chunk(2)[communicator.rank].clone().requires_grad_() for x in rows)
        limit = limits[communicator.rank]
        clip_loss(a, b, 5.0, workspace_limit=limit, distributed=Distributed(communicator)).backward()
        return communicator.begun

    streamed, also_streamed = Loopback(2, timeout=10).run(one)
    assert streamed == also_streamed
    assert isinstance(streamed, int)
    assert streamed > 4 * FEWEST  # states, rows twice, gradients


@pytest.mark.parametrize("other", [pytest.param("triton", marks=[*TRITON.marks, IN_INTERPRETER])])
@pytest.mark.parametrize("name", ["one direction", "both directions", "biases"])
def test_ranks_of_different_backends_agree_on_what_travels(name: str, other: str) -> None:
    """Of two backends one takes unit rows with their norms, and the other rows as they come."""
    counts = [3, 4]

    def of_rank(a: Tensor, b: Tensor, **given: Any) -> Tensor:
        return LOSSES[name](a, b, backend=other if len(a) == 4 else "torch", **given)

    found, rows = over_ranks(of_rank, counts, {}, Loopback(2, timeout=20))
    value = LOSSES[name](*rows, temperature=0.3)
    for each in found:
        torch.testing.assert_close(each[0], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "exchange", "gathered", "reduced"),
    [
        ("both directions", "gather", 1, 1), ("views", "gather", 1, 0), ("one direction", "gather", 1, 1),
        ("both directions", "stream", 2, 1), ("views", "stream", 2, 0), ("one direction", "stream", 2, 1),
        ("margin", "gather", 1, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_bytes_of_rows_and_of_gradients(
    name: str, exchange: str, gathered: int, reduced: int, dtype: torch.dtype
) -> None:  # fmt: skip
    """Exactly the rows of others and their gradients, so many times; and of vectors a few numbers a row."""
    world, n, d = 8, 16, 32
    loopback = Loopback(world)
    over_ranks(LOSSES[name], [n] * world, {"exchange": exchange, "check": "none"}, loopback, d, dtype)
    views, acc = 2 if name == "views" else 1, 8 if dtype == torch.float64 else 4
    rows = (world - 1) * n * views
    others = rows * acc
    for communicator in loopback.ranks:
        received = communicator.received
        assert received.get("reduce_scatter", 0) == reduced * others * d
        norms = gathered * others if dtype.itemsize == acc else 0  # of unit rows, which the backend on a CPU takes
        vectors = received["all_gather"] - gathered * rows * dtype.itemsize * d - norms
        shared = (world - 1) * 8 * 3  # the sum and the number of the losses, and the gradient of the temperature
        columns = 0 if name == "one direction" else 2 * others  # a shift and a factor of each column
        assert vectors == shared + columns
        assert received.get("all_to_all", 0) == (3 * others if name in ("both directions", "margin") else 0)


@pytest.mark.parametrize("symmetric", [False, True], ids=["one direction", "both directions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stream_holds_two_parts_whatever_the_number_of_ranks(dtype: torch.dtype, symmetric: bool) -> None:
    """What a rank allocates grows with the number of ranks where rows are gathered, and not where they stream.

    Beside the rows and gradients of all ranks, or of two parts, which `held` counts, is five or six times the rank's
    own rows: unit ones and gradients.
    """
    n, d, limit = 128, 1024, 2**16
    peaks = {}
    for world in (8, 16):
        for name in ("gather", "stream"):
            exchange = exchange_of(name, [n] * world, 0, d, dtype.itemsize, 4, limit, gradients=True)
            a, b = (torch.randn(n, d, dtype=dtype, requires_grad=True) for _ in range(2))
            options = Distributed(Echo(world), exchange=name)

            given = {"temperature": 0.1, "symmetric": symmetric, "workspace_limit": limit}

            def step(a: Tensor = a, b: Tensor = b, given: dict[str, Any] = given | {"distributed": options}) -> None:
                info_nce(a, b, **given).backward()

            peaks[world, name], _ = peak_bytes(step, torch.device("cpu"))
            own = {"gather": 5.1, "stream": 6.5}[name] * n * d * 4
            assert peaks[world, name] <= exchange.held + own + 2 * limit
    assert peaks[16, "gather"] > 1.6 * peaks[8, "gather"]
    assert peaks[16, "stream"] < 1.1 * peaks[8, "stream"]


@pytest.mark.parametrize("name", ["one direction", "both directions", "views"])
def test_exchanges_hide_behind_the_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the ranks' clocks every exchange takes 50 ms and the products of a part as long, of which four fifths hide."""
    delay, world, here = 0.05, 2, threading.local()
    backend = backends.get("torch")
    works = []

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            works.append(None)
            here.communicator.clock += delay
            return work(*args, **kwargs)

        return called

    for work in ("statistics", "gradients"):
        monkeypatch.setattr(backend, work, timed(getattr(backend, work)))

    def one(communicator: LoopbackCommunicator) -> None:
        here.communicator = communicator
        a, b = (torch.randn(16, 4, requires_grad=True) for _ in range(2))
        options = Distributed(communicator, exchange="stream")
        LOSSES[name](a, b, temperature=0.1, distributed=options).backward()

    loopback = Loopback(world, delay=delay)
    assert loopback.run(one) == [None] * world
    assert len(works) == world * 2 * FEWEST
    for communicator in loopback.ranks:
        shown = communicator.clock - delay * len(works) / world
        norms = 2 * FEWEST  # exchanges of a number a row, beside the rows in the forward and in the backward
        assert 0 < shown <= 0.2 * delay * (communicator.begun - norms)
