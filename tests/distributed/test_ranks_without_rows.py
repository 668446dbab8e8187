"""What a rank without rows must do as the others do: gather the same tensors, and make a forward again when they do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_infonce import Distributed
from fused_infonce.distributed.loopback import Loopback
from fused_infonce.functional import guided_info_nce, info_nce, siglip_loss

D = 8
COUNTS = [(3, 0), (0, 2), (3, 0, 2)]


def drawn(n: int, many: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=generator).to(dtype) for _ in range(many)]


def over_ranks(counts, loss, many, dtype):
    """Return the losses and gradients of ranks, and those of one process with the rows of all."""

    def one(communicator):
        inputs = [x.requires_grad_() for x in drawn(counts[communicator.rank], many, dtype, communicator.rank)]
        value = loss(*inputs, Distributed(communicator, parameter_gradients="sum"))
        value.backward()
        return value.item(), [x.grad for x in inputs]

    of_ranks = [drawn(n, many, dtype, rank) for rank, n in enumerate(counts)]
    inputs = [torch.cat(x).requires_grad_() for x in zip(*of_ranks, strict=True)]
    value = loss(*inputs, False)
    value.backward()
    found = Loopback(len(counts), 10).run(one)
    for rank in found:
        if isinstance(rank, BaseException):
            raise rank
    return found, (value.item(), [x.grad for x in inputs])


def compared(found, want, bound):
    for value, _ in found:
        assert value == pytest.approx(want[0], rel=1e-5)
    for index, x in enumerate(want[1]):
        parts = [grads[index] for _, grads in found if grads[index] is not None]
        if x is None:
            assert not parts
            continue
        assert (torch.cat(parts).double() - x.double()).norm() <= bound * x.double().norm()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["guide of this width", "no guide"])
@pytest.mark.parametrize("more", [(), ("contrast_keys",), ("contrast_queries",)], ids=str)
def test_guides_travel_alike(counts, dtype, given, more):
    options = dict.fromkeys(more, True)

    def loss(q, k, guide_q, guide_k, distributed):
        guides = {"guide_query": guide_q.detach(), "guide_key": guide_k.detach()} if given else {}
        return guided_info_nce(q, k, temperature=0.2, distributed=distributed, **guides, **options)

    compared(*over_ranks(counts, loss, 4, dtype), bound=1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {}, {"symmetric": True}], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_checkpoint_makes_forwards_again_in_one_order(counts, options, frozen, reduction):
    negatives = {} if "symmetric" in options else {"in_batch_negatives": True}

    def loss(q, k, h, distributed):
        def inner(q, k, h):
            more = (h,) if negatives else ()
            given = {"temperature": 0.3, "reduction": reduction, "distributed": distributed}
            return info_nce(q, k, *more, **given, **options, **negatives)

        q = q.detach() if frozen else q
        return checkpoint(inner, q, k, h, use_reentrant=False).sum()

    found, (value, grads) = over_ranks(counts, loss, 3, torch.float64)
    if reduction == "none":
        assert sum(part for part, _ in found) == pytest.approx(value)
        found = [(value, parts) for _, parts in found]
    compared(found, (value, grads), 1e-10)


def test_losses_apart_of_pairs_in_a_checkpoint():
    x, y = (t.requires_grad_() for t in drawn(5, 2, torch.float64, 0))

    def loss(x, y):
        scale, bias = torch.tensor([5.0]), torch.tensor([-2.0])
        return siglip_loss(x, y, scale, bias, reduction="none")

    want = torch.autograd.grad(loss(x, y).sum(), [x, y])
    found = torch.autograd.grad(checkpoint(loss, x, y, use_reentrant=False).sum(), [x, y])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
