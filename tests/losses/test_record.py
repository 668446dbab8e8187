"""What `record=True` keeps of a call: the statistics of its rows, at next to no cost."""

from __future__ import annotations

import copy
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from support.helpers import DEVICE, TRITON, both_backends
from support.losses import EXPORTED, LOSSES
from support.ranks import succeeded

import fused_infonce
from fused_infonce import (
    ClipLoss,
    DCLLoss,
    DualTemperatureLoss,
    FusedInfoNCELoss,
    GlobalContrastiveLoss,
    GroupedInfoNCELoss,
    GuidedInfoNCELoss,
    MoCoLoss,
    MultipleNegativesLoss,
    NTXentLoss,
    RobustInfoNCELoss,
    SigLipLoss,
    SupConLoss,
)
from fused_infonce.distributed import Distributed
from fused_infonce.distributed.loopback import Loopback, LoopbackCommunicator
from fused_infonce.temperature import IndividualTemperature

T = 0.2
every_backend = pytest.mark.parametrize("backend", ["torch", TRITON, "reference"])


def drawn(n, d=16, backend="torch", dtype=torch.float64, **options):
    query = torch.randn(n, d, dtype=dtype, device=DEVICE.get(backend, "cpu"))
    return query.requires_grad_(), (query.detach() + torch.randn_like(query)).requires_grad_()


def dense(query, key, t=T, left_out=None, target=None):
    """Return pos, neg and mean of rows from their scores, in float64."""
    x, y = (F.normalize(rows.detach().double(), dim=-1) for rows in (query, key))
    logits = x @ y.T / t
    target = torch.arange(len(x), device=x.device) if target is None else target
    pos = logits.gather(1, target[:, None])[:, 0]
    out = torch.zeros_like(logits, dtype=torch.bool).scatter(1, target[:, None], value=True)
    out = out if left_out is None else out | left_out
    neg = logits.masked_fill(out, -torch.inf).logsumexp(1)
    return pos, neg, (torch.exp(logits - neg[:, None]).masked_fill(out, 0) * logits).sum(1)


def both(query, key, **options):
    return [torch.cat(x) for x in zip(dense(query, key, **options), dense(key, query, **options), strict=True)]


def agrees(recorded, expected, rtol=1e-9):
    for found, right in zip(recorded[:3], expected, strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), right, rtol=rtol, atol=rtol)


@every_backend
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_the_dense_statistics_of_each_direction(backend, symmetric, reduction):
    query, key = drawn(19, backend=backend)
    loss = FusedInfoNCELoss(T, reduction, symmetric=symmetric, backend=backend, record=True)
    loss(query, key).sum().backward()
    agrees(loss.recorded, (both if symmetric else dense)(query, key))
    assert loss.recorded.keys == 19
    assert (loss.recorded.temperature == T).all()


