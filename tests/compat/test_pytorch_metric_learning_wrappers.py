"""NTXentLoss and SupConLoss in pytorch-metric-learning's wrappers, where they are the originals, and in a training."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.helpers import INTERPRETED, error
from support.libraries import library
from support.memory import MIB, PeakMemory
from support.processes import in_two_processes
from support.side_by_side import refuse_fallback

library("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners  # noqa: E402
from pytorch_metric_learning.utils import distributed  # noqa: E402

from fused_infonce.compat import common  # noqa: E402
from fused_infonce.compat import pytorch_metric_learning as fused  # noqa: E402

both_losses = pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])


@pytest.fixture(autouse=True)
def says_again():
    common.say_once.cache_clear()


@pytest.fixture
def only_fused(monkeypatch):
    """No loss of ours runs the original's computation, and no memory of ours makes its pairs."""
    make = losses.CrossBatchMemory.create_indices_tuple

    def create_indices_tuple(self, *args):
        assert type(self) is losses.CrossBatchMemory, "pairs were made"
        return make(self, *args)

    refuse_fallback(monkeypatch, fused)
    monkeypatch.setattr(losses.CrossBatchMemory, "create_indices_tuple", create_indices_tuple)


def both(f, *inputs):
    """(value, gradients) of f of ours and of the original, checked to agree."""
    results = []
    for source in (fused, losses):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = f(source, *leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, theirs) <= 1e-5
    return results[0]


@both_losses
def test_they_are_the_originals(name):
    loss, theirs = getattr(fused, name)(), getattr(losses, name)()
    assert isinstance(loss, getattr(losses, name))
    assert type(loss).__name__ == name
    assert loss.temperature == theirs.temperature
    assert type(loss.reducer) is type(theirs.reducer)
    assert type(loss.distance) is type(theirs.distance)
    assert loss._record_these == theirs._record_these
    assert loss.sub_loss_names() == theirs.sub_loss_names()
    assert isinstance(fused.CrossBatchMemory(loss, 4), losses.CrossBatchMemory)
    copied = copy.deepcopy(loss)
    x, labels = torch.randn(6, 4), torch.arange(6) % 3
    assert torch.equal(copied(x, labels), loss(x, labels))


@both_losses
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_self_supervised_wrapper_gives_what_the_original_gives(name, symmetric, only_fused):
    both(
        lambda source, x, y: losses.SelfSupervisedLoss(getattr(source, name)(0.2), symmetric=symmetric)(x, y),
        torch.randn(24, 16), torch.randn(24, 16),
    )  # fmt: skip


def memories(name, size, **options):
    """The original of the original's loss, that of ours, and ours of ours."""
    return [
        memory.CrossBatchMemory(getattr(source, name)(0.2), 8, memory_size=size, **options)
        for memory, source in ((losses, losses), (losses, fused), (fused, fused))
    ]


def steps(memories, batches, calls):
    for batch in batches:
        x, labels = torch.randn(batch, 8), torch.randint(5, (batch,))
        results = []
        for memory in memories:
            leaf = x.clone().requires_grad_()
            value = calls(memory, leaf, labels)
            results.append([value, *torch.autograd.grad(value, leaf, materialize_grads=True)])
        for ours in results[1:]:
            for a, b in zip(ours, results[0], strict=True):
                assert error(a, b) <= 1e-5
        for memory in memories[1:]:
            assert torch.equal(memory.embedding_memory, memories[0].embedding_memory)
            assert torch.equal(memory.label_memory, memories[0].label_memory)


@both_losses
@pytest.mark.parametrize("size", [20, 32])
def test_cross_batch_memory_gives_what_the_original_gives(name, size, only_fused):
    """Batches that fill it, run over its end, fill it at once and leave part of it as it is."""
    steps(memories(name, size), [12, 12, 12, 5, 20, 2, 12, 12], lambda memory, x, labels: memory(x, labels))


