"""The towers of `cached`: frozen ones, shared ones, and models that are methods, functions, partials or compiled."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from support.encoders import (
    WIDTH,
    Encoder,
    Outputs,
    assert_gradients,
    by_hand,
    gradients,
    pair,
    parameters_of,
    softmax_loss,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_infonce import cached


def test_a_frozen_tower_runs_once_and_gets_no_gradient():
    towers, _ = pair()
    towers[1][0].requires_grad_(False)
    towers[1] = (Outputs(towers[1][0]), towers[1][1])
    parameters = parameters_of(towers[0][0])
    wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters)
    towers[1][0].found.clear()
    needed = []

    def criterion(query, key):
        needed.append((query.requires_grad, key.requires_grad))
        return softmax_loss(query, key)

    torch.manual_seed(1)
    cached(criterion, *towers).backward()
    assert_gradients(parameters, wanted)
    assert needed == [(True, False)]
    assert len(towers[1][0].found) == 3


@pytest.mark.parametrize("of", [list, nn.ParameterList])
def test_a_prompt_in_a_partial_of_a_frozen_model_gets_gradients(of):
    prompt = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    class Prompted(Encoder):
        def forward(self, rows, prompt):
            return super().forward(rows + prompt[0])

    model = partial(Prompted().requires_grad_(False), prompt=of([prompt]))
    towers = [(model, rows) for _, rows in pair()[0]]
    wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), [prompt])
    torch.manual_seed(1)
    cached(softmax_loss, *towers).backward()
    assert_gradients([prompt], wanted)


def test_a_function_of_a_frozen_model_may_be_a_tower():
    towers, parameters = pair()
    (first, a), (second, b) = towers
    second.requires_grad_(False)
    wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters[:4])
    torch.manual_seed(1)
    cached(softmax_loss, (first, a), (lambda x: second(x), b)).backward()
    assert_gradients(parameters[:4], wanted)


@pytest.mark.parametrize("frozen", [False, True])
def test_without_a_graph_there_is_no_second_pass(frozen):
    towers, _ = pair()
    for model, _ in towers:
        model.requires_grad_(not frozen)
    torch.manual_seed(1)
    with nullcontext() if frozen else torch.no_grad():
        value = cached(softmax_loss, *towers)
    assert not value.requires_grad
    torch.testing.assert_close(value, by_hand(softmax_loss, *towers, chunk_size=64).detach(), rtol=1e-14, atol=0)


def test_a_shared_tower_gets_the_gradients_of_both_batches():
    (tower, (_, rows)), _ = pair()
    towers = [tower, (tower[0], rows)]
    parameters = parameters_of(tower[0])
    wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters)
    torch.manual_seed(1)
    cached(softmax_loss, *towers).backward()
    assert_gradients(parameters, wanted)


def test_models_given_as_methods_partials_and_compiled():
    """A method counts as its module; a compiled model draws and computes as it does without."""
    towers, parameters = pair()
    wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters)
    (first, a), (second, b) = towers
    compiled = torch.compile(second, backend="eager", dynamic=True)
    torch.manual_seed(1)
    cached(softmax_loss, (first.forward, a), (compiled, b)).backward()
    assert_gradients(parameters, wanted)
    first.requires_grad_(False)
    for model in (first.forward, partial(first.forward)):
        assert not cached(lambda x: x.sum(), (model, a)).requires_grad


def test_activation_checkpoints_inside_a_model_nest():
    towers, parameters = pair()
    wanted = gradients(by_hand(softmax_loss, *towers, chunk_size=64), parameters)
    for reentrant in (True, False):
        for x in parameters:
            x.grad = None

        def model(rows, encoder, reentrant=reentrant):
            return checkpoint(encoder, rows.requires_grad_(), use_reentrant=reentrant)

        torch.manual_seed(1)
        given = [(lambda x, encoder=encoder: model(x, encoder), rows) for encoder, rows in towers]
        cached(softmax_loss, *given).backward()
        assert_gradients(parameters, wanted)
