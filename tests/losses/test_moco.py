"""MoCo's loss and its queue against dense code and a queue written a column at a time."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from oracles import moco as dense
from support.helpers import DEVICE, both_backends, cases, elsewhere, error, interpreted, watch_plans
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_infonce import MoCoLoss, moco_loss

N, D, K = 5, 4, 12


def make(backend="auto", size=K, **options) -> MoCoLoss:
    return MoCoLoss(D, queue_size=size, backend=backend, **options).double().to(DEVICE.get(backend, "cpu"))


def batch(n: int = N, device="cpu", dtype=torch.float64):
    return [torch.randn(n, D, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]


@cases(
    pairs=True,
    normalize=[True, False],
    reduction=["mean", "sum", "none"],
    temperature=["float", "scalar", "per row"],
    name=["default", "blocks"],
)
def test_gradients_are_those_of_finite_differences_and_of_dense_code(
    backend, normalize, reduction, temperature, name, monkeypatch
):
    if name == "blocks":
        watch_plans(monkeypatch, name="streaming" if backend == "triton" else "workspace", rows=2, cols=3)
    loss = make(backend, normalize=normalize, reduction=reduction, temperature=0.4)
    query, key = batch(device=DEVICE[backend])
    inputs = [query]
    if temperature != "float":
        shape = (N,) if temperature == "per row" else ()
        inputs.append((0.3 + 0.3 * torch.rand(shape, dtype=torch.float64, device=query.device)).requires_grad_())

    def fused(query, t=0.4):
        loss.temperature = t
        return loss(query, key, enqueue=False)

    assert interpreted(backend) or torch.autograd.gradcheck(fused, inputs, fast_mode=True)
    got = fused(*inputs)
    want = dense.moco_loss(query, key, loss.queue, *(inputs[1:] or [0.4]), reduction=reduction, normalize=normalize)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    results = [torch.autograd.grad(x.sum(), [*inputs, key], allow_unused=True) for x in (got, want)]
    for ours, truth in zip(*results, strict=True):
        assert (ours is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)
    assert results[0][-1] is None  # the key's


@pytest.mark.parametrize("name", ["onepass", "workspace", "reference", "reference, raw"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_the_gradient_after_enqueue_is_that_of_the_queue_before(name, reduction, by_hand, monkeypatch):
    """loss, enqueue, backward: the gradient is that against the queue as it was."""
    if name == "workspace":
        watch_plans(monkeypatch, name="workspace")
    backend, _, raw = name.partition(", ")
    backend = backend if backend == "reference" else "torch"
    loss = make(backend, reduction=reduction, normalize=not raw)
    loss.temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    before = loss.queue.clone()
    query, key = batch()
    value = loss(query, key, enqueue=not by_hand)
    if by_hand:
        loss.enqueue(key)
    assert not torch.equal(loss.queue, before)
    got = torch.autograd.grad(value.sum(), (query, loss.temperature))
    want = dense.moco_loss(query, key, before, loss.temperature, reduction, normalize=not raw).sum()
    for ours, truth in zip(got, torch.autograd.grad(want, (query, loss.temperature)), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


class Operators(TorchDispatchMode):
    """The operators that run, with the number of elements of their first argument."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.name(), args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0))
        return func(*args, **(kwargs or {}))


def test_the_queue_is_copied_only_where_the_backward_needs_it():
    loss = make()
    query, key = batch()
    for reduction, copied in (("mean", False), ("none", True)):
        loss.reduction = reduction
        with Operators() as operators:
            loss(query, key, enqueue=False)
        assert (("aten::clone", loss.queue.numel()) in operators.seen) == copied
        with torch.no_grad(), Operators() as operators:
            loss(query, key, enqueue=False)
        assert ("aten::clone", loss.queue.numel()) not in operators.seen


@pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (12, 4, 12), (7, 13, 3), (30, 1, 24), (0, 3, 0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_enqueue_wraps_around(sizes, normalize):
    loss = make(normalize=normalize)
    want, pointer = loss.queue.clone(), 0
    storage = loss.queue.data_ptr()
    for size in sizes:
        keys = torch.randn(size, D, dtype=torch.float64, requires_grad=True)
        for row in keys.detach():
            want[:, pointer] = F.normalize(row, dim=0) if normalize else row
            pointer = (pointer + 1) % K
        loss.enqueue(keys)
        assert torch.equal(loss.queue_ptr, torch.tensor([pointer]))
        torch.testing.assert_close(loss.queue, want, rtol=1e-14, atol=0)
    assert loss.queue.data_ptr() == storage
    assert not loss.queue.requires_grad


def test_enqueue_reads_no_value_on_the_host():
    """Of a tensor without values that would be an error."""
    with FakeTensorMode():
        loss = MoCoLoss(D, queue_size=K)
        for size in (3, 0, K + 1):
            loss.enqueue(torch.randn(size, D))
        assert columns_are_contiguous(loss)
        with pytest.raises(DataDependentOutputException):
            loss.queue_ptr.item()


def test_no_column_is_written_twice(monkeypatch):
    """Which of two keys stays would be for a GPU's threads to decide."""
    written = []
    copied = torch.Tensor.index_copy_
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *x: (written.append(x[2]), copied(*x))[1])
    loss = make()
    for size in (7, 7, K, 2 * K + 5):
        loss.enqueue(torch.randn(size, D).double())
        assert written[-1].numel() == written[-1].unique().numel() == min(size, K)


def test_only_training_enqueues():
    query, key = batch()
    loss = make()
    before = loss.queue.clone()
    loss(query, key, enqueue=False)
    loss.eval()(query, key)
    assert torch.equal(loss.queue, before)
    loss.train()(query, key)
    assert not torch.equal(loss.queue, before)
    torch.testing.assert_close(loss.queue[:, :N].T, F.normalize(key.detach(), dim=1))
    assert torch.equal(loss.queue[:, N:], before[:, N:])
    assert loss.queue_ptr.item() == N


def test_the_loss_is_of_the_queue_before_the_batch():
    query, key = batch()
    loss = make()
    want = dense.moco_loss(query, key, loss.queue.clone(), 0.07)
    torch.testing.assert_close(loss(query, key), want, rtol=1e-12, atol=0)


def columns_are_contiguous(loss: MoCoLoss) -> bool:
    return tuple(loss.queue.shape) == (D, K) and loss.queue.T.is_contiguous()


def test_columns_stay_contiguous_through_copies_and_checkpoints():
    loss = make()
    loss.enqueue(torch.randn(N, D).double())
    assert columns_are_contiguous(loss)
    assert list(loss.state_dict()) == ["queue", "queue_ptr"]
    torch.testing.assert_close(loss.queue.norm(dim=0), torch.ones(K).double())
    assert columns_are_contiguous(copy.deepcopy(loss))
    assert columns_are_contiguous(copy.deepcopy(loss).to(torch.bfloat16))
    assert columns_are_contiguous(copy.deepcopy(loss).to("meta"))
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    for state in (saved, {name: x.contiguous() for name, x in saved.items()}):  # MoCo's own has contiguous rows
        for assign in (False, True):
            other = make()
            other.load_state_dict(copy.deepcopy(state), assign=assign)
            assert columns_are_contiguous(other)
            assert torch.equal(other.queue, loss.queue)
            assert torch.equal(other.queue_ptr, loss.queue_ptr)
            other.enqueue(torch.randn(3, D).double())
            assert other.queue_ptr.item() == N + 3
    assert loss.queue_ptr.item() == N
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(size=K + 1).load_state_dict(saved)


def test_the_pointer_stays_an_integer_and_training_goes_on_after_half():
    loss = make().half().float()
    assert loss.queue_ptr.dtype == torch.int64
    loss.enqueue(torch.full((2, D), 6e4, dtype=torch.float16))  # a norm beyond float16
    torch.testing.assert_close(loss.queue[:, :2], torch.full((D, 2), 0.5))


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_keep_the_bounds_of_infonce(backend, dtype):
    device = DEVICE[backend]
    loss = MoCoLoss(D, queue_size=40, backend=backend).to(device, dtype)
    query, key = batch(9, device, dtype)
    with torch.no_grad():
        key += query
    exact = [x.detach().cpu().double().requires_grad_() for x in (query, key)]
    want = dense.moco_loss(*exact, loss.queue.cpu().double(), 0.07)
    value = loss(query, key)
    value.backward()
    want.backward()
    assert value.dtype == torch.float32
    assert error(value, want) <= 1e-5
    assert error(query.grad, exact[0].grad) <= (1e-5 if dtype == torch.float32 else 5e-3)