@both_losses
@pytest.mark.parametrize("labels", [torch.arange(12) % 4, torch.arange(12.0) % 4])
def test_one_backward_of_several_batches(name, labels, only_fused):
    """The memory is overwritten in between."""
    x, gradients = torch.randn(5, 12, 8), []
    for memory in memories(name, 20):
        memory.label_memory = memory.label_memory.to(labels.dtype)
        leaf = x.clone().requires_grad_()
        sum(memory(batch, labels.roll(i)) for i, batch in enumerate(leaf)).backward()
        gradients.append(leaf.grad)
    assert error(gradients[1], gradients[0]) <= 1e-5
    assert error(gradients[2], gradients[0]) <= 1e-5


@both_losses
def test_cross_batch_memory_with_a_mask(name, only_fused):
    mask = torch.arange(12) % 2 == 0
    steps(memories(name, 20), [12] * 5, lambda memory, x, labels: memory(x, labels, enqueue_mask=mask))


@both_losses
@pytest.mark.filterwarnings("ignore:.*runs the original's own code")
@pytest.mark.parametrize("how", ["one row", "a miner", "a tuple", "another distance"])
def test_cross_batch_memory_as_it_was(name, how):
    batches = [12, 1, 1, 12, 1] if how == "one row" else [12] if how == "a tuple" else [12] * 3
    options = {"miner": miners.MultiSimilarityMiner()} if how == "a miner" else {}
    some = memories(name, 20, **options)
    if how == "another distance":
        for memory in some:
            memory.loss.distance = distances.LpDistance()
    miner = miners.TripletMarginMiner(0.5)

    def call(memory, x, labels):
        return memory(x, labels, miner(x, labels)) if how == "a tuple" else memory(x, labels)

    steps(some, batches, call)


@both_losses
def test_another_loss_in_our_memory(name):
    x, labels = torch.randn(6, 8), torch.arange(6) % 3
    values = [memory.CrossBatchMemory(losses.ContrastiveLoss(), 8)(x, labels) for memory in (fused, losses)]
    assert torch.equal(*values)


