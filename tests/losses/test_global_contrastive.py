"""SogCLR and iSogCLR: a training's values, gradients and state against dense float64, over ranks too."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from oracles.global_contrastive import GlobalContrast
from support.helpers import DEVICE, TRITON, both_backends, elsewhere, error
from support.ranks import succeeded
from torch import nn

from fused_infonce import Distributed, GlobalContrastiveLoss, MatryoshkaLoss, robust_info_nce
from fused_infonce.distributed.loopback import Loopback
from fused_infonce.temperature import IndividualTemperature

SAMPLES, D = 24, 8


def batch(n=7, samples=SAMPLES, dtype=torch.float32):
    """Return rows of n samples, a positive not far from its query, and the samples."""
    a = torch.randn(n, D)
    b = a + 0.7 * torch.randn(n, D)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), torch.randperm(samples)[:n]


FORMS = {  # negatives, tables of temperatures
    "views": ("views", 0),
    "views with a table": ("views", 1),
    "towers": ("keys", 0),
    "towers with a table": ("keys", 1),
    "towers with two tables": ("keys", 2),
}


def made(form, t=0.1, gamma=0.6, lr=0.02, samples=SAMPLES, bounds=(0.05, 0.7), **options):
    """Return a loss and its dense counterpart."""
    negatives, tables = FORMS[form]
    steps = {"lr": lr, "bounds": bounds, "clip": 2.0}
    found = [IndividualTemperature(samples, t, **steps) for _ in range(tables)]
    loss = GlobalContrastiveLoss(
        samples, temperature=found[0] if found else t, key_temperature=found[1] if tables == 2 else None, gamma=gamma,
        rho=0.4, negatives=negatives, **options,
    )  # fmt: skip
    return loss, GlobalContrast(samples, t, gamma, 0.4, negatives == "keys", tables, **steps)


def assert_state(loss, dense, of_u=1e-5):
    """The dense estimates within this, and the temperatures within 1e-5, both relative."""
    log_u = loss.log_u.double().cpu().expand(2, -1) if loss.log_u.dim() == 1 else loss.log_u.double().cpu()
    assert torch.equal(log_u == -torch.inf, dense.u == 0)
    torch.testing.assert_close(log_u.exp(), dense.u, rtol=of_u, atol=0)
    tables = [x for x in (loss.held_temperature, loss.key_temperature) if isinstance(x, nn.Module)]
    for table, tau in zip(tables, dense.tau, strict=False):
        torch.testing.assert_close(table.values.double().cpu(), tau, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float64),
        ("torch", torch.float32),
        ("reference", torch.float64),
        pytest.param("triton", torch.float32, marks=TRITON.marks),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_are_those_of_dense_float64(backend, form, dtype):
    """Of a float32 state. u has the relative error of its logits, which divide by t, in float32 embeddings."""
    device = DEVICE.get(backend, "cpu")
    loss, dense = made(form, backend=backend)
    loss = loss.to(device)
    for _ in range(20 if backend == "torch" else 4):
        a, b, index = batch(dtype=dtype)
        value = loss(a.to(device), b.to(device), index.to(device))
        values, surrogate = dense.step(a, b, index)
        torch.testing.assert_close(value.double().cpu(), values.mean().detach(), rtol=1e-5, atol=1e-6)
        for got, want in zip(*(torch.autograd.grad(x, (a, b)) for x in (value, surrogate)), strict=True):
            assert error(got, want) <= 2e-5
    assert_state(loss, dense, 1e-5 if dtype == torch.float64 else 5e-5)
    if FORMS[form][1]:
        assert loss.held_temperature.values.unique().numel() > 10  # they have moved, apart
    assert repr(loss).startswith("GlobalContrastiveLoss(")


@both_backends
@pytest.mark.parametrize("form", ["views with a table", "towers with two tables"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_overflows_at_a_temperature_of_a_hundredth(backend, form, dtype):
    """exp(1 / 0.01) is 3e43, which float32 has not."""
    loss, dense = made(form, t=0.01, lr=1e-4, bounds=(0.005, 0.05), backend=backend)
    loss = loss.to(DEVICE[backend])
    for _ in range(3):
        a, b, index = batch(dtype=dtype)
        value = loss(a.to(DEVICE[backend]), b.to(DEVICE[backend]), index.to(DEVICE[backend]))
        values, surrogate = dense.step(a, b, index)
        torch.testing.assert_close(value.double().cpu(), values.mean().detach(), rtol=1e-5, atol=1e-6)
        for got, want in zip(*(torch.autograd.grad(x, (a, b)) for x in (value, surrogate)), strict=True):
            assert got.dtype == dtype
            assert error(got, want) <= (5e-5 if dtype == torch.float32 else 5e-3)
    assert_state(loss, dense, 2e-4)  # of u, whose logarithm is near 100


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_batch_that_is_all_the_average_is_the_robust_loss(backend):
    a, b, index = batch(dtype=torch.float64)
    t = torch.rand(7, dtype=torch.float64).add(0.1).requires_grad_()
    loss = GlobalContrastiveLoss(SAMPLES, temperature=t, gamma=1.0, rho=0.7, negatives="keys", backend=backend)
    for _ in range(2):  # of samples that were seen too
        got = loss(a, b, index)
        want = robust_info_nce(a, b, temperature=t, rho=0.7, symmetric=True)
        for x, y in zip(*([v, *torch.autograd.grad(v, (a, b, t))] for v in (got, want)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("negatives", ["views", "keys"])
def test_gradients_of_a_batch_alone_are_those_of_finite_differences(negatives):
    loss = GlobalContrastiveLoss(SAMPLES, gamma=1.0, negatives=negatives).double()
    a, b, index = batch(4, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def call(a, b, t):
        loss.temperature = t
        return loss(a, b, index)

    assert torch.autograd.gradcheck(call, (a, b, t), fast_mode=True)


@pytest.mark.parametrize("form", ["views", "towers"])
def test_the_gradient_of_one_learned_temperature_is_that_of_the_tables(form):
    """With a state behind it too, where the estimator's is not the derivative of its value."""
    a, b, index = batch(dtype=torch.float64)
    t = torch.full((1,), 0.1, dtype=torch.float64, requires_grad=True)
    one, dense = made(form)
    one.temperature = nn.Parameter(t.detach())
    dense.tables, dense.lr, dense.beta, dense.clip = 1, 1.0, 1.0, float("inf")
    for _ in range(3):
        dense.tau.fill_(0.1)
        dense.bounds = (-100, 100)
        value = one.double()(a, b, index)
        dense.step(a, b, index)
    (got,) = torch.autograd.grad(value, one.temperature)
    torch.testing.assert_close(got.sum(), dense.average[0, index].mean(), rtol=1e-6, atol=0)