def test_autocast_takes_a_16_bit_batch_and_a_float32_queue():
    loss = MoCoLoss(D, queue_size=K)
    query, key = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(query.bfloat16(), key.bfloat16())
    value.backward()
    assert value.dtype == torch.float32
    assert query.grad is not None


def test_a_training_loop_learns():
    torch.manual_seed(0)
    loss = MoCoLoss(8, queue_size=64, temperature=0.2)
    encoder, data = torch.nn.Linear(8, 8), torch.randn(48, 8)
    momentum = copy.deepcopy(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    values = []
    for step in range(40):
        x = data[(torch.arange(20) + 20 * step) % 48]
        with torch.no_grad():
            for slow, fast in zip(momentum.parameters(), encoder.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
            key = momentum(x + 0.05 * torch.randn_like(x))
        value = loss(encoder(x), key)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-5:]) < sum(values[5:10])
    assert loss.queue_ptr.item() == 40 * 20 % 64


ROWS = torch.ones(N, D)
BAD = {
    "an array": ({"query": [1.0]}, TypeError, "query must be a tensor"),
    "no key": ({"key": None}, TypeError, "key must be a tensor"),
    "a vector": ({"key": torch.ones(D)}, ValueError, "key must have 2 dimensions"),
    "fewer keys": ({"key": ROWS[1:]}, ValueError, r"key must have shape \(5, 4\)"),
    "integers": ({"key": ROWS.long()}, TypeError, "key must be float16"),
    "mixed dtypes": ({"key": ROWS.double()}, TypeError, "key must be torch.float32"),
    "another dtype than the queue": (
        {"query": ROWS.double(), "key": ROWS.double()}, TypeError, "queue must be torch.float64",
    ),
    "mixed devices": ({"key": elsewhere(*ROWS.shape)}, ValueError, "key must be on cpu"),
    "components": ({"query": torch.ones(N, 3), "key": torch.ones(N, 3)}, ValueError, "queue must have 3 rows"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_batch_is_refused_and_not_enqueued(what):
    replaced, kind, message = BAD[what]
    loss = MoCoLoss(D, queue_size=K)
    before = loss.queue.clone()
    with pytest.raises(kind, match=message):
        loss(**({"query": ROWS, "key": ROWS} | replaced))
    assert torch.equal(loss.queue, before)
    assert loss.queue_ptr.item() == 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be 1 or more"),
        ({"dim": 2.0}, TypeError, "dim must be an integer"),
        ({"queue_size": 0}, ValueError, "queue_size must be 1 or more"),
        ({"queue_size": None}, TypeError, "queue_size must be an integer"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": None}, TypeError, "temperature must be a number"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"workspace_limit": 0}, ValueError, "workspace_limit must be a number of bytes"),
    ],
)
def test_a_bad_option_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        MoCoLoss(**({"dim": D} | options))
    if not options.keys() & {"dim", "queue_size"}:
        with pytest.raises(kind, match=message):
            moco_loss(ROWS, ROWS.clone().requires_grad_(), torch.ones(D, K), **options)


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        (None, TypeError, "key must be a tensor"),
        (torch.ones(D), ValueError, "key must have 2 dimensions"),
        (torch.ones(N, D + 1), ValueError, "key must have 4 components"),
        (elsewhere(N, D), ValueError, "key must be on cpu"),
        (torch.ones(N, D).long(), TypeError, "key must be float16"),
    ],
)
def test_bad_keys_are_not_enqueued(key, kind, message):
    with pytest.raises(kind, match=message):
        MoCoLoss(D, queue_size=K).enqueue(key)
