"""Several positives a row: by a (N, P) target or by ids, taken each, all or any, against dense code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import DEVICE, cases, embeddings, error, interpreted
from torch import Tensor

from fused_infonce import FusedInfoNCELoss, info_nce, sup_con
from fused_infonce.backends import plan

N, M, P, H, D = 7, 9, 3, 4, 5
every_backend = pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("triton", marks=pytest.mark.interpreter)]
)


def dense(logits: Tensor, positive: Tensor, weight: Tensor, negative: Tensor, mode: str) -> Tensor:
    """The rows' losses by their formulas, a row at a time, from (N, M) logits and weights."""
    losses = []
    for s, pos, w, neg in zip(logits, positive, weight, negative, strict=True):
        negatives, loss = s[neg], s.new_zeros(())
        own = [p for p in pos.nonzero().flatten().tolist() if w[p] > 0]
        for p in own:
            if mode == "each":
                loss = loss - w[p] * (s[p] - torch.cat([s[p : p + 1], negatives]).logsumexp(0))
            elif mode == "all":
                loss = loss - w[p] * (s[p] - torch.cat([s[own], negatives]).logsumexp(0))
        if own and mode == "any":
            loss = torch.cat([s[own], negatives]).logsumexp(0) - s[own].logsumexp(0)
        losses.append(loss if mode == "any" or not own else loss / w[own].sum())
    return torch.stack(losses)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def compare(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    for ours, truth in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (got, want)), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


@cases(
    mode=["each", "all", "any"],
    negatives=[None, "unpaired", "paired"],
    ids=[False, True],
    weighted=[False, True],
    normalize=[True, False],
    temperature=["number", "scalar", "per row"],
    reduction=["mean", "none"],
    blocks=["default", "several"],
    margin=[0.0, 0.3],
    bias=[None, "of negatives", "of all"],
    valid=lambda c: not (c["weighted"] and c["mode"] == "any"),
    pairs=True,
)
def test_targets_equal_dense_code(
    backend, mode, negatives, ids, weighted, normalize, temperature, reduction, blocks, margin, bias, monkeypatch
):
    if blocks == "several":
        monkeypatch.setattr(plan, "DENSE", 0)
    query, key = leaf(N, D), leaf(M, D)
    extra = {None: [], "unpaired": [leaf(H, D)], "paired": [leaf(N, H, D)]}[negatives]
    t = 0.4 + 0.2 * torch.rand(N if temperature == "per row" else (), dtype=torch.float64)
    number = t.item() if temperature == "number" else 0.0
    of_keys = None if bias is None else leaf(M)
    learned = [] if temperature == "number" else [t.requires_grad_()]
    leaves = [query, key, *extra, *learned, *([] if of_keys is None else [of_keys])]
    target = torch.stack([torch.randperm(M)[:P] for _ in range(N)])
    target[torch.rand(N, P) < 0.3] = -100
    target[2], target[3] = -100, torch.tensor([-100, 4, -100])  # rows with none and with one
    weight = torch.rand(N, P, dtype=torch.float64) if weighted else None
    if weight is not None:
        weight[0, 0] = 0
    names = torch.randint(4, (N,)), torch.randint(4, (M,)), torch.randint(4, extra[0].shape[:-1] if extra else (0,))

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if normalize else x

    def fused(query: Tensor, key: Tensor, *others: Tensor) -> Tensor:
        device = DEVICE[backend]
        given, others = ([others[0].to(device)], others[1:]) if extra else ([], others)
        options: dict[str, Any] = {"query_ids": names[0], "key_ids": names[1]} if ids else {}
        options |= {} if bias is None else {"key_bias": others[-1]}
        options |= {"negative_ids": names[2]} if ids and extra else {}
        options |= {"positive_weight": weight} if weighted else {}
        options = {name: x.to(device) for name, x in options.items()}
        return info_nce(
            query.to(device), key.to(device), *given, temperature=others[0].to(device) if learned else number,
            margin=margin, positive_bias=bias != "of negatives",
            negative_mode=negatives or "unpaired", in_batch_negatives=True, target=target.to(device), positives=mode,
            normalize=normalize, reduction=reduction, backend=backend, **options,
        ).cpu()  # fmt: skip

    positive = torch.zeros(N, M + H, dtype=torch.bool)
    weights = torch.zeros(N, M + H, dtype=torch.float64)
    for i, row in enumerate(target.tolist()):
        for p, j in enumerate(row):
            if j >= 0:
                positive[i, j], weights[i, j] = True, 1 if weight is None else weight[i, p]
    scores = torch.zeros(N, H, dtype=torch.float64)
    if extra:
        scores = torch.einsum("nd,nhd->nh", unit(query), unit(extra[0]).expand(N, H, D))
    logits = torch.cat([unit(query) @ unit(key).T, scores], 1) / t.reshape(-1, 1)
    logits = logits - positive.double() * margin / t.reshape(-1, 1)
    if of_keys is not None:
        shown = torch.ones_like(positive[:, :M]) if bias == "of all" else ~positive[:, :M]
        logits = logits + F.pad(shown * of_keys, (0, H))
    negative = ~positive
    negative[:, M:] = bool(extra)
    if ids:
        negative[:, :M] &= names[0][:, None] != names[1]
        negative[:, M:] &= names[0][:, None] != names[2] if extra else True
    want = dense(logits, positive, weights, negative, mode)
    there = positive.any(1)
    assert not there.all()
    want = want[there].mean() if reduction == "mean" else want
    compare(fused(*leaves), want, leaves)
    assert interpreted(backend) or torch.autograd.gradcheck(fused, leaves, fast_mode=True)