@pytest.mark.parametrize("grads", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_pass_in_blocks_keeps_it_whatever_gradients_are_wanted(symmetric, grads):
    """One pass takes the mean from the gradient of the query, where there is one, in one direction."""
    query, key = (x.requires_grad_(grad) for x, grad in zip(drawn(700, 8), grads, strict=True))
    loss = FusedInfoNCELoss(T, symmetric=symmetric, record=True, workspace_limit=2**23)
    plan = loss.explain(query, key)[0]
    assert loss.recorded is None
    assert plan.name == ("onepass" if True in grads else "forward")
    loss(query, key)
    agrees(loss.recorded, (both if symmetric else dense)(query, key))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("given", ["bias", "ids", "paired", "shared", "table", "rows"])
def test_a_pass_in_blocks_with_all_that_a_call_may_be_given(given, symmetric):
    n = 700
    query, key = drawn(n, 8)
    options = {
        "bias": {"key_bias": torch.randn(n, dtype=torch.float64)}, "ids": {"key_ids": torch.arange(n) // 2},
        "paired": {"negative_keys": torch.randn(n, 3, 8, dtype=torch.float64)},
        "shared": {"negative_keys": torch.randn(50, 8, dtype=torch.float64)},
        "table": {"negative_keys": torch.randn(9, 8).double(), "negative_index": torch.randint(-1, 9, (n, 4))},
        "rows": {"temperature": 0.1 + 0.2 * torch.rand(n, dtype=torch.float64)},
    }[given]  # fmt: skip
    mode = {"negative_mode": "paired" if given == "paired" else "unpaired", "in_batch_negatives": True}
    loss = FusedInfoNCELoss(T, symmetric=symmetric, record=True, **mode)
    loss(query, key, **options)
    expected = fused_infonce.statistics(query, key, columns=symmetric, **mode, **{"temperature": T} | options)
    parts = list(expected) if symmetric else [expected]
    agrees(loss.recorded, [torch.cat([part[i].detach() for part in parts]) for i in range(3)])


@both_backends
def test_one_pass_in_chunks_of_a_few_rows(backend, monkeypatch):
    query, key = drawn(1100, 16, backend, torch.float32)
    loss = FusedInfoNCELoss(T, backend=backend, record=True, workspace_limit=2**23)
    if backend == "triton":  # chunks of a GPU are larger than the interpreter has time for
        monkeypatch.setattr(fused_infonce.backends.plan, "GPU_DENSE_WIDE", 0)
        query, key = (x.detach()[:150].requires_grad_() for x in (query, key))
    assert loss.explain(query, key)[0].name == "onepass"
    loss(query, key)
    agrees(loss.recorded, dense(query, key), 1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@every_backend
def test_biases_and_margins_are_in_pos_and_neg_but_not_in_the_mean(backend, symmetric):
    query, key = drawn(9, backend=backend)
    bias = torch.linspace(-1, 1, 9, dtype=torch.float64, device=query.device)
    loss = FusedInfoNCELoss(T, margin=0.1, symmetric=symmetric, backend=backend, record=True)
    loss(query, key, key_bias=bias)
    expected = fused_infonce.statistics(query, key, temperature=T, key_bias=bias, columns=True)
    parts = [expected.rows, expected.columns][: 1 + symmetric]
    agrees(loss.recorded, [torch.cat([x[i].detach() - (0.1 / T if i == 0 else 0) for x in parts]) for i in range(3)])


@every_backend
def test_rows_that_do_not_count_and_rows_without_negatives(backend):
    query, key = drawn(6, backend=backend)
    ids = torch.tensor([0, 0, 0, 0, 0, 0], device=query.device)
    loss = FusedInfoNCELoss(T, backend=backend, record=True)
    loss(query, key, key_ids=ids)
    assert (loss.recorded.neg == -torch.inf).all()
    assert (loss.recorded.mean == 0).all()
    loss(query, key, target=torch.tensor([1, -100, 3, 4, 5, 0], device=query.device))
    assert loss.recorded.pos[1] == 0
    assert loss.recorded.neg.isfinite().all()
    assert loss.recorded.counted.tolist() == [True, False, True, True, True, True]


def test_a_row_whose_gradient_is_too_small_has_no_mean_where_that_is_what_it_is_made_of():
    query, key = drawn(700, 8, dtype=torch.float32)
    weight = torch.ones(700)
    weight[3] = 0
    loss = FusedInfoNCELoss(T, record=True)
    loss(query, key, weight=weight)
    assert loss.recorded.mean.isnan().nonzero().flatten().tolist() == [3]
    assert not loss.recorded.neg.isnan().any()


def test_rows_that_count_are_told_whatever_makes_the_loss():
    """Rows without a positive, and with a weight of 0 the rows of both directions."""
    query, key = drawn(8)
    index = torch.arange(8)
    classes = torch.tensor([0, 0, 1, 1, 2, 3, 4, 4])
    several = torch.stack([index, index.roll(1)], 1).masked_fill(index[:, None] == 1, -100)
    weight = (index != 2).double()
    negatives = torch.randn(3, 16, dtype=torch.float64)
    cases = [
        (SupConLoss(T), (query[:, None], classes), {}, [4, 5]),
        (FusedInfoNCELoss(T), (query, key), {"target": several}, [1]),
        (FusedInfoNCELoss(T, symmetric=True), (query, key), {"weight": weight}, [2, 10]),
        (
            FusedInfoNCELoss(T, "sum"), (query, key),
            {"weight": weight, "target": index.masked_fill(index > 5, -100)}, [2, 6, 7],
        ),
        (FusedInfoNCELoss(T, symmetric=True, label_smoothing=0.1), (query, key), {"weight": weight}, [2, 10]),
        (FusedInfoNCELoss(T, symmetric=True), (query, key), {"weight": weight, "positive_ids": classes}, [2, 10]),
        (
            FusedInfoNCELoss(T, symmetric=True, in_batch_negatives=True), (query, key),
            {"weight": weight, "negative_keys": negatives}, [2, 10],
        ),
        (DualTemperatureLoss(T, symmetric=True), (query, key), {"weight": weight}, [2, 10]),
    ]  # fmt: skip
    for loss, rows, given, out in cases:
        loss.record = True
        loss(*rows, **given)
        assert (~loss.recorded.counted).nonzero().flatten().tolist() == out
        assert loss.recorded.counted.shape == loss.recorded.pos.shape == loss.recorded.neg.shape


def together(*parts):
    """Return the statistics of rows whose negatives are those of several, the first of which have the positives."""
    negs = torch.stack([part[1] for part in parts])
    neg = negs.logsumexp(0)
    return parts[0][0], neg, (torch.exp(negs - neg) * torch.stack([part[2] for part in parts])).sum(0)


def views():
    a, b = drawn(7)
    rows = torch.cat([a, b])
    index = torch.arange(14)
    same = index[:, None] == index
    return rows, same, index.roll(7)


@pytest.mark.parametrize("kind", [NTXentLoss, DCLLoss])
def test_of_two_views(kind):
    rows, same, target = views()
    loss = kind(T, record=True)
    loss(*rows.chunk(2))
    agrees(loss.recorded, dense(rows, rows, left_out=same, target=target))


def test_of_three_views_the_positive_is_the_next():
    rows = torch.randn(21, 8, dtype=torch.float64)
    sample = torch.arange(7).repeat(3)
    loss = NTXentLoss(T, record=True)
    loss(*rows.chunk(3))
    pos, *_ = dense(rows, rows, target=(torch.arange(21) + 7) % 21)
    agrees(loss.recorded, [pos, *dense(rows, rows, left_out=sample[:, None] == sample)[1:]])


def test_of_classes_negatives_are_all_others():
    """SupCon's denominator has the other positives; what is kept beside one of them is the rest of it."""
    rows, labels = torch.randn(8, 6, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    loss = SupConLoss(T, record=True)
    loss(rows[:, None], labels)
    agrees(loss.recorded, dense(rows, rows, left_out=torch.eye(8) > 0, target=torch.arange(8) ^ 1))


def test_of_a_queue_and_of_images():
    query, key = drawn(5, dtype=torch.float32)
    moco = MoCoLoss(16, queue_size=9, temperature=T, record=True)
    queue = moco.queue.T.clone()
    moco(query, key)
    own = torch.eye(5, 14) + torch.cat([torch.ones(5, 5), torch.zeros(5, 9)], 1) > 0
    agrees(moco.recorded, dense(query, torch.cat([key, queue]), left_out=own), 1e-5)
    assert moco.recorded.keys == 9
    clip = ClipLoss(normalize=True, record=True)
    clip(query, key, torch.tensor(1 / T))
    agrees(clip.recorded, both(query, key), 1e-5)


def test_negatives_of_several_products_are_one_softmax():
    query, key = drawn(6)
    guided = GuidedInfoNCELoss(T, contrast_keys=True, record=True)
    guided(query, key, guide_query=torch.eye(6).double(), guide_key=torch.eye(6).double())  # which leaves nothing out
    assert guided.recorded.counted.all()
    diagonal = torch.eye(6) > 0
    second = dense(key, key, left_out=diagonal)
    agrees(guided.recorded, together(dense(query, key), second), 1e-6)
    joint = MultipleNegativesLoss(T, directions=("query_to_doc", "query_to_query"), record=True)
    joint(query, [key])
    agrees(joint.recorded, together(dense(query, key), dense(query, query, left_out=diagonal)), 1e-6)
    assert joint.recorded.keys == 12


def test_of_losses_with_temperatures_to_find():
    query, key = drawn(6)
    robust = RobustInfoNCELoss(T, symmetric=True, record=True)
    robust(query, key)
    agrees(robust.recorded, both(query, key))
    table = IndividualTemperature(9, T, lr=0.1)
    towers = GlobalContrastiveLoss(9, temperature=table, key_temperature=table, negatives="keys", record=True)
    towers(query, key, torch.arange(6))
    agrees(towers.recorded, both(query, key), 1e-6)
    dual = DualTemperatureLoss(T, symmetric=True, record=True)
    dual(query, key)
    agrees(dual.recorded, both(query, key))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_the_option(name):
    assert ("record" in inspect.signature(EXPORTED[name]).parameters) == (name != "SigLipLoss")


def test_what_is_no_softmax_is_refused():
    siglip = SigLipLoss()
    siglip.record = True
    rows = torch.randn(3, 4)
    with pytest.raises(ValueError, match="sigmoid of every pair, has none"):
        siglip(rows, rows, 10.0)
    with pytest.raises(ValueError, match="one a passage"):
        GroupedInfoNCELoss(2, distillation="m3_kd_loss", record=True)(rows, rows.repeat(2, 1), torch.randn(3, 2))
    with pytest.raises(ValueError, match="hardness_strength=0"):
        MultipleNegativesLoss(hardness="in_batch_negatives", hardness_strength=1.0, record=True)(rows, [rows])
    with pytest.raises(ValueError, match="record must be"):
        FusedInfoNCELoss(record="yes")


def kept(loss):
    return len(loss.recorded.pos)


def test_the_last_call_is_kept_and_nothing_changes_the_loss():
    loss, plain = FusedInfoNCELoss(T, record=True), FusedInfoNCELoss(T)
    first, second = drawn(9, dtype=torch.float32), drawn(4, dtype=torch.float32)
    for batch in (first, second):  # gradients accumulate over both
        loss(*batch).backward()
        grads = [x.grad.clone() for x in batch]
        for x in batch:
            x.grad = None
        plain(*batch).backward()
        assert all(torch.equal(x.grad, grad) for x, grad in zip(batch, grads, strict=True))
    assert kept(loss) == 4
    again = copy.deepcopy(loss)
    assert again.record
    assert again.recorded is None
    again(*first)
    assert kept(again) == 9
    loss.record = False
    loss(*first)
    assert kept(loss) == 4


def test_under_autocast_it_is_float32():
    query, key = drawn(12, dtype=torch.float32)
    loss = FusedInfoNCELoss(T, record=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss(query, key)
    assert {x.dtype for x in loss.recorded[:4]} == {torch.float32}
    agrees(loss.recorded, dense(query.bfloat16(), key.bfloat16()), 1e-5)


def test_threads_keep_their_own():
    losses = [FusedInfoNCELoss(T, record=True) for _ in range(4)]
    batches = [drawn(5 + i) for i in range(4)]
    threads = [
        threading.Thread(target=lambda i=i: [losses[i](*batches[i]) for _ in range(5)]) for i in range(len(losses))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loss, batch in zip(losses, batches, strict=True):
        agrees(loss.recorded, dense(*batch))


def test_the_compiler_is_told_why_not():
    loss = FusedInfoNCELoss(T, record=True)
    query, key = drawn(5)
    with pytest.raises(Exception, match="record=True keeps tensors of a call"):
        torch.compile(loss, backend="eager", fullgraph=True)(query, key)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.disable"):
        torch.compile(loss, backend="eager")(query, key)
    torch._dynamo.reset()
    step = torch.compile(lambda *rows: 2 * torch.compiler.disable(loss)(*rows), backend="eager")
    assert step(query, key) == 2 * FusedInfoNCELoss(T)(query, key)
    agrees(loss.recorded, dense(query, key))


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_rank_keeps_its_own_rows_against_the_keys_of_all(symmetric):
    query, key = drawn(9)
    starts = [0, 2, 6, 9]

    def work(communicator: LoopbackCommunicator):
        own = slice(*starts[communicator.rank :][:2])
        loss = FusedInfoNCELoss(T, symmetric=symmetric, record=True, distributed=Distributed(communicator))
        loss(query.detach()[own].requires_grad_(), key.detach()[own].requires_grad_()).backward()
        return [x.unflatten(0, (1 + symmetric, -1)) for x in loss.recorded[:3]], loss.recorded.keys

    found = succeeded(Loopback(3, 10).run(work))
    whole = [torch.cat(parts, 1).flatten() for parts in zip(*(rows for rows, _ in found), strict=True)]
    agrees(whole, (both if symmetric else dense)(query, key))
    assert {keys for _, keys in found} == {9}


def test_a_rank_that_does_not_record_is_an_error_on_all():
    def work(communicator: LoopbackCommunicator):
        loss = FusedInfoNCELoss(symmetric=True, record=communicator.rank == 0, distributed=Distributed(communicator))
        loss(*torch.randn(2, 3, 4))

    errors = Loopback(2, 10).run(work)
    assert all(isinstance(error, ValueError) and "recorded" in str(error) for error in errors)


@pytest.mark.parametrize("options", [{"record": True}, {"distributed": Distributed(check="none")}, {}], ids=str)
def test_a_replica_for_data_parallel_runs_its_own_forward(options):
    loss = FusedInfoNCELoss(0.1, **options)
    replica = loss._replicate_for_data_parallel()
    for module in (loss, replica):
        assert getattr(module.forward, "__self__", None) is module


def test_a_recorded_temperature_is_that_of_the_call():
    t = torch.nn.Parameter(torch.tensor([0.05]))
    loss = FusedInfoNCELoss(t, record=True)
    loss(torch.randn(4, 8), torch.randn(4, 8))
    with torch.no_grad():
        t.fill_(0.5)
    assert loss.recorded is not None
    assert torch.equal(loss.recorded.temperature, torch.full((4,), 0.05))
