"""Losses as modules over several ranks: how they are shown, copied and wrapped, and MoCo's queue."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.ranks import same, succeeded
from torch import Tensor

from fused_infonce import ClipLoss, FusedInfoNCELoss, MatryoshkaLoss, MoCoLoss, SupConLoss
from fused_infonce.distributed import Distributed
from fused_infonce.distributed.loopback import Loopback, LoopbackCommunicator

WORLD, D, SIZE = 3, 6, 7


def of_all(work: Any) -> list[Any]:
    return succeeded(Loopback(WORLD, 10).run(work))


@pytest.mark.parametrize(
    "make", [FusedInfoNCELoss, ClipLoss, SupConLoss, lambda **o: MoCoLoss(D, queue_size=SIZE, **o)]
)
def test_a_representation_shows_how_it_is_distributed(make: Any) -> None:
    assert "distributed" not in repr(make())
    assert "distributed=True" in repr(make(distributed=True))
    shown = repr(make(distributed=Distributed(parameter_gradients="sum", check="values")))
    assert "distributed=Distributed(parameter_gradients='sum', exchange='auto', check='values')" in shown


@pytest.mark.parametrize("given", [True, Distributed(), Distributed(parameter_gradients="sum", exchange="gather")])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_loss_of_the_default_group_is_copied(given: Any, copied: Any) -> None:
    loss = copied(FusedInfoNCELoss(0.3, learnable_temperature=True, distributed=given))
    assert loss.distributed == given
    with pytest.raises(RuntimeError, match="init_process_group first"):
        loss(torch.randn(2, D), torch.randn(2, D))


def test_prefixes_of_distributed_embeddings() -> None:
    query, key = torch.randn(2, WORLD, 4, D, dtype=torch.float64)
    options: dict[str, Any] = {"temperature": 0.2, "symmetric": True}
    whole = [x.flatten(0, 1).requires_grad_() for x in (query, key)]
    want = MatryoshkaLoss(FusedInfoNCELoss(**options), [D, 4, 2], [1, 0.5, 0.25])(*whole)
    want.backward()

    def work(communicator: LoopbackCommunicator) -> tuple[Tensor, list[Tensor]]:
        own = [x[communicator.rank].clone().requires_grad_() for x in (query, key)]
        loss = FusedInfoNCELoss(**options, distributed=Distributed(communicator))
        value = MatryoshkaLoss(loss, [D, 4, 2], [1, 0.5, 0.25])(*own)
        value.backward()
        return value.detach(), [x.grad for x in own]

    found = of_all(work)
    for i, x in enumerate(whole):
        torch.testing.assert_close(torch.cat([g[i] for _, g in found]) / WORLD, x.grad, rtol=1e-10, atol=1e-12)
    for value, _ in found:
        assert same(value, found[0][0])
        torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=0)


def test_a_queue_holds_the_keys_of_all_ranks_in_their_order() -> None:
    counts = [(2, 0, 1), (0, 3, 2), (4, 4, 3)]  # of the ranks in three steps, the last more than the queue holds
    generator = torch.Generator().manual_seed(0)
    steps = [[torch.randn(2, n, D, generator=generator) for n in each] for each in counts]

    alone = MoCoLoss(D, queue_size=SIZE, distributed=True)  # which fixes its first values
    alone.distributed = False
    want = [alone(*torch.cat(each, 1)) for each in steps]

    def work(communicator: LoopbackCommunicator) -> tuple[list[Tensor], Tensor, Tensor]:
        torch.manual_seed(communicator.rank)
        loss = MoCoLoss(D, queue_size=SIZE, distributed=Distributed(communicator))
        values = [loss(*each[communicator.rank]) for each in steps]
        return values, loss.queue, loss.queue_ptr

    for values, queue, pointer in of_all(work):
        torch.testing.assert_close(values, want, rtol=1e-6, atol=0)
        assert torch.equal(queue, alone.queue)
        assert torch.equal(pointer, alone.queue_ptr)


def test_a_queue_begins_alike_on_all_ranks_and_moves_on_in_training_alone() -> None:
    torch.manual_seed(1)
    one, other = (MoCoLoss(D, queue_size=SIZE, distributed=True) for _ in range(2))
    assert torch.equal(one.queue, other.queue)
    assert not torch.equal(MoCoLoss(D, queue_size=SIZE).queue, MoCoLoss(D, queue_size=SIZE).queue)
    torch.testing.assert_close(one.queue.norm(dim=0), torch.ones(SIZE))

    def work(communicator: LoopbackCommunicator) -> Tensor:
        loss = MoCoLoss(D, queue_size=SIZE, distributed=Distributed(communicator)).eval()
        loss(torch.randn(2, D), torch.randn(2, D))
        loss.train()(torch.randn(2, D), torch.randn(2, D), enqueue=False)
        return loss.queue

    assert all(torch.equal(queue, one.queue) for queue in of_all(work))


def test_a_wrong_key_of_one_rank_enters_no_queue() -> None:
    def work(communicator: LoopbackCommunicator) -> Tensor:
        loss = MoCoLoss(D, queue_size=SIZE, distributed=Distributed(communicator))
        before = loss.queue.clone()
        error, match = (
            (ValueError, "key must have 6 components") if communicator.rank == 1 else (RuntimeError, "^rank 1: ")
        )
        with pytest.raises(error, match=match):
            loss.enqueue(torch.randn(2, D - (communicator.rank == 1)))
        assert torch.equal(loss.queue, before)
        loss.enqueue(torch.ones(1, D))
        return loss.queue

    for queue in of_all(work):
        torch.testing.assert_close(queue[:, :WORLD], torch.full((D, WORLD), D**-0.5))