@both_losses
def test_miners_and_distances_are_the_originals(name):
    labels = torch.arange(20) % 4
    miner = miners.MultiSimilarityMiner()

    class Other(distances.CosineSimilarity):
        pass

    for change in (
        {"distance": distances.LpDistance()}, {"distance": Other()}, {"distance": distances.CosineSimilarity(p=1)},
        {"distance": distances.CosineSimilarity(power=2)}, {"temperature": -0.5}, {"miner": miner},
    ):  # fmt: skip
        options = {key: x for key, x in change.items() if key != "miner"}
        common.say_once.cache_clear()

        def call(source, x, change=change, options=options):
            return getattr(source, name)(**options)(x, labels, miner(x, labels) if "miner" in change else None)

        with pytest.warns(UserWarning, match=f"{name} runs the original's own code here, with its memory"):
            both(call, torch.randn(20, 8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it says so once
            both(call, torch.randn(20, 8))


@both_losses
def test_subclasses_that_compute_the_loss_themselves(name):
    class Mine(getattr(fused, name)):
        def _compute_loss(self, *args):
            return self.zero_losses()

    x, labels = torch.randn(6, 4, requires_grad=True), torch.arange(6) % 3
    with pytest.warns(UserWarning, match="a subclass has a _compute_loss of its own"):
        assert Mine()(x, labels) == 0


@both_losses
def test_statistics_of_the_distance(name, only_fused):
    stats = []
    x, y = 3 * torch.randn(6, 4), torch.randn(5, 4)
    for source in (fused, losses):
        loss = getattr(source, name)(distance=distances.CosineSimilarity(collect_stats=True))
        loss(x, torch.arange(6) % 3, None, y, torch.arange(5) % 3)
        stats.append([getattr(loss.distance, key) for key in loss.distance._record_these_stats])
    assert stats[0] == pytest.approx(stats[1], rel=1e-6)
    assert all(stats[0])


def test_where_the_original_ends():
    """At 87.3, with no gradient, it cannot pull a pair together that is far apart. Its float64 goes on."""
    x, y = torch.tensor([[1.0, 0]]), torch.tensor([[-1, 0.1], [1, 0.1], [1, -0.2]])
    results = []
    for source, dtype in ((fused, torch.float32), (losses, torch.float32), (losses, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        loss = source.NTXentLoss(temperature=0.01)(leaf, torch.tensor([0]), None, y.to(dtype), torch.tensor([0, 1, 1]))
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    ours, theirs, exact = results
    assert exact[0] > 190
    assert error(ours[0], exact[0]) <= 5e-5
    assert error(ours[1], exact[1]) <= 5e-5
    assert theirs[0].item() == pytest.approx(87.34, abs=0.01)
    assert not theirs[1].any()


def test_16_bit_rows_without_positives():
    x, labels = torch.randn(6, 4, dtype=torch.float16), torch.tensor([0, 0, 1, 1, 2, 3])
    loss = fused.SupConLoss()
    for value in (loss(x.requires_grad_(), labels), loss(x.detach(), labels)):
        assert value.isfinite()
    assert torch.autograd.grad(loss(x, labels), x)[0].isfinite().all()


@both_losses
def test_double_backward_is_refused(name):
    x = torch.randn(8, 4, requires_grad=True)
    for labels in (torch.arange(8) % 2, torch.arange(8) % 4):  # one of them of pairs alone
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(getattr(fused, name)()(x, labels), x, create_graph=True)


@both_losses
@pytest.mark.parametrize("wrapped", [False, True])
def test_training_is_the_same(name, wrapped, only_fused):
    """A small network on clusters, from the same weights: the same curve, and clusters that are found."""
    torch.manual_seed(3)
    centres = torch.randn(6, 16)
    first = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    batches = [(labels, centres[labels] + 0.7 * torch.randn(32, 16)) for labels in torch.randint(6, (40, 32))]
    curves = []
    for source in (fused, losses):
        model, loss = copy.deepcopy(first), getattr(source, name)(0.2)
        loss = losses.CrossBatchMemory(loss, 8, 80) if wrapped else loss
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        curve = []
        for labels, x in batches:
            value = loss(model(x), labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=1e-4)
    assert curves[0][-5:].mean() < 0.8 * curves[0][:5].mean()


def gather(rank):
    torch.manual_seed(rank)
    for name in ("NTXentLoss", "SupConLoss"):
        for efficient in (False, True):  # where each process has the loss of its own rows alone

            def call(source, x, labels, name=name, efficient=efficient):
                loss = distributed.DistributedLossWrapper(getattr(source, name)(0.2), efficient=efficient)
                return loss(x, labels)

            labels = torch.randint(4, (9,))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing falls back
                both(lambda source, x, labels=labels, call=call: call(source, x, labels), torch.randn(9, 8))


def test_two_processes_give_what_the_original_gives(tmp_path):
    in_two_processes(gather, tmp_path)


@both_losses
@pytest.mark.skipif(not INTERPRETED, reason="measured where the torch backend runs by itself: in CPU runs")
def test_memory_of_512_embeddings_in_64_classes(name):
    """The original's NTXentLoss would need 14.6 GiB."""
    x, labels = torch.randn(512, 128, requires_grad=True), torch.arange(512) % 64
    with PeakMemory() as memory:
        getattr(fused, name)()(x, labels).backward()
    assert memory.peak <= 50 * MIB
    assert x.grad.any()


@both_losses
@pytest.mark.parametrize("ours", [True, False])
def test_cross_batch_memory_makes_no_pairs(name, ours):
    """Of 256 rows and 16384 keys: nothing of the size of even their bytes, where the original's pairs have 16 each."""
    n, m, d = 256, 16384, 16
    source = fused if ours else losses
    wrapper = source.CrossBatchMemory(getattr(fused, name)(), d, memory_size=m)
    wrapper.loss.workspace_limit = MIB
    wrapper.embedding_memory, wrapper.label_memory = torch.randn(m, d), torch.arange(m) % 500
    wrapper.has_been_filled = True
    x, labels = torch.randn(n, d, requires_grad=True), torch.arange(n) % 500
    with PeakMemory() as memory:
        wrapper(x, labels).backward()
    assert x.grad.any()
    assert (memory.largest <= n * m / 2) == ours
    assert (memory.peak <= 10 * MIB) == ours
