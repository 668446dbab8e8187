"""Columns gathered across two processes by sentence-transformers' own gather."""

from __future__ import annotations

import pytest
import torch
from support.libraries import library
from support.processes import in_two_processes
from support.side_by_side import refuse_fallback

library("sentence_transformers")

from support.sentence_models import CACHED, PLAIN, Given, assert_same_in, configuration, drop_in  # noqa: E402

N, D = 6, 8


def in_one_of_two_processes(rank):
    """Its rows against the candidates of both."""
    for seed in range(30):
        for name in (PLAIN, CACHED):
            torch.manual_seed(100 * seed + rank)
            with pytest.MonkeyPatch.context() as patch:
                refuse_fallback(patch, drop_in)
                assert_same_in(configuration(seed), name, gather_across_devices=True)


def test_two_processes_give_what_the_original_gives(tmp_path):
    in_two_processes(in_one_of_two_processes, tmp_path)


def loss_of(name, columns, guides, distributed=False):
    """Return the loss of a drop-in for these columns, and its gradients."""
    leaves = [x.clone().requires_grad_() for x in columns]
    options = {"guide": Given("guide")} if "GIST" in name else {}
    loss = getattr(drop_in, name)(Given("rows"), **options)
    loss.distributed = distributed
    parts = [[list(x.split(4)) for x in part] for part in (leaves, guides)]
    if name == CACHED:
        value = loss.calculate_loss(parts[0])
    elif "Cached" in name:
        value = loss.calculate_loss(*parts)
    else:
        value = loss([{"rows": x, "guide": g} for x, g in zip(leaves, guides, strict=True)], None)
    value.backward()
    return value.detach(), [x.grad for x in leaves]


def exact(rank):
    """`distributed` is assigned: value and gradients are those of one process."""
    torch.manual_seed(0)
    columns, guides = torch.randn(2, 3, 2 * N, D)
    own = slice(rank * N, (rank + 1) * N)
    for name in (PLAIN, CACHED, "GISTEmbedLoss", "CachedGISTEmbedLoss"):
        value, found = loss_of(name, columns[:, own], guides[:, own], distributed=True)
        whole, wanted = loss_of(name, columns, guides)
        torch.testing.assert_close(value, whole, rtol=1e-6, atol=0)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got / 2, want[own], rtol=1e-4, atol=1e-7)
        uneven = [columns[0, own], columns[1, own][: N - rank]]
        with pytest.raises(ValueError if rank else RuntimeError, match=r"columns must be|rank 1: ValueError: "):
            loss_of(name, uneven, guides[:2, own], distributed=True)


def test_distributed_is_exact_over_two_processes(tmp_path):
    in_two_processes(exact, tmp_path)