@every_backend
@pytest.mark.parametrize("mode", ["each", "all", "any"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_ids_equal_dense_code(backend, mode, symmetric, per_row):
    """Two towers of 7 rows, in 3 classes; without `symmetric` the keys are others, of which one class has none."""
    device = DEVICE.get(backend, "cpu")
    query, key = leaf(N, D), leaf(N if symmetric else M, D)
    t = (0.3 + 0.3 * torch.rand(N if per_row else 1, dtype=torch.float64)).requires_grad_()
    of_rows = torch.tensor([0, 1, 2, 0, 1, 0, 3])
    of_keys = of_rows if symmetric else torch.tensor([1, 0, 1, 2, 0, 0, 1, 2, 5])
    ids = of_rows.to(device) if symmetric else (of_rows.to(device), of_keys.to(device))
    margin, bias = 0.2 * per_row, leaf(len(key))
    got = info_nce(
        query.to(device), key.to(device), temperature=t.to(device), positive_ids=ids, positives=mode,
        symmetric=symmetric, reduction="none", backend=backend, margin=margin, key_bias=bias.to(device),
    ).cpu()  # fmt: skip
    equal = of_rows[:, None] == of_keys
    cosines = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T
    cosines, weight = cosines - margin * equal.double(), torch.ones_like(cosines)
    want = dense(cosines / t.reshape(-1, 1) + bias, equal, weight, ~equal, mode)
    if symmetric:
        want = (want + dense(cosines.T / t.reshape(-1, 1), equal.T, weight, ~equal.T, mode)) / 2
    compare(got, want, [query, key, t, bias])


@every_backend
def test_all_of_one_set_is_sup_con(backend):
    """A row is its own positive here and not there, so that it is left out by a weight of 0 and is no negative."""
    x, labels = leaf(8, D), torch.tensor([0, 1, 0, 2, 1, 0, 2, 1])
    others = [[j for j in range(8) if labels[j] == labels[i] and j != i] for i in range(8)]
    target = torch.tensor([[i, *own, *[-100] * (2 - len(own))] for i, own in enumerate(others)])
    weight = torch.ones(target.shape, dtype=torch.float64)
    weight[:, 0] = 0
    device = DEVICE.get(backend, "cpu")
    got = info_nce(
        x.to(device), x.to(device), temperature=0.2, target=target.to(device), positive_weight=weight.to(device),
        positives="all", reduction="none", backend=backend,
    ).cpu()  # fmt: skip
    compare(got, sup_con(x[:, None], labels, temperature=0.2, base_temperature=None, reduction="none"), [x])


@every_backend
@pytest.mark.parametrize("mode", ["each", "all", "any"])
def test_one_positive_is_info_nce(backend, mode):
    device = DEVICE.get(backend, "cpu")
    query, key, other = leaf(N, D), leaf(M, D), leaf(H, D)
    target = torch.randint(M, (N,))
    given = [x.to(device) for x in (query, key, other)]
    options = {"temperature": 0.05, "in_batch_negatives": True, "reduction": "none", "backend": backend}
    padded = torch.stack([torch.full_like(target, -100), target], 1).to(device)
    got = info_nce(*given, target=padded, positives=mode, **options).cpu()
    compare(got, info_nce(*given, target=target.to(device), **options).cpu(), [query, key, other])


@pytest.mark.parametrize("mode", ["each", "all", "any"])
def test_a_positive_far_behind_keeps_the_digits_of_float64(mode):
    rows = torch.eye(2, dtype=torch.float64)
    options = {"temperature": 1 / 22, "reduction": "none"}
    got = info_nce(rows, rows.flip(0), target=torch.arange(2)[:, None], positives=mode, **options)
    torch.testing.assert_close(got, info_nce(rows, rows.flip(0), **options), rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", ["each", "any"])
@pytest.mark.parametrize("t", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tight_pairs_keep_the_bounds(mode, t, dtype):
    """The loss of a pair that is told apart is far below 1, and its digits are there."""
    query, key, _ = (x if x is None else x.to(dtype) for x in embeddings("tight", 64, 32))
    target = torch.stack([torch.arange(64), torch.arange(64) ^ 1], 1)
    key[1::2] = key[::2]
    results = []
    for rows in ((query, key), (query.double(), key.double())):
        leaves = [x.detach().requires_grad_() for x in rows]
        backend = "torch" if rows[0].dtype == dtype else "reference"
        value = info_nce(*leaves, temperature=t, target=target, positives=mode, backend=backend)
        results.append((value, *torch.autograd.grad(value, leaves)))
    bound = 1e-5 * max(1, 0.05 / t)
    assert error(results[0][0], results[1][0]) <= bound
    for ours, truth in zip(results[0][1:], results[1][1:], strict=True):
        assert error(ours, truth) <= (5e-3 if dtype == torch.bfloat16 else bound)


@every_backend
def test_rows_of_weight_0_do_not_count_and_negatives_alone_may_have_ids(backend):
    device = DEVICE.get(backend, "cpu")
    query, key, other = (torch.randn(n, D, dtype=torch.float64, device=device) for n in (3, M, H))
    target = torch.tensor([[0, 1], [1, 2], [3, -100]], device=device)
    weight = torch.tensor([[1.0, 1], [0, 0], [2, 5]], device=device)
    options = {"temperature": 0.3, "target": target, "positive_weight": weight, "backend": backend}
    rows = info_nce(query, key, reduction="none", **options)
    assert rows[1] == 0
    torch.testing.assert_close(info_nce(query, key, **options), (rows[0] + rows[2]) / 2)
    ids = {
        "query_ids": torch.tensor([5, 6, 7], device=device),
        "negative_ids": torch.tensor([5, 6, 5, 9], device=device),
    }
    got = info_nce(query, key, other, in_batch_negatives=True, reduction="none", **options, **ids)
    logits = F.normalize(query) @ F.normalize(other).T / 0.3
    kept = torch.logsumexp(logits.masked_fill(ids["query_ids"][:, None] == ids["negative_ids"], -torch.inf), 1)
    first = info_nce(query, key, reduction="none", **(options | {"target": target[2:].expand(3, 2)}))[2]
    pos = (F.normalize(query[2:]) @ F.normalize(key[3:4]).T / 0.3)[0, 0]
    neg = torch.log(torch.expm1(first)) + pos
    torch.testing.assert_close(got[2], F.softplus(torch.logaddexp(neg, kept[2]) - pos))


@pytest.mark.parametrize("mode", ["each", "all", "any"])
def test_rows_without_negatives_and_calls_without_rows(mode):
    """Where all keys are positives the loss of "all" is that among them, and the others are 0; no gradient is NaN."""
    query, key = leaf(3, D), leaf(2, D)
    t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 1], [1, 0], [-100, -100]])
    loss = info_nce(query, key, temperature=t, target=target, positives=mode, reduction="none")
    assert loss[2] == 0
    assert (loss[:2] == 0).all() or mode == "all"
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss.sum(), (query, key, t)))
    nothing = info_nce(query[:0], key, target=target[:0], positives=mode, reduction="sum")
    assert nothing == 0
    assert info_nce(query, key[:0], target=torch.full((3, 2), -100), positives=mode, reduction="sum") == 0
    assert info_nce(query, key, target=target[:, :0], positives=mode, reduction="sum") == 0


