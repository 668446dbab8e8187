"""A mistake on one rank is an error on all, which name the rank; no rank waits for it in vain."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import in_processes
from torch import Tensor

from fused_infonce import ClipLoss, DCLLoss, FusedInfoNCELoss, MatryoshkaLoss, SigLipLoss, cached, functional
from fused_infonce.distributed import Distributed
from fused_infonce.distributed.loopback import Loopback, LoopbackCommunicator
from fused_infonce.temperature import HeldOutTemperature

WORLD, GUILTY, N, D = 3, 1, 4, 6
TIMEOUT = 10.0  # seconds after which a rank that waits in vain gives up, which is a BrokenBarrierError
info_nce = functional.info_nce


def arguments(rank: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    query, key = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    return {"query": query.requires_grad_(), "positive_key": key.requires_grad_(), "temperature": 0.2, **more}


def of_all(call: Callable[[LoopbackCommunicator], Any]) -> list[Any]:
    """Return what each simulated rank returns or raises, in a time that is far from the timeout."""
    start = time.monotonic()
    found = Loopback(WORLD, TIMEOUT).run(call)
    assert time.monotonic() - start < TIMEOUT / 2
    return found


def then_right(call: Callable[[LoopbackCommunicator], Any]) -> list[Any]:
    """Return the errors of a wrong call, after which a right one of the same ranks must succeed."""

    def both(communicator: LoopbackCommunicator) -> Any:
        with pytest.raises(Exception) as raised:  # which is returned
            call(communicator)
        value = info_nce(**arguments(communicator.rank), distributed=Distributed(communicator))
        return raised.value, value.detach()

    found = of_all(both)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    assert all(torch.equal(value, found[0][1]) for _, value in found)
    return [error for error, _ in found]


def no_gradient(given: dict[str, Any]) -> dict[str, Any]:
    return {k: x.detach() if isinstance(x, Tensor) else x for k, x in given.items()}


# What is wrong on one rank alone: its error, a part of the message, and its arguments from the right ones.
Spoil = Callable[[dict[str, Any]], dict[str, Any]]
OWN: dict[str, tuple[type[Exception], str, Spoil]] = {
    "dtypes that differ": (TypeError, "positive_key must be torch.float64",
        lambda a: a | {"positive_key": a["positive_key"].float()}),
    "integers": (TypeError, "query", lambda a: a | {"query": torch.ones(N, D, dtype=torch.int64)}),
    "no tensor": (TypeError, "positive_key", lambda a: a | {"positive_key": [[1.0] * D] * N}),
    "rows that differ": (ValueError, "positive_key must have 4 rows", lambda a: a | {"positive_key": torch.randn(3,
        D).double()}),
    "components that differ": (ValueError, "components", lambda a: a | {"positive_key": torch.randn(N, 5).double()}),
    "a dimension too many": (ValueError, "2 dimensions", lambda a: a | {"query": a["query"][None]}),
    "a temperature of NaN": (ValueError, "temperature", lambda a: a | {"temperature": torch.tensor(torch.nan)}),
    "a negative temperature": (ValueError, "temperature", lambda a: a | {"temperature": -0.1}),
    "a temperature of text": (TypeError, "temperature", lambda a: a | {"temperature": "warm"}),
    "temperatures of other rows": (ValueError, "temperature", lambda a: a | {"temperature": torch.ones(N + 1)}),
    "ids that are no integers": (TypeError, "key_ids", lambda a: a | {"key_ids": torch.ones(N)}),
    "a target out of range": (ValueError, "target", lambda a: a | {"target": torch.full((N,), N)}),
    "a weight below 0": (ValueError, "weight", lambda a: a | {"weight": -torch.ones(N).double()}),
    "an unknown reduction": (ValueError, "reduction", lambda a: a | {"reduction": "median"}),
    "an unknown backend": (ValueError, "backend", lambda a: a | {"backend": "numpy"}),
    "options that do not go together": (ValueError, "margin", lambda a: a | {"margin": 0.1, "label_smoothing": 0.1}),
    "an unknown argument": (TypeError, "labels", lambda a: a | {"labels": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_the_guilty_rank_has_its_error_and_the_others_name_it(name: str) -> None:
    kind, text, spoil = OWN[name]

    def call(communicator: LoopbackCommunicator) -> None:
        given = arguments(communicator.rank)
        given = spoil(given) if communicator.rank == GUILTY else given
        info_nce(**given, distributed=Distributed(communicator))

    errors = then_right(call)
    own = errors[GUILTY]
    assert type(own) is kind
    assert text in str(own)
    for rank, error in enumerate(errors):
        if rank != GUILTY:
            assert type(error) is RuntimeError
            assert str(error) == f"rank {GUILTY}: {kind.__name__}: {own}"


def warm() -> float:
    raise ValueError("no temperature today")


X, Y = torch.randn(2, N, D)
# What a module refuses before its function is called: the module, and a call that is right and one that is not.
OF_MODULES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = {
    "features": (SigLipLoss, (X, Y, 5.0), (X, Y[1:], 5.0)),
    "no scale": (ClipLoss, (X, Y, 5.0), (X, Y)),
    "no keys": (FusedInfoNCELoss, (X, Y), (X,)),
    "views with negatives": (DCLLoss, (X, Y), (X, Y, Y)),
    "a temperature": (FusedInfoNCELoss, (X, Y), (X, Y)),
    "prefixes": (lambda **o: MatryoshkaLoss(FusedInfoNCELoss(**o), [D, 2]), (X, Y), (X, Y[:, :3])),
}


@pytest.mark.parametrize("name", OF_MODULES)
def test_what_a_module_refuses_is_told(name: str) -> None:
    make, right, wrong = OF_MODULES[name]

    def call(communicator: LoopbackCommunicator) -> None:
        loss = make(distributed=Distributed(communicator))
        if communicator.rank != GUILTY:
            loss(*right)
        elif name == "a temperature":
            loss.temperature = warm
            loss(*right)
        else:
            loss(*wrong)

    errors = then_right(call)
    for rank, error in enumerate(errors):
        if rank != GUILTY:
            assert str(error) == f"rank {GUILTY}: {type(errors[GUILTY]).__name__}: {errors[GUILTY]}"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ranks_whose_rows_share_no_keys_meet_too(reduction: Any) -> None:
    teacher = torch.rand(N, 2)

    def call(communicator: LoopbackCommunicator) -> None:
        wrong = communicator.rank == GUILTY
        functional.grouped_info_nce(
            X, Y.repeat(2, 1), 2, temperature=0.1, reduction=reduction, distillation="kl_div",
            teacher_scores=teacher[:3] if wrong else teacher, distributed=Distributed(communicator),
        )  # fmt: skip

    errors = then_right(call)
    assert [type(error) for error in errors] == [RuntimeError, ValueError, RuntimeError]


def test_two_guilty_ranks_are_both_named() -> None:
    def call(communicator: LoopbackCommunicator) -> None:
        given = arguments(communicator.rank)
        if communicator.rank > 0:
            given["temperature"] = -1.0 * communicator.rank
        info_nce(**given, distributed=Distributed(communicator))

    errors = then_right(call)
    assert "rank 1: ValueError: " in str(errors[0])
    assert "; rank 2: ValueError: " in str(errors[0])
    assert [type(error) for error in errors] == [RuntimeError, ValueError, ValueError]


def of_views(query: Tensor, positive_key: Tensor, temperature: float, **more: Any) -> Tensor:
    return functional.sup_con(torch.stack([query, positive_key, query], 1), temperature=temperature, **more)


# What is right on every rank, but not the same on one: the function, the arguments of all, and those of one.
IDS = torch.arange(N)
DIFFERENT: dict[str, tuple[dict[str, Any], Spoil]] = {
    "dtypes": ({}, lambda a: a | {k: a[k].detach().float().requires_grad_() for k in ("query", "positive_key")}),
    "components": ({}, lambda a: a | {k: a[k].detach()[:, :3].requires_grad_() for k in ("query", "positive_key")}),
    "ids": ({"key_ids": IDS}, lambda a: {k: x for k, x in a.items() if k != "key_ids"}),
    "columns of ids": ({"key_ids": IDS[:, None].repeat(1, 2)}, lambda a: a | {"key_ids": IDS[:, None].repeat(1, 3)}),
    "biases": ({}, lambda a: a | {"key_bias": torch.zeros(N).double()}),
    "a gradient of the rows": ({}, no_gradient),
    "a gradient of the keys": ({}, lambda a: a | {"positive_key": a["positive_key"].detach()}),
    "a gradient of the temperature": ({"temperature": torch.tensor(0.2)},
        lambda a: a | {"temperature": torch.tensor(0.2, requires_grad=True)}),
    "temperatures a row": ({"temperature": torch.tensor([0.2], requires_grad=True)},
        lambda a: a | {"temperature": torch.full((N,), 0.2, requires_grad=True)}),
    "a gradient of a bias": ({"key_bias": torch.zeros(N).double()},
        lambda a: a | {"key_bias": torch.zeros(N).double().requires_grad_()}),
    "reductions": ({}, lambda a: a | {"reduction": "none"}),
    "sums and means": ({}, lambda a: a | {"reduction": "sum"}),
    "symmetric": ({}, lambda a: a | {"symmetric": True}),
    "normalize": ({}, lambda a: a | {"normalize": False}),
    "targets": ({}, lambda a: a | {"target": IDS}),
    "explicit negatives": ({}, lambda a: a | {"negative_keys": torch.randn(2, D).double()}),
    "modes of negatives": ({"negative_keys": torch.randn(2, D).double()}, lambda a: a | {"negative_keys": torch.randn(N,
        2, D).double(), "negative_mode": "paired"}),
    "smoothing": ({}, lambda a: a | {"label_smoothing": 0.1}),
    "a margin": ({}, lambda a: a | {"margin": 0.1}),
    "several positives": ({}, lambda a: a | {"positive_ids": IDS}),
    "kinds of several positives": ({"positive_ids": IDS}, lambda a: a | {"positives": "all"}),
    "gradients of parameters": ({}, lambda a: a | {"parameter_gradients": "sum"}),
    "autocast": ({k: torch.ones(N, D) for k in ("query", "positive_key")}, lambda a: a | {"autocast": True}),
    "a backend that is dense": ({"symmetric": True}, lambda a: a | {"backend": "reference"}),
    "positives by target and by ids": ({"target": IDS[:, None], "positives": "all"},
        lambda a: {k: x for k, x in a.items() if k != "target"} | {"positive_ids": (IDS, IDS)}),
    "labels": ({"function": of_views}, lambda a: a | {"labels": IDS}),
    "another loss": ({}, lambda a: a | {"function": functional.decoupled_info_nce}),
    "a loss of other arguments": ({}, lambda a: {"function": lambda **k: functional.clip_loss(a["query"],
        a["positive_key"], 5.0, **k)}),
    "a queue of another size": ({"function": lambda query, positive_key, queue=4, **k: functional.moco_loss(
        query, positive_key, torch.ones(query.shape[1], queue, dtype=query.dtype), **k)}, lambda a: a | {"queue": 5}),
    "another number of views": ({"function": lambda query, positive_key, views=1, **k: functional.nt_xent(
        query, positive_key, more_views=[query] * views, **k)}, lambda a: a | {"views": 2}),
    "a loss of views": ({}, lambda a: {"function": lambda **k: functional.nt_xent(a["query"], a["positive_key"], **k)}),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ_are_an_error_on_all_ranks(name: str) -> None:
    of_all_ranks, spoil = DIFFERENT[name]

    def call(communicator: LoopbackCommunicator) -> None:
        given = arguments(communicator.rank, **of_all_ranks)
        given = spoil(given) if communicator.rank == GUILTY else given
        gradients = given.pop("parameter_gradients", "mean")
        function = given.pop("function", info_nce)
        with torch.autocast("cpu", enabled=given.pop("autocast", False)):
            function(**given, distributed=Distributed(communicator, parameter_gradients=gradients))

    for error in then_right(call):
        assert type(error) is ValueError
        assert str(error).startswith("the ranks' calls differ")
        assert f"rank {GUILTY}" in str(error)


def test_values_are_compared_where_that_is_asked_for() -> None:
    def call(communicator: LoopbackCommunicator, name: str, check: str) -> None:
        value = {"temperature": 0.1, "margin": 0.1}[name] * (2 if communicator.rank == GUILTY else 1)
        given = arguments(communicator.rank) | {name: value}
        info_nce(**given, distributed=Distributed(communicator, check=check))

    assert of_all(lambda communicator: call(communicator, "temperature", "sizes")) == [None] * WORLD
    for name, check in (("temperature", "values"), ("margin", "sizes")):  # an option is always compared
        errors = then_right(lambda communicator, name=name, check=check: call(communicator, name, check))
        assert all(type(error) is ValueError and f"rank {GUILTY}" in str(error) for error in errors)


def before_a_fit(rank: int, distributed: Distributed) -> None:
    follow = HeldOutTemperature(FusedInfoNCELoss(distributed=distributed))
    query, key = torch.randn(2, 3, 4)
    follow.step(lambda: (query, key) if rank != GUILTY else 1 / 0)


def before_a_cached_loss(rank: int, distributed: Distributed) -> None:
    rows = torch.randn(3, 4)
    encoder = torch.nn.Linear(4 if rank != GUILTY else 5, 2)
    cached(FusedInfoNCELoss(distributed=distributed), (encoder, rows), (encoder, rows))


@pytest.mark.parametrize("call", [before_a_fit, before_a_cached_loss])
def test_a_mistake_before_a_loss_is_an_error_on_all(call: Callable[[int, Distributed], None]) -> None:
    kind = {before_a_fit: ZeroDivisionError, before_a_cached_loss: RuntimeError}[call]
    for rank, error in enumerate(then_right(lambda x: call(x.rank, Distributed(x)))):
        assert type(error) is (kind if rank == GUILTY else RuntimeError)
        assert rank == GUILTY or str(error).startswith(f"rank {GUILTY}: {kind.__name__}: ")


def test_a_rank_of_one_row_has_a_temperature_of_its_own() -> None:
    """Whose tensor has the shape of one temperature for all."""

    def call(communicator: LoopbackCommunicator) -> None:
        n = 1 + communicator.rank
        query, key = torch.randn(2, n, 4)
        t = torch.linspace(0.1, 0.2, n)
        info_nce(query, key, temperature=t, distributed=Distributed(communicator, check="values"))

    assert of_all(call) == [None] * WORLD


def test_a_call_that_one_rank_alone_has_made_is_told_by_its_number() -> None:
    def call(communicator: LoopbackCommunicator) -> None:
        if communicator.rank == GUILTY:
            unchecked = Distributed(communicator, check="none")  # of which the others do not hear
            with pytest.raises(ValueError, match="temperature"):
                info_nce(**arguments(temperature=-1.0), distributed=unchecked)
        info_nce(**arguments(communicator.rank), distributed=Distributed(communicator))

    for error in of_all(call):
        assert type(error) is ValueError
        assert "rank 0: call 1 of this process" in str(error)
        assert "rank 1: call 2 of this process" in str(error)


def test_without_a_check_equal_calls_exchange_nothing_on_the_host() -> None:
    def call(communicator: LoopbackCommunicator) -> Tensor:
        object.__setattr__(communicator, "all_gather_host", lambda message: pytest.fail("a message of the host"))
        return info_nce(**arguments(communicator.rank), distributed=Distributed(communicator, check="none")).detach()

    checked = of_all(lambda c: info_nce(**arguments(c.rank), distributed=Distributed(c)).detach())
    assert all(torch.equal(x, checked[0]) for x in of_all(call))


def test_what_cannot_be_distributed_is_refused() -> None:
    rows, scores = torch.randn(N, D), torch.randn(N, N)
    given = Distributed(Loopback(1).ranks[0])
    with pytest.raises(ValueError, match="mask names pairs of this process's samples"):
        functional.sup_con(torch.randn(N, 2, D), mask=torch.eye(N), distributed=given)
    with pytest.raises(ValueError, match="teacher_scores are of this process's keys"):
        functional.distilled_info_nce(rows, rows, teacher_scores=scores, distributed=given)
    documents = torch.randn(1, N + 2, D)
    with pytest.raises(ValueError, match="offset"):
        functional.multiple_negatives(rows, documents, offset=1, distributed=given)
    with pytest.raises(ValueError, match="all_queries"):
        functional.multiple_negatives(
            rows, documents, all_queries=torch.cat([rows, rows[:2]]), directions=("query_to_doc", "doc_to_query"),
            distributed=given,
        )  # fmt: skip


@pytest.mark.parametrize("given", ["gloo", 2, 1.0, object(), [True], torch.ones(1)])
def test_what_is_no_group_is_refused_when_a_loss_is_made_and_called(given: Any) -> None:
    match = "distributed must be True, False, a ProcessGroup, a one-dimensional DeviceMesh or a Distributed, got"
    with pytest.raises(TypeError, match=match):
        FusedInfoNCELoss(distributed=given)
    with pytest.raises(TypeError, match=match):
        info_nce(**arguments(), distributed=given)
    with pytest.raises(TypeError, match=match):
        info_nce(**arguments(), distributed=Distributed(given))


@pytest.mark.parametrize("option", ["parameter_gradients", "exchange", "check"])
def test_options_are_of_known_kinds(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'median'"):
        Distributed(**{option: "median"})


def test_a_process_group_is_needed() -> None:
    for given in (True, Distributed()):
        with pytest.raises(RuntimeError, match="init_process_group first"):
            info_nce(**arguments(), distributed=given)


def of_processes(rank: int) -> None:
    wrong = [
        (ValueError, "temperature", lambda a: a | {"temperature": -0.1}),
        (TypeError, "positive_key must be torch.float64", lambda a: a | {"positive_key": a["positive_key"].float()}),
    ]
    start = time.monotonic()
    for kind, text, spoil in wrong:
        given = spoil(arguments(rank)) if rank == GUILTY else arguments(rank)
        expected = (kind, text) if rank == GUILTY else (RuntimeError, f"^rank {GUILTY}: {kind.__name__}: .*{text}")
        with pytest.raises(expected[0], match=expected[1]):
            info_nce(**given, distributed=True)
    with pytest.raises(ValueError, match=f"the ranks' calls differ.*; rank {GUILTY}: "):
        info_nce(**arguments(rank), reduction="sum" if rank == GUILTY else "mean", distributed=True)
    assert time.monotonic() - start < 5
    values = [torch.zeros((), dtype=torch.float64) for _ in range(WORLD)]
    dist.all_gather(values, info_nce(**arguments(rank), distributed=True).detach())
    assert all(torch.equal(x, values[0]) for x in values)


def one_killed(rank: int) -> None:
    info_nce(**arguments(rank), distributed=True)
    if rank == GUILTY:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        info_nce(**arguments(rank), distributed=True).backward()
    assert time.monotonic() - start < 10


def one_away(rank: int) -> None:
    if rank == GUILTY:
        time.sleep(8)
        return
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        info_nce(**arguments(rank), distributed=True).backward()
    assert time.monotonic() - start < 7


def one_away_from_a_side_group(rank: int) -> None:
    """As of NCCL, whose group carries nothing of a CPU: hosts talk over a group of their own."""
    dist.get_backend_config = lambda group=None: "cpu:other"
    info_nce(**arguments(rank), distributed=True)
    one_away(rank)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("worker", [of_processes, one_killed, one_away, one_away_from_a_side_group])
def test_processes_raise_within_their_time(tmp_path: Path, worker: Callable[[int], None]) -> None:
    timeout = {of_processes: 20, one_killed: 5, one_away: 3, one_away_from_a_side_group: 3}[worker]
    in_processes(worker, tmp_path, WORLD, limit=60, timeout=timeout, leave=worker is not of_processes)
