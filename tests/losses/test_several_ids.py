"""Several ids a row: a pair of which any id agrees is left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.helpers import DEVICE, both_backends, cases, interpreted, watch_plans
from torch import Tensor

from fused_infonce import DebiasedLoss, decoupled_info_nce, info_nce, statistics
from fused_infonce.backends import plan

N, M, H, D, IDS = 9, 11, 4, 6, 3


def agree(rows: Tensor, columns: Tensor) -> Tensor:
    """Whether a row and a column agree in any id, by loops."""
    found = torch.zeros(len(rows), columns.shape[-2], dtype=torch.bool)
    for i, own in enumerate(rows.tolist()):
        for j, other in enumerate((columns[i] if columns.dim() == 3 else columns).tolist()):
            found[i, j] = any(a == b for a, b in zip(own, other, strict=True))
    return found


def dense(
    query: Tensor, key: Tensor, negatives: Tensor | None, t: Tensor, target: Tensor, ids: tuple[Tensor, ...]
) -> Tensor:
    """The rows' losses from all scores, (N,)."""
    query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
    scores = [query @ key.T]
    left_out = [agree(ids[0], ids[1]).scatter(1, target[:, None], False)]
    if negatives is not None:
        negatives = torch.nn.functional.normalize(negatives, dim=-1)
        scores.append(query @ negatives.T if negatives.dim() == 2 else torch.einsum("nd,nhd->nh", query, negatives))
        left_out.append(agree(ids[0], ids[2]))
    logits = (torch.cat(scores, 1) / t).masked_fill(torch.cat(left_out, 1), -math.inf)
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


@cases(
    negatives=[None, "unpaired", "paired"],
    targets=[False, True],
    queries=[False, True],
    symmetric=[False, True],
    reduction=["mean", "none"],
    blocks=["default", "several", "few on a GPU"],
    valid=lambda c: (
        not (c["targets"] and c["symmetric"]) and not (c["blocks"] == "several" and c["reduction"] == "mean")
    ),
)
def test_losses_and_gradients_are_those_of_dense_code(
    backend, negatives, targets, queries, symmetric, reduction, blocks, monkeypatch
):
    if blocks == "several":
        monkeypatch.setattr(plan, "DENSE", 0)
        watch_plans(monkeypatch, rows=4, cols=5)
    if blocks != "few on a GPU":
        monkeypatch.setattr(plan, "GPU_DENSE_WIDE", 0)
    m = M if targets else N
    shapes = [(N, D), (m, D), *{None: [], "unpaired": [(H, D)], "paired": [(N, H, D)]}[negatives]]
    rows = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    ids = [torch.randint(5, (*shape[:-1], IDS)) for shape in shapes]
    target = torch.randint(m, (N,)) if targets else torch.arange(N)
    if not queries:
        ids[0] = ids[1][target]
    extra = rows[2] if negatives else None
    want = dense(*rows[:2], extra, t, target, ids)
    if symmetric:
        want = (want + dense(rows[1], rows[0], None, t, target, (ids[1], ids[0]))) / 2
    want = want.mean() if reduction == "mean" else want

    def fused(t: Tensor, *given: Tensor) -> Tensor:
        device = DEVICE[backend]
        given, there = ([x.to(device) for x in tensors] for tensors in (given, ids))
        options: dict[str, Any] = {"target": target.to(device)} if targets else {}
        options |= {"query_ids": there[0]} if queries else {}
        options |= {"negative_ids": there[2]} if negatives else {}
        return info_nce(
            *given, temperature=t, negative_mode=negatives or "unpaired", in_batch_negatives=True, key_ids=there[1],
            symmetric=symmetric, reduction=reduction, backend=backend, **options,
        ).cpu()  # fmt: skip

    got = fused(t, *rows)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for ours, truth in zip(*(torch.autograd.grad(x.sum(), [t, *rows]) for x in (got, want)), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    if reduction == "mean" and not queries:
        assert interpreted(backend) or torch.autograd.gradcheck(fused, (t, *rows), fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_one_column_is_a_vector_and_columns_may_be_strided(backend):
    query, key = torch.randn(2, N, D)
    ids = torch.randint(4, (N, IDS))
    want = info_nce(query, key, key_ids=ids[:, 0], reduction="none", backend=backend)
    assert torch.equal(info_nce(query, key, key_ids=ids[:, :1], reduction="none", backend=backend), want)
    info_nce(query, key, key_ids=ids[:, :1], label_smoothing=0.1, backend=backend)
    nothing = info_nce(query[:0], key, target=ids[:0, 0], key_ids=ids, reduction="sum", backend=backend)
    assert nothing == 0
    several = [info_nce(query, key, key_ids=x, reduction="none", backend=backend) for x in (ids, ids.T.contiguous().T)]
    assert torch.equal(*several)
    assert (several[0] <= want + 1e-6).all()
    assert not torch.equal(several[0], want)


@both_backends
def test_a_row_that_keeps_no_negative_has_loss_0_and_no_gradient(backend):
    """One agrees by the first id, the others by the second."""
    query, key = (torch.randn(3, D, device=DEVICE[backend], requires_grad=True) for _ in range(2))
    t = torch.tensor(0.1, requires_grad=True)
    ids = torch.tensor([[1, 1], [1, 2], [3, 1]], device=DEVICE[backend])
    loss = info_nce(query, key, temperature=t, key_ids=ids, reduction="none", backend=backend)
    assert loss[0] == 0
    assert (loss[1:] > 0).all()
    gradients = torch.autograd.grad(loss[0], (query, key, t))
    assert not any(x.any() for x in gradients)


def test_other_losses_and_statistics_take_them():
    query, key = torch.randn(2, N, D)
    ids = torch.randint(4, (N, IDS))
    rows = statistics(query, key, temperature=0.2, key_ids=ids)
    torch.testing.assert_close(
        info_nce(query, key, temperature=0.2, key_ids=ids), torch.log1p((rows.neg - rows.pos).exp()).mean()
    )
    both = decoupled_info_nce(query, key, temperature=0.2, key_ids=ids, reduction="none")
    torch.testing.assert_close(both, torch.where(rows.neg == -math.inf, 0, rows.neg - rows.pos))


def test_refusals():
    query, key = torch.randn(2, N, D)
    ids = torch.randint(4, (N, IDS))
    with pytest.raises(ValueError, match=r"key_ids must have shape \(9,\) or \(9, I\), got \(9, 3, 1\)"):
        info_nce(query, key, key_ids=ids[..., None])
    with pytest.raises(ValueError, match=r"same number of ids, got \{'query_ids': 1, 'key_ids': 3\}"):
        info_nce(query, key, key_ids=ids, query_ids=ids[:, 0])
    with pytest.raises(ValueError, match="label_smoothing counts negatives"):
        info_nce(query, key, key_ids=ids, label_smoothing=0.1)
    with pytest.raises(ValueError, match="debiased loss counts negatives"):
        DebiasedLoss(negatives="keys")(query, key, key_ids=ids)