def test_a_training_is_compiled_whole():
    """With tables that are looked up and stepped."""
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        loss, _ = made("towers with two tables")
        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        for step in range(2):  # of which the second has other tensors, for which nothing may be compiled anew
            a, b, index = batch()
            with torch.compiler.set_stance("fail_on_recompile") if compiled and step else nullcontext():
                value = run(a, b, index)
        ends.append([value, *torch.autograd.grad(value, (a, b)), *loss.state_dict().values()])
    for eager, compiled in zip(*ends, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert (loss.log_u > -torch.inf).any()


def test_evaluation_and_a_bad_batch_leave_the_state_as_it_is():
    loss, _ = made("towers with two tables")
    a, b, index = batch()
    loss(a, b, index)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(a, b, index.flip(0))
    bad = a.detach().clone()
    bad[2] = torch.nan
    assert loss.train()(bad, b, index).isnan()
    # all keys see the bad query; the state is that of before, or finite
    for name, x in loss.state_dict().items():
        seen = x[..., index]
        assert seen.isfinite().all(), name
        assert torch.equal(seen[..., 2], before[name][..., index][..., 2]), name


def test_a_sample_that_is_twice_in_a_batch_has_its_last_row():
    loss, _ = made("towers with a table")
    a, b, index = batch()
    index[5] = index[1]
    loss(a, b, index)
    rows = GlobalContrastiveLoss(SAMPLES, rho=0.4, negatives="keys")
    rows(a, b, torch.arange(7))
    torch.testing.assert_close(loss.log_u[:, index[1]], rows.log_u[:, 5])


def test_a_batch_of_one_has_no_negatives_and_is_not_seen():
    for negatives in ("views", "keys"):
        loss = GlobalContrastiveLoss(SAMPLES, negatives=negatives)
        a, b, index = batch(1)
        value = loss(a, b, index)
        assert value.item() == 0
        assert not any(x.any() for x in torch.autograd.grad(value, (a, b)))
        assert (loss.log_u == -torch.inf).all()


def test_a_training_goes_on_from_a_saved_state():
    torch.manual_seed(0)
    first, _ = made("towers with two tables")
    for _ in range(3):
        first(*batch())
    second, _ = made("towers with two tables")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert {"log_u", "temperature.values", "temperature.gradient", "key_temperature.values"} <= set(first.state_dict())
    last = batch()
    assert torch.equal(second(*last), first(*last))
    assert all(torch.equal(x, first.state_dict()[name]) for name, x in second.state_dict().items())
    first.reset_parameters()
    assert (first.log_u == -torch.inf).all()


def over_ranks(losses, parts, order):
    """Return each rank's value and gradients, of its own loss, rows and samples."""

    def work(communicator):
        (a, b, _), loss = parts[communicator.rank], losses[communicator.rank]
        loss.distributed = Distributed(communicator)
        value = loss(a, b, order[communicator.rank])
        return value.detach(), *torch.autograd.grad(value.sum(), (a, b))

    return succeeded(Loopback(len(losses), 20).run(work))


@pytest.mark.parametrize("form", ["views with a table", "towers with a table", "towers with two tables"])
@pytest.mark.parametrize("counts", [[3, 2, 4], [5, 0, 1]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ranks_have_the_loss_the_gradients_and_the_state_of_one_process(form, counts, reduction):
    views = form.startswith("views")
    alone, _ = made(form, reduction=reduction)
    each = [made(form, reduction=reduction)[0] for _ in counts]
    for _ in range(2):
        parts = [batch(n, dtype=torch.float64) for n in counts]
        order = torch.randperm(SAMPLES)[: sum(counts)].split(counts)

        found = over_ranks(each, parts, order)
        a, b = (torch.cat([part[i].detach() for part in parts]).requires_grad_() for i in (0, 1))
        want = alone(a, b, torch.cat(order))
        for place, x in enumerate(torch.autograd.grad(want.sum(), (a, b))):
            got = torch.cat([rank[1 + place] for rank in found]) / len(counts)
            torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-12)
        if reduction == "mean":
            assert all(torch.equal(rank[0], found[0][0]) for rank in found)
            torch.testing.assert_close(found[0][0], want.detach(), rtol=1e-10, atol=0)
        else:
            rows = [rank[0].view(1 + views, -1) for rank in found]
            torch.testing.assert_close(torch.cat(rows, 1).flatten(), want.detach(), rtol=1e-10, atol=1e-12)
        for loss in each:
            for name, x in loss.state_dict().items():
                torch.testing.assert_close(x, alone.state_dict()[name], rtol=1e-6, atol=1e-7)
                assert torch.equal(x, each[0].state_dict()[name])


@pytest.mark.parametrize("change", [lambda loss: loss.eval(), lambda loss: setattr(loss, "gamma", 0.9)])
def test_ranks_that_differ_are_an_error_on_all(change):
    """And none waits for the estimates of one that does not share them."""
    each = [made("towers")[0] for _ in range(2)]
    change(each[1])

    def work(communicator):
        loss = each[communicator.rank]
        loss.distributed = Distributed(communicator)
        loss(*batch())

    for found in Loopback(2, 20).run(work):
        assert isinstance(found, ValueError)
        assert "the ranks' calls differ" in str(found)
    assert all((loss.log_u == -torch.inf).all() for loss in each)


A = torch.randn(4, D)
MADE = {"samples": SAMPLES}


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be 1 or more, got 0"),
        ({"gamma": 0}, ValueError, "gamma must be more than 0"),
        ({"gamma": 1.1}, ValueError, r"gamma must be in \[0, 1\], got 1.1"),
        ({"rho": -1}, ValueError, "rho must not be negative"),
        ({"negatives": "both"}, ValueError, "negatives must be one of 'views', 'keys', got 'both'"),
        ({"key_temperature": 0.1}, TypeError, "key_temperature must be an IndividualTemperature, got float"),
        ({"key_temperature": IndividualTemperature(3)}, ValueError, "it needs negatives='keys'"),
    ],
)
def test_a_bad_option_is_refused(bad, kind, message):
    with pytest.raises(kind, match=message):
        GlobalContrastiveLoss(**MADE | bad)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.arange(3), "index must have 4 rows as query has, got 3"),
        (torch.tensor([0, 1, 2, SAMPLES]), rf"index must be in \[0, {SAMPLES}\), got {SAMPLES}"),
    ],
)
def test_a_bad_index_is_refused_and_leaves_the_state(index, message):
    for negatives in ("views", "keys"):
        loss = GlobalContrastiveLoss(SAMPLES, negatives=negatives)
        with pytest.raises(ValueError, match=message):
            loss(A, A, index)
        assert (loss.log_u == -torch.inf).all()


def test_embeddings_that_are_elsewhere_than_the_state_are_refused():
    with pytest.raises(ValueError, match="query must be on cpu as the state of the loss is, got cuda"):
        GlobalContrastiveLoss(SAMPLES)(elsewhere(4, D), elsewhere(4, D), torch.arange(4))


def test_prefixes_of_embeddings_have_estimates_of_their_own():
    with pytest.raises(TypeError, match="GlobalContrastiveLoss"):
        MatryoshkaLoss(GlobalContrastiveLoss(SAMPLES), [D])
