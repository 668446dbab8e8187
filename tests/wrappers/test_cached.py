"""`cached` against the step without it, over the same chunks and with the same random numbers."""

from __future__ import annotations

import copy
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from support.encoders import (
    D,
    Images,
    Outputs,
    assert_gradients,
    by_hand,
    gradients,
    pair,
    parameters_of,
    softmax_loss,
)  # fmt: skip
from support.memory import PeakMemory
from torch import Tensor, nn

from fused_infonce import ClipLoss, FusedInfoNCELoss, MatryoshkaLoss, cached

N = 150


@dataclass(frozen=True)
class Frozen:
    pixels: Tensor


@pytest.mark.parametrize("chunk_size", [1, 64, 150, 1000, [32, 100]], ids=str)
def test_gradients_are_those_of_the_step_by_hand(chunk_size):
    towers, parameters = pair()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    value = cached(softmax_loss, *towers, chunk_size=chunk_size, scale=7.0)
    after = torch.get_rng_state()
    value.backward()
    assert torch.equal(after, torch.get_rng_state())  # the replay leaves no trace
    assert not torch.equal(after, state)

    torch.manual_seed(1)
    sizes = chunk_size if isinstance(chunk_size, list) else [chunk_size] * 2
    embeddings = [
        torch.cat([model(part) for part in rows.split(size)]) for (model, rows), size in zip(towers, sizes, strict=True)
    ]
    wanted = softmax_loss(*embeddings, scale=7.0)
    torch.testing.assert_close(value, wanted, rtol=1e-14, atol=0)
    assert_gradients(parameters, gradients(wanted, parameters))


@pytest.mark.parametrize(
    ("make", "bound"),
    [
        (lambda: FusedInfoNCELoss(0.1, learnable_temperature=True, symmetric=True), 1e-6),
        (lambda: MatryoshkaLoss(FusedInfoNCELoss(0.1), dims=[D, 2]), 1e-6),
    ],
    ids=["learnable", "matryoshka"],
)
def test_this_packages_losses_in_float32(make, bound):
    towers, parameters = pair(torch.float32)
    criterion = make()
    parameters += criterion.parameters()
    wanted = gradients(by_hand(criterion, *towers, chunk_size=64), parameters)
    torch.manual_seed(1)
    cached(criterion, *towers).backward()
    assert_gradients(parameters, wanted, bound)


def test_generators_are_restored_by_a_fork_rng_that_wants_a_name(monkeypatch):
    """As that of torch 2.9, also where no accelerator is in use."""
    fork = torch.random.fork_rng
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices, device_type: fork(devices, device_type=torch.device(device_type).type)
    )
    cached(softmax_loss, *pair()[0]).backward()


def test_tensors_among_the_arguments_of_the_criterion_get_gradients():
    towers, parameters = pair()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    parameters.append(scale)
    wanted = gradients(by_hand(ClipLoss(normalize=True), *towers, chunk_size=64, logit_scale=scale.exp()), parameters)
    torch.manual_seed(1)
    cached(ClipLoss(normalize=True), *towers, logit_scale=scale.exp()).backward()
    assert_gradients(parameters, wanted, 1e-10)  # the scale's own gradient is float32


INPUTS = {
    "dictionary": (lambda x: {"rows": x}, None),
    "UserDict": (lambda x: UserDict(rows=x), None),
    "tuple": (lambda x: (x,), None),
    "list": (lambda x: [x], None),
    "dataclass": (lambda x: Images(x, "png"), lambda model: lambda images: model(images.pixels)),
    "frozen dataclass": (lambda x: Frozen(x), lambda model: lambda images: model(images.pixels)),
    "features": (
        lambda x: ({"deep": [x, torch.ones(3)], "one": torch.tensor(1.0), "who": "me"},),
        lambda model: lambda features: model(features["deep"][0]) * features["deep"][1].mean() * features["one"],
    ),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(kind):
    """Whatever they come in, tensors of N rows are split and everything else is passed whole."""
    of, around = INPUTS[kind]
    towers, parameters = pair()
    wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters)
    torch.manual_seed(1)
    given = [(model if around is None else around(model), of(rows)) for model, rows in towers]
    cached(softmax_loss, *given).backward()
    assert_gradients(parameters, wanted)


