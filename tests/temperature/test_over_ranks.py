"""`sweep`, `fit` and `HeldOutTemperature` over simulated ranks: what one process finds that has the pairs of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ranks import same, succeeded
from torch import Tensor

from fused_infonce import Distributed, FusedInfoNCELoss
from fused_infonce.distributed.loopback import Loopback
from fused_infonce.temperature import HeldOutTemperature, Sweep, fit, sweep

D = 12


def drawn(counts: list[int], dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Return the pairs of each rank, some of one id."""
    found = []
    for n in counts:
        query = torch.randn(n, D, dtype=torch.float64)
        key, ids = query + 2 * torch.randn(n, D, dtype=torch.float64), torch.randint(5, (n,))
        bias = torch.where(torch.rand(n) < 0.2, -torch.inf, 0.0).double()
        bias[:1] = 0  # the target of the padded
        found.append({"query": query.to(dtype), "key": key.to(dtype), "ids": ids, "bias": bias})
    return found


def arguments(part: dict[str, Tensor], kind: str) -> dict[str, Any]:
    given: dict[str, Any] = {"query": part["query"], "key": part["key"]}
    if kind == "ids":
        given |= {"query_ids": part["ids"], "key_ids": part["ids"], "negatives": 2 * part["key"][:1].repeat(3, 1)}
    elif kind == "padded":
        given |= {"key_bias": part["bias"], "target": torch.zeros(len(part["key"]), dtype=torch.int64)}
    elif kind == "own negatives":
        given |= {"negatives": part["key"][:, None] + part["query"].flip(0)[:, None]}
    return given | {"symmetric": kind == "symmetric"}


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the arguments of one process, whose targets count the keys of the ranks before."""
    whole = {}
    for name, first in parts[0].items():
        if not isinstance(first, Tensor):
            whole[name] = first
            continue
        tensors = [part[name] for part in parts]
        if name == "target":
            starts = torch.tensor([0, *(len(part["key"]) for part in parts[:-1])]).cumsum(0)
            tensors = [x + start for x, start in zip(tensors, starts, strict=True)]
        whole[name] = torch.cat(tensors)
    return whole


@pytest.mark.parametrize("counts", [[7], [5, 9], [6, 0, 8, 3]], ids=str)
@pytest.mark.parametrize("kind", ["plain", "symmetric", "ids", "padded", "own negatives"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_sweep_is_that_of_all_pairs(counts, kind, dtype):
    parts = [arguments(part, kind) for part in drawn(counts, dtype)]
    ranks = Loopback(len(counts)).run(lambda c: sweep(**parts[c.rank], distributed=c))
    found: list[Sweep] = succeeded(ranks)
    want = sweep(**joined(parts))
    error = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in vars(want).items():
        assert all(same(getattr(each, name), getattr(found[0], name)) for each in found)
        torch.testing.assert_close(getattr(found[0], name), value, rtol=error, atol=error)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_fit_is_that_of_all_pairs(backend, symmetric):
    parts = [arguments(part, "plain") | {"symmetric": symmetric} for part in drawn([20, 11])]
    found = succeeded(
        Loopback(2).run(lambda c: fit(**parts[c.rank], bounds=(0.05, 0.5), backend=backend, distributed=c))
    )
    want = fit(**joined(parts), bounds=(0.05, 0.5))
    assert found[0] == found[1]
    assert found[0].converged
    assert found[0].passes == want.passes
    assert found[0].temperature == pytest.approx(want.temperature, rel=1e-9)
    assert found[0].stderr == pytest.approx(want.stderr, rel=1e-6)


def test_held_out_pairs_of_all_ranks_set_one_temperature():
    parts = [arguments(part, "plain") for part in drawn([30, 20])]

    def follow(communicator: Any) -> Any:
        loss = FusedInfoNCELoss(temperature=1.0, distributed=Distributed(communicator))
        part = parts[communicator.rank]
        follow = HeldOutTemperature(loss, every=2)
        for _ in range(3):
            follow.step(part["query"], part["key"])
            loss(part["query"], part["key"])
        return loss.temperature

    found = succeeded(Loopback(2).run(follow))
    assert found[0] == found[1] == pytest.approx(fit(**joined(parts)).temperature)


def test_a_mistake_on_one_rank_is_an_error_on_all():
    parts = [arguments(part, "plain") for part in drawn([4, 4])]

    def errors(work: Any) -> list[str]:
        return [f"{type(x).__name__}: {x}" for x in Loopback(2, timeout=10).run(work)]

    def wrong(c: Any) -> Any:
        return sweep(parts[c.rank]["query"], parts[c.rank]["key"][: 4 - c.rank], distributed=c)

    first, second = errors(wrong)
    assert first.startswith("RuntimeError: rank 1: ValueError: ")
    assert second.startswith("ValueError: ")
    for other in errors(lambda c: sweep(**parts[c.rank], temperatures=[0.1, 0.2 + c.rank], distributed=c)):
        assert other.startswith("ValueError: the ranks' calls differ. rank 0: call 1 of this process: sweep(")
    for other in errors(lambda c: fit(**parts[c.rank], bounds=(0.1, 0.2 + c.rank), distributed=c)):
        assert other.startswith("ValueError: the ranks' calls differ. rank 0: call 1 of this process: fit(")
    few = [{name: x[:1] if name == "query" or name == "key" else x for name, x in part.items()} for part in parts]
    few[0] = few[0] | {"query": few[0]["query"][:0], "key": few[0]["key"][:0]}
    for other in errors(lambda c: fit(**few[c.rank], distributed=c)):
        assert other == "ValueError: query must have 2 rows or more, got 1"
