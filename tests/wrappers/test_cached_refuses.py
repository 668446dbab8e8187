"""What `cached` refuses: bad arguments, and replays that differ from the first pass."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.encoders import WIDTH, D, Encoder, Images, Outputs, pair, softmax_loss
from torch import nn

from fused_infonce import cached


def drift(tower):
    with torch.no_grad():
        tower[0].down.bias[0] += 1e-6


def other_dropout(rows):
    keep = torch.tensor([[random.random() > 0.1] for _ in range(len(rows))], dtype=rows.dtype)
    return rows * keep


def test_an_encoder_that_changes_between_the_passes_raises():
    towers, _ = pair()
    value = cached(softmax_loss, *towers)
    drift(towers[1])
    with pytest.raises(RuntimeError, match=r"tower 2, chunk 1 \(rows 0 to 63\).*differ by \d\.\de-0[67] of.*check=Fal"):
        value.backward()

    rows = towers[0][1].clone()
    value = cached(softmax_loss, (towers[0][0], rows), towers[1])
    rows[130] += 1  # an input that a loader writes over
    with pytest.raises(RuntimeError, match=r"tower 1, chunk 3 \(rows 128 to 149\)"):
        value.backward()

    model = nn.Sequential(towers[0][0])
    model.register_forward_pre_hook(lambda module, args: (other_dropout(args[0]),))
    with pytest.raises(RuntimeError, match=r"tower 1, chunk 1 .*generator that is not PyTorch's own"):
        cached(softmax_loss, (model, rows), towers[1]).backward()

    value = cached(softmax_loss, *towers, check=False)
    drift(towers[0])
    value.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_encoders_without_a_graph_raise(context):
    """As the backward does without caching, instead of training nothing."""
    towers = [(context()(model.forward), rows) for model, rows in pair()[0]]
    value = cached(softmax_loss, *towers)
    with pytest.raises(RuntimeError, match=r"no tower depend .* torch.no_grad\(\).* check=False"):
        value.backward()
    cached(softmax_loss, *towers, check=False).backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_finite_in_the_first_pass_alone_raise(value):
    model, factors = nn.Linear(WIDTH, D), [0.0, 1.0, 0.0, value]
    given = (lambda x: model(x) * factors.pop(0), torch.randn(6, WIDTH))
    with pytest.raises(RuntimeError, match=r"chunk 2 \(rows 3 to 5\).*differ by (nan|inf)"):
        cached(torch.sum, given, chunk_size=3).backward()


def test_a_shape_that_changes_between_the_passes_raises():
    model, lengths = nn.Linear(WIDTH, D), [4, 3]
    value = cached(torch.sum, (lambda x: model(x)[:, : lengths.pop(0)], torch.randn(5, WIDTH)))
    with pytest.raises(RuntimeError, match=r"rows 0 to 4.*\(5, 3\) and were \(5, 4\)"):
        value.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_does_not_raise(dtype):
    """The inference path of PyTorch's transformer layers rounds otherwise than their training path."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dtype=dtype)
    model = Outputs(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval())
    rows = torch.randn(24, 5, 32, dtype=dtype)
    cached(lambda x: x.float().square().sum(), (model, rows), pick=lambda x: x[:, 0], chunk_size=8).backward()
    assert next(model.parameters()).grad.any()
    first, again = (torch.cat(x).float() for x in (model.found[:3], model.found[3:]))
    assert (first - again).norm() > 0.5 * torch.finfo(dtype).eps * first.norm()  # else the test could not fail


def test_nan_embeddings_reach_the_loss():
    """As without caching; a gradient scaler may then skip the step."""
    towers, parameters = pair()
    towers[0][1][3] = float("nan")
    cached(softmax_loss, *towers).backward()
    assert parameters[0].grad.isnan().any()


MODEL, ROWS = Encoder(), torch.zeros(3, WIDTH, dtype=torch.float64)
ONE = ((MODEL, ROWS),)
REFUSED: dict[str, tuple[type[Exception], str, tuple, dict[str, Any]]] = {
    "no tower": (ValueError, "needs towers", (), {}),
    "no pair": (TypeError, r"tower 1 must be a pair .* got Tensor", (ROWS,), {}),
    "no model": (TypeError, r"tower 2 must be a pair", (*ONE, (ROWS, MODEL)), {}),
    "no rows": (ValueError, r"inputs of tower 1 must hold .* got dict of \{text: str\}", ((MODEL, {"text": "a"}),), {}),
    "gradients": (ValueError, r"of tower 1 must not require gradients", ((MODEL, ROWS.clone().requires_grad_()),), {}),
    "chunk size": (ValueError, "chunk_size must be 1 or more, got 0", ONE, {"chunk_size": 0}),
    "chunk type": (TypeError, "chunk_size must be an integer, got float", ONE, {"chunk_size": 2.0}),
    "chunk sizes": (ValueError, "chunk_size must be one for all towers, .* got 2", ONE, {"chunk_size": [1, 2]}),
    "pick": (TypeError, "pick must be a name, .* got float", ONE, {"pick": 0.5}),
    "tokens": (ValueError, r"attention_mask of shape \(3, L\) in the inputs of tower 1, got f", ONE, {"tokens": 8}),
    "few tokens": (ValueError, "tokens must be 1 or more, got 0", ONE, {"tokens": 0}),
    "sync": (ValueError, "sync must be one of 'mean', 'none', got 'sum'", ONE, {"sync": "sum"}),
    "check": (ValueError, "check must be one of", ONE, {"check": "yes"}),
    "progress": (TypeError, "progress must be True", ONE, {"progress": 3}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_arguments_are_refused_before_a_model_runs(what):
    error, said, towers, options = REFUSED[what]
    with pytest.raises(error, match=said):
        cached(pytest.fail, *towers, **options)


def test_a_criterion_must_be_callable():
    with pytest.raises(TypeError, match="criterion must be a loss or a function of embeddings, got tuple"):
        cached((MODEL, ROWS), (MODEL, ROWS))


STATE = r"got dict of \{state: float64 \(3, 6\)"
OUTPUTS: dict[str, tuple[Any, Any, str]] = {
    "no pick": (
        lambda x: {"state": x, "n": (1, x)},
        None,
        rf"tower 1: without pick.* {STATE}, n: tuple of \{{0: int",
    ),
    "no key": (lambda x: {"state": x}, "pooled", rf"tower 1 returned no 'pooled'.* {STATE}\}}"),
    "no attribute": (
        lambda x: Images(x, "a"),
        "pooled",
        r"no 'pooled'.* got Images of \{pixels: float64 \(3, 6\), ",
    ),
    "no index": (lambda x: (x,), 1, r"no 1,.* got tuple of \{0: float64 \(3, 6\)\}"),
    "no tensor": (lambda x: {"state": "x"}, "state", "what pick chooses must be a tensor of embeddings, got str"),
    "integers": (lambda x: x.long(), None, "embeddings must be floating"),
    "a number": (lambda x: x.sum(), None, r"embeddings must be floating, \(rows, ...\), got float64 \(\)"),
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_outputs_without_an_embedding_say_what_came(what):
    model, pick, said = OUTPUTS[what]
    with pytest.raises(TypeError, match=said):
        cached(pytest.fail, (model, ROWS), pick=pick)