def test_rows_are_those_of_the_mask_or_of_the_first_tensor():
    """A tensor that all rows share, given first, is not taken for the one row of a chunk without end."""
    towers, _ = pair(n=10)
    widest = []

    def model_of(model):
        def encode(position, rows, attention_mask=None):
            widest.append(len(rows))
            return model(rows) + position.sum()

        return encode

    def given(**more):
        return [(model_of(m), {"position": torch.ones(1, 3, dtype=x.dtype), "rows": x, **more}) for m, x in towers]

    cached(softmax_loss, *given(attention_mask=torch.ones(10, 3)), chunk_size=2, check=False)
    assert max(widest) == 2
    with pytest.raises(ValueError, match="must begin with a tensor that has all rows"):
        cached(softmax_loss, *given(), chunk_size=2)


@pytest.mark.parametrize(
    ("output", "pick"),
    [
        (lambda x: {"a": 0, "embedding": x}, "embedding"),
        (lambda x: Images(x, "png"), "pixels"),
        (lambda x: (None, x), 1),
        (lambda x: x, "pixels"),  # a tensor is the embedding
        (lambda x: torch.stack([x, x], 1), lambda output: output[:, 0]),
    ],
    ids=["key", "attribute", "index", "tensor", "function"],
)
def test_pick(output, pick):
    towers, parameters = pair()
    wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters)
    torch.manual_seed(1)
    given = [(lambda x, model=model: output(model(x)), rows) for model, rows in towers]
    cached(softmax_loss, *given, pick=pick).backward()
    assert_gradients(parameters, wanted)


@pytest.mark.parametrize("around", [False, True], ids=["backward after", "backward inside"])
def test_the_replay_under_autocast_is_bitwise_equal(around):
    towers, parameters = pair(torch.float32)
    towers = [(Outputs(model), rows) for model, rows in towers]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        value = cached(softmax_loss, *towers)
        if around:
            value.backward()
    if not around:
        value.backward()
    for model, _ in towers:
        first, again = model.found[:3], model.found[3:]
        assert len(again) == 3
        assert all(x.dtype == torch.bfloat16 and torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(x.grad is not None for x in parameters)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters)
    assert_gradients(parameters, wanted, 1e-2)


def test_casts_of_weights_without_a_graph_are_not_used_again():
    """Autocast keeps them while it is on, those of the first pass and of a validation before the backward.

    PyTorch sees to it by itself since https://github.com/pytorch/pytorch/pull/165068, which torch 2.9 does not have.
    """
    (tower, _), _ = pair(torch.float32)
    model, rows = tower
    model.dropout = 0.0
    parameters = parameters_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        value = cached(lambda x: x.square().sum(), tower) + model(rows[:3]).square().sum()
        torch.clear_autocast_cache()
        with torch.no_grad():
            model(rows)
        value.backward()
        torch.clear_autocast_cache()
        wanted = model(rows).square().sum() + model(rows[:3]).square().sum()
    assert_gradients(parameters, gradients(wanted, parameters), 1e-2)


def test_a_gradient_scaler_multiplies():
    towers, parameters = pair()
    wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [x.detach().clone() for x in parameters]
    torch.manual_seed(1)
    scaler.scale(cached(softmax_loss, *towers)).backward()
    assert_gradients(parameters, [2.0**10 * x for x in wanted])
    scaler.step(optimizer)
    for x, was, w in zip(parameters, before, wanted, strict=True):
        torch.testing.assert_close(x.detach(), was - 0.1 * w, rtol=1e-12, atol=1e-14)


def test_two_forwards_before_one_backward_and_accumulation():
    towers, parameters = pair()
    wanted = [3 * x for x in gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters)]
    values = []
    for _ in range(2):
        torch.manual_seed(1)
        values.append(cached(softmax_loss, *towers))
    sum(values).backward()
    torch.manual_seed(1)
    cached(softmax_loss, *towers).backward()  # adds to what is there
    assert_gradients(parameters, wanted)


