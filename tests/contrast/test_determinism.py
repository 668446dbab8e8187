"""Bitwise the same results from run to run, also where many rows add to one."""

import pytest
import torch

from fused_infonce import info_nce, sup_con

pytestmark = pytest.mark.serial
N, M, D = 4096, 512, 64  # a CPU divides sums of this size among its threads


def call(name):
    torch.manual_seed(0)
    query, key = torch.randn(N, D, requires_grad=True), torch.randn(M, D, requires_grad=True)
    target, labels = torch.randint(M, (N,)), torch.randint(20, (N,))
    calls = {
        "one pass": lambda: info_nce(query, key, target=target),
        "rows": lambda: info_nce(query, key, target=target, reduction="none").sum(),
        "smoothing": lambda: info_nce(query, key, target=target, label_smoothing=0.1, key_ids=torch.arange(M) // 3),
        "sup_con": lambda: sup_con(query[: N // 2, None], labels=labels[: N // 2]),
    }
    loss = calls[name]()
    return [loss, *(x for x in torch.autograd.grad(loss, (query, key), allow_unused=True) if x is not None)]


@pytest.mark.parametrize("name", ["one pass", "rows", "smoothing", "sup_con"])
def test_several_threads_give_the_same_bits(name):
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    try:
        first = call(name)
        for _ in range(10):
            for x, y in zip(call(name), first, strict=True):
                assert torch.equal(x, y)
    finally:
        torch.set_num_threads(threads)