def test_the_module_takes_them_and_compiles():
    query, key = torch.randn(N, D, requires_grad=True), torch.randn(M, D)
    target = torch.randint(M, (N, 2))
    loss = FusedInfoNCELoss(0.1, positives="any")
    assert "positives='any'" in repr(loss)
    want = info_nce(query, key, temperature=0.1, target=target, positives="any")
    assert torch.equal(loss(query, key, target=target), want)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = compiled(query, key, target=target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, query)[0] for x in (got, want)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positives": "some"}, "positives must be"),
        ({"positives": "any"}, r"need several positives: a \(N, P\) target"),
        ({"target": torch.zeros(N, 2, dtype=torch.int64), "positive_ids": torch.arange(N)}, "both say what"),
        ({"target": torch.full((N, 2), 50)}, r"target must be in \[0, 7\)"),
        ({"target": torch.zeros(N - 1, 2, dtype=torch.int64)}, "target must have shape"),
        ({"positive_ids": torch.arange(N - 1)}, r"positive_ids must have shape \(7,\)"),
        ({"positive_ids": (torch.arange(N), torch.arange(N)), "symmetric": True}, "which then have one id"),
        ({"positive_ids": torch.arange(N), "label_smoothing": 0.1}, "cannot be used with label_smoothing"),
        ({"positive_ids": torch.arange(N), "margin": -0.1}, "margin must not be negative"),
        (
            {
                "target": torch.tensor([[0, 1]] * (N - 1) + [[0, 4]]),
                "key_bias": torch.tensor([0.0] * 4 + [-torch.inf] + [0.0] * 2),
            },
            "key_bias must not be -inf for a row's positive.*row 6's",
        ),
        ({"positive_ids": torch.arange(N), "key_ids": torch.arange(N)}, "cannot be used with key_ids alone"),
        ({"positive_ids": (torch.arange(N),)}, "or two of the queries and the keys, got 1"),
        ({"positive_ids": torch.arange(N), "positive_weight": torch.ones(N, 1)}, "it needs such a target"),
        ({"target": torch.zeros(N, 2, dtype=torch.int64), "positive_weight": torch.ones(N)}, r"shape \(7, 2\)"),
        ({"target": torch.zeros(N, 2, dtype=torch.int64), "positive_weight": -torch.ones(N, 2)}, "not be negative"),
        (
            {"target": torch.zeros(N, 2, dtype=torch.int64), "positive_weight": torch.ones(N, 2), "positives": "any"},
            "has no positive_weight",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        info_nce(*torch.randn(2, N, D), **options)


def test_a_target_out_of_range_elsewhere_makes_its_row_nan():
    """As for one positive: where values may not be read."""
    from fused_infonce import checks

    target = torch.tensor([[0, 50], [1, 2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "values_are_free", lambda _: False)
        for mode in ("each", "all", "any"):
            rows = torch.randn(2, D), torch.randn(4, D)
            loss = info_nce(*rows, temperature=0.1, target=target, positives=mode, reduction="none")
            assert loss.isnan().tolist() == [True, False]