def test_what_else_the_criterion_returns_passes_through():
    towers, parameters = pair()
    value, (embeddings, note) = cached(lambda q, k: (softmax_loss(q, k), ((q, k), "note")), *towers)
    assert note == "note"
    assert [tuple(x.shape) for x in embeddings] == [(N, D)] * 2
    (value + embeddings[0].square().sum()).backward()
    assert all(x.grad.any() for x in parameters)


def test_a_tower_that_the_loss_does_not_use_is_not_replayed():
    towers, _ = pair()
    towers[1] = (Outputs(towers[1][0]), towers[1][1])
    cached(lambda q, k: q.sum(), *towers).backward()
    assert len(towers[1][0].found) == 3
    assert all(x.grad is None for x in towers[1][0].parameters())


def test_other_numbers_of_rows_and_none():
    towers, parameters = pair()
    few = [(model, rows[: 10 * i]) for i, (model, rows) in enumerate(towers)]
    shapes = []

    def criterion(query, key):
        shapes.append((tuple(query.shape), tuple(key.shape)))
        return query.sum() + key.sum()

    cached(criterion, *few).backward()
    assert shapes == [((0, D), (10, D))]
    assert not parameters[0].grad.any()
    assert parameters[-1].grad.any()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_one_backward_and_once_differentiable():
    towers, parameters = pair()
    value = cached(softmax_loss, *towers)
    value.backward(retain_graph=True)
    done = [x.grad.clone() for x in parameters]
    with pytest.raises(RuntimeError, match="has had its backward"):
        value.backward()
    with pytest.raises(RuntimeError, match="create_graph"):
        cached(softmax_loss, *towers).backward(create_graph=True)
    assert all(torch.equal(x.grad, y) for x, y in zip(parameters, done, strict=True))


def test_gradients_of_the_temperature_alone_replay_nothing():
    towers, parameters = pair()
    loss = FusedInfoNCELoss(0.1, learnable_temperature=True)
    (gradient,) = torch.autograd.grad(cached(loss, *towers), loss.logit_scale)
    assert gradient.any()
    assert all(x.grad is None for x in parameters)


class Wide(nn.Module):
    """A model that returns hidden states 64 times as large as its embeddings, and writes them into its input too."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, features):
        hidden = self.down(torch.relu(self.up(features["rows"])))
        features["hidden"] = hidden
        return {"hidden": hidden}


def test_the_memory_of_the_encoder_is_that_of_a_chunk():
    n, length, rows = 512, 64, 16
    model = Wide()
    inputs = ({"rows": torch.randn(n, length, 8)},)
    parameters = sum(x.nbytes for x in model.parameters())

    def step(n, chunk_size):
        for x in model.parameters():
            x.grad = None
        given = ({"rows": inputs[0]["rows"][:n]},)
        with PeakMemory() as memory:
            cached(lambda x: x.square().mean(), (model, given), chunk_size=chunk_size, pick=first).backward()
        return memory.peak

    def first(output):
        return output["hidden"][:, 0]

    chunk, whole = step(rows, rows), step(n, n)
    assert whole > 16 * chunk
    embeddings = n * 8 * 4
    assert step(n, rows) <= chunk + 2 * parameters + 6 * embeddings + n // rows * 5100  # a random state a chunk


def test_progress(capsys):
    towers, _ = pair()
    cached(softmax_loss, *towers, progress="step 3").backward()
    said = capsys.readouterr().err
    assert "step 3: embeddings" in said
    assert "step 3: gradients" in said
    assert "6/6" in said
    cached(softmax_loss, *towers, progress=False).backward()
    assert not capsys.readouterr().err


def test_training_goes_the_same_way_as_by_hand():
    towers, parameters = pair()
    twins = copy.deepcopy(towers)
    theirs = parameters_of(*(model for model, _ in twins))
    optimizers = [torch.optim.AdamW(x, lr=0.01) for x in (parameters, theirs)]
    for step in range(4):
        torch.manual_seed(step)
        ours = cached(softmax_loss, *towers, chunk_size=40)
        hand = by_hand(softmax_loss, *twins, chunk_size=40, seed=step)
        for value, optimizer in zip((ours, hand), optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for x, y in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
