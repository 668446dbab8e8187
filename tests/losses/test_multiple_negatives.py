"""Multiple negatives ranking against dense code that holds every score of every direction."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracles import multiple_negatives as dense
from support.helpers import DEVICE, TRITON, both_backends, cases, elsewhere, interpreted
from support.ranking_calls import JOINT, KINDS, SOFTMAXES, D, N, arguments, call, run

from fused_infonce import MultipleNegativesLoss, contrast, multiple_negatives
from fused_infonce.backends import plan


@cases(
    pairs=True,
    softmax=SOFTMAXES,
    hardness=KINDS,
    hard=[0, 1, 2],
    normalize=[True, False],
    reduction=["mean", "sum", "none"],
    temperature=["float", "scalar", "per row"],
    spare=[0, 2],
    blocks=["one", "several"],
)
def test_gradients_are_those_of_finite_differences_and_of_dense_code(
    backend, softmax, hardness, hard, normalize, reduction, temperature, spare, blocks, monkeypatch
):
    device = DEVICE[backend]
    if blocks == "several":
        monkeypatch.setattr(plan, "DENSE", 0)
    inputs = call(hard=hard, spare=spare, device=device)
    partition, directions = softmax
    options = {
        "directions": directions, "partition": partition, "hardness": hardness, "normalize": normalize,
        "hardness_strength": 0.0 if hardness is None else 3.0 if normalize else 0.7, "reduction": reduction,
    }  # fmt: skip
    if temperature == "float":
        options["temperature"] = 0.4
    else:
        shape = (N,) if temperature == "per row" else ()
        inputs.append((0.3 + 0.3 * torch.rand(shape, dtype=torch.float64, device=device)).requires_grad_())
    limits = {"backend": backend, "workspace_limit": 200 if blocks == "several" else None}

    def fused(*tensors):
        return multiple_negatives(**arguments(tensors, spare, options), **limits)

    if hardness is None:  # with hardness only the temperature's gradient is that of the value
        assert interpreted(backend) or torch.autograd.gradcheck(fused, inputs, fast_mode=True)
    elif temperature != "float":
        fixed = [x.detach() for x in inputs[:-1]]
        assert interpreted(backend) or torch.autograd.gradcheck(lambda t: fused(*fixed, t), inputs[-1], fast_mode=True)
    got = run(lambda **given: multiple_negatives(**given, **limits), inputs, spare, options)
    want = run(dense.multiple_negatives, inputs, spare, options)
    for ours, truth in zip(got, want, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("softmax", SOFTMAXES, ids=str)
@pytest.mark.parametrize("hardness", KINDS)
@pytest.mark.parametrize("hard", [0, 2])
@pytest.mark.parametrize("spare", [0, 1])
def test_every_softmax_with_every_hardness_equals_dense_code(softmax, hardness, hard, spare):
    partition, directions = softmax
    inputs = [*call(hard=hard, spare=spare), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)]
    options = {"directions": directions, "partition": partition, "hardness": hardness}
    options["hardness_strength"] = 4.0 if hardness else 0.0
    truth = run(dense.multiple_negatives, inputs, spare, options)
    got = run(lambda **given: multiple_negatives(**given, backend="torch"), inputs, spare, options)
    for ours, want in zip(got, truth, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-12)


@both_backends
@pytest.mark.parametrize("hardness", KINDS[1:])
def test_hardness_is_a_lower_temperature_of_the_value_alone(backend, hardness):
    """Of one hard negative and no others: its value is that at 1 / (1 / t + strength), its gradient that at t."""
    query, positive, hard = call(1, hard=1, device=DEVICE[backend])
    cosine = F.cosine_similarity(query, hard)
    options = {"temperature": 0.25, "hardness": hardness, "hardness_strength": 2.0, "backend": backend}
    loss = multiple_negatives(query, [positive, hard], **options)
    strength = 0.0 if hardness == "in_batch_negatives" else 2.0
    x = (4 + strength) * cosine - 4 * F.cosine_similarity(query, positive)
    torch.testing.assert_close(loss, F.softplus(x)[0], rtol=1e-12, atol=0)
    want = torch.sigmoid(x) * 4 * torch.autograd.grad(cosine, hard)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, hard)[0], want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("backend", "softmax"),
    [("torch", softmax) for softmax in SOFTMAXES]
    + [pytest.param("triton", softmax, marks=TRITON.marks) for softmax in (SOFTMAXES[7], SOFTMAXES[9])],
    ids=str,
)
def test_one_query_alone_has_nothing_to_learn(backend, softmax):
    """No negatives: the loss is 0, or log 2 where the positive is there twice, and its gradient 0 but for rounding."""
    partition, directions = softmax
    inputs = [*call(1, hard=0, device=DEVICE[backend])]
    inputs.append(torch.tensor(0.1, dtype=torch.float64, device=DEVICE[backend], requires_grad=True))
    for hardness in KINDS:
        options = {"directions": directions, "partition": partition, "hardness": hardness}
        options["hardness_strength"] = 2.0 if hardness else 0.0
        got = run(lambda **given: multiple_negatives(**given, backend=backend), inputs, 0, options)
        twice = partition == "joint" and "doc_to_query" in directions
        assert got[0].item() == pytest.approx(0.6931471805599453 if twice else 0.0, rel=1e-15)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in got[1:])


def test_no_queries_give_nan_as_mean_and_0_as_sum():
    inputs = call(0, hard=1)
    for partition, directions in SOFTMAXES:
        options = {"directions": directions, "partition": partition, "hardness": "hard_negatives"}
        options |= {"hardness_strength": 1.0, "backend": "torch"}
        assert multiple_negatives(inputs[0], inputs[1:], **options).isnan()
        assert multiple_negatives(inputs[0], inputs[1:], **options, reduction="sum") == 0
        assert multiple_negatives(inputs[0], inputs[1:], **options, reduction="none").shape == (0,)


def test_the_mean_over_two_processes_is_the_loss_of_all():
    query, *documents = call(2 * N, hard=2)
    for (partition, directions), hardness in itertools.product(SOFTMAXES, KINDS):
        options = {"directions": directions, "partition": partition, "hardness": hardness}
        options["hardness_strength"] = 2.0 if hardness else 0.0
        whole = multiple_negatives(query, documents, **options)
        parts = [
            multiple_negatives(
                query[r * N : (r + 1) * N], documents, **options, offset=r * N,
                all_queries=query if len(directions) > 1 else None,
            )
            for r in range(2)
        ]  # fmt: skip
        torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("softmax", "hardness"),
    [(SOFTMAXES[0], None), (SOFTMAXES[9], "hard_negatives")],
    ids=str,
)  # every direction together: in test_every_loss
def test_compiled_equals_eager(softmax, hardness):
    inputs = call(9, 2, d=8, dtype=torch.float32)
    partition, directions = softmax
    loss = MultipleNegativesLoss(
        0.1, directions=directions, partition=partition, hardness=hardness, hardness_strength=3.0 if hardness else 0.0
    )
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(inputs[0], inputs[1:])
        results.append((value, *torch.autograd.grad(value, inputs)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


def problems(monkeypatch, *args, **options):
    """What the primitive is asked for in one call."""
    seen = []

    def watched(name, function):
        def call(problem, *rest, **more):
            seen.append((name, problem))
            return function(problem, *rest, **more)

        return call

    with monkeypatch.context() as patch:
        for name in ("statistics", "onepass"):
            patch.setattr(contrast, name, watched(name, getattr(contrast, name)))
        multiple_negatives(*args, **options)
    return seen


def test_each_softmax_asks_the_primitive_for_no_more_than_it_needs(monkeypatch):
    """Plain InfoNCE and its symmetric form in one pass; one product for both of its directions; symmetric scores."""
    query, positive, hard = call()
    both = {"directions": ("query_to_doc", "doc_to_query")}
    ((name, problem),) = problems(monkeypatch, query, [positive, hard])
    assert (name, problem.target, problem.columns) == ("onepass", None, False)
    ((name, problem),) = problems(monkeypatch, query, [positive], **both, partition="per_direction")
    assert (name, problem.columns) == ("onepass", True)
    ((name, problem),) = problems(monkeypatch, query, [positive], **both)
    assert (name, problem.columns) == ("statistics", True)
    ((name, problem),) = problems(monkeypatch, query, [positive], hardness="hard_negatives", hardness_strength=1.0)
    assert (name, problem.target) == ("onepass", None)  # there are none
    asked = problems(monkeypatch, query, [positive], directions=JOINT[-1])
    assert [problem.self_similar for _, problem in asked] == [False, True, True]
    asked = problems(monkeypatch, query, [positive, hard], directions=JOINT[-1])
    assert [problem.self_similar for _, problem in asked] == [False, True, False]
    assert all(problem.keys[1].rows is hard for _, problem in (asked[0], asked[2]))


def test_documents_may_be_stacked():
    query, *documents = call(hard=2)
    stacked = torch.stack(documents).detach().requires_grad_()
    want = multiple_negatives(query, documents, directions=JOINT[-1])
    got = multiple_negatives(query, stacked, directions=JOINT[-1])
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, stacked)[0], torch.stack(torch.autograd.grad(want, documents)))


def test_module_equals_function():
    every, *documents = call(hard=2, spare=1, dtype=torch.float32)
    query = every[1 : N + 1]
    options = {
        "directions": JOINT[-1], "hardness": "in_batch_negatives", "hardness_strength": 1.5, "normalize": False,
        "reduction": "none",
    }  # fmt: skip
    loss = MultipleNegativesLoss(2.0, **options)
    want = multiple_negatives(query, documents, 2.0, **options, offset=1, all_queries=every)
    assert torch.equal(loss(query, documents, offset=1, all_queries=every), want)
    assert "hardness='in_batch_negatives'" in repr(loss)
    loss.temperature = torch.nn.Parameter(torch.tensor(2.0))
    torch.testing.assert_close(loss(query, documents, offset=1, all_queries=every), want)


QUERY, POSITIVE = torch.ones(N, D), torch.ones(N, D)
WIDE = torch.ones(N + 1, D)
BAD = {
    "an array": ({"query": [1.0]}, TypeError, "query must be a tensor"),
    "one column alone": ({"documents": POSITIVE}, ValueError, r"documents must have 3 dimensions \(1 \+ H, M, D\), or"),
    "no sequence": ({"documents": {POSITIVE}}, TypeError, "documents must be a sequence of tensors of shape"),
    "stacked integers": ({"documents": POSITIVE.long()[None]}, TypeError, "documents must be float16"),
    "no documents": ({"documents": []}, ValueError, "documents must hold the positives"),
    "a flat document": ({"documents": [POSITIVE[0]]}, ValueError, r"documents\[0\] must have 2 dimensions"),
    "integers": ({"documents": [POSITIVE.long()]}, TypeError, r"documents\[0\] must be float16"),
    "mixed dtypes": ({"documents": [POSITIVE, POSITIVE.double()]}, TypeError, r"documents\[1\] must be torch.float32"),
    "devices": ({"documents": [elsewhere(*POSITIVE.shape)]}, ValueError, r"documents\[0\] must be on cpu"),
    "components": ({"documents": [torch.ones(N, D + 1)]}, ValueError, rf"documents\[0\] must have shape \({N}, {D}\)"),
    "rows": ({"documents": [POSITIVE, WIDE]}, ValueError, rf"documents\[1\] must have shape \({N}, {D}\)"),
    "too few": ({"documents": [POSITIVE[1:]]}, ValueError, f"documents must have {N} rows or more"),
    "offset too large": ({"documents": [WIDE], "offset": 2}, ValueError, f"must have {N + 2} rows or more"),
    "offset below 0": ({"offset": -1}, ValueError, "offset must be 0 or more"),
    "offset type": ({"offset": 0.0}, TypeError, "offset must be an integer"),
    "other queries": ({"all_queries": WIDE}, ValueError, rf"all_queries must have shape \({N}, {D}\)"),
    "no queries": (
        {"documents": [WIDE], "directions": JOINT[2]}, ValueError, "compares with the queries of all 5 documents",
    ),
    "a direction": ({"directions": ("query_to_doc", "doc_to_dog")}, ValueError, "directions must be one of"),
    "a word": ({"directions": "query_to_doc"}, TypeError, "directions must be a tuple of names, got str"),
    "not a collection": ({"directions": 1}, TypeError, "directions must be a tuple of names, got int"),
    "no positive": ({"directions": ("doc_to_query",)}, ValueError, "directions must hold 'query_to_doc'"),
    "no directions": ({"directions": ()}, ValueError, "directions must hold 'query_to_doc'"),
    "partition": ({"partition": "row"}, ValueError, "partition must be one of"),
    "partition without a positive": (
        {"directions": JOINT[1], "partition": "per_direction"}, ValueError, "'query_to_query' has none",
    ),
    "hardness": ({"hardness": "hard"}, ValueError, "hardness must be one of"),
    "strength": ({"hardness_strength": -1.0}, ValueError, "hardness_strength must not be negative"),
    "strength nan": ({"hardness_strength": float("nan")}, ValueError, "hardness_strength must not be negative"),
    "strength type": ({"hardness_strength": "1"}, TypeError, "hardness_strength must be a number"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be positive and finite"),
    "temperatures": ({"temperature": torch.ones(N + 1)}, ValueError, "temperature must be .*one value per row"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "workspace": ({"workspace_limit": 0}, ValueError, "workspace_limit must be a number of bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_refused(what):
    replaced, kind, message = BAD[what]
    with pytest.raises(kind, match=message):
        multiple_negatives(**({"query": QUERY, "documents": [POSITIVE]} | replaced))


@pytest.mark.parametrize(
    "what",
    ["a direction", "a word", "not a collection", "no positive", "partition", "partition without a positive",
     "hardness", "strength", "strength type", "temperature", "reduction", "backend", "workspace"],
)  # fmt: skip
def test_a_bad_option_of_the_module_is_refused(what):
    replaced, kind, message = BAD[what]
    with pytest.raises(kind, match=message):
        MultipleNegativesLoss(**replaced)
