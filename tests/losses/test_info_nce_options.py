"""What each option means: against loops over explicit sets of negatives, and rule by rule."""

import copy
import inspect
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from oracles import info_nce as dense
from oracles.row_lists import reduce, rows_of
from support.helpers import DEVICE, FACTORS, both_backends, cases, error, evaluate, make_call, on, set_limit, two, valid

from fused_infonce import FusedInfoNCELoss, explain, info_nce
from fused_infonce.backends import plan, registry


def by_hand(reduction="mean", **options):
    """The documented meaning of every option, one pair at a time."""

    def loss(row):
        return torch.cat([row.pos.new_zeros(1), row.others - row.pos]).logsumexp(0)

    return reduce(loss, rows_of(**options), reduction, len(options["query"]))


@cases(valid, pairs=True, together=True, **FACTORS)
def test_every_pair_of_options_means_what_a_loop_does(backend, case):
    inputs, options = make_call(11, 8, 5, 4, **case)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    want = evaluate(by_hand, exact, **options)
    for function, kwargs in ((info_nce, {"backend": backend}), (dense.info_nce, {})):
        moved = on(DEVICE[backend], inputs) if kwargs else inputs
        got = evaluate(function, moved, **options, **kwargs)
        assert error(got[0], want[0]) <= 1e-12
        for name, gradient in want[1].items():
            assert error(got[1][name], gradient) <= 1e-10, name


# Rules


@both_backends
def test_key_ids_drop_duplicates_of_the_positive(backend):
    """Key 2 is the document of key 0: it is no negative of row 0, and is one of row 1."""
    query, key = two(4, backend=backend)
    ids = torch.tensor([7, 8, 7, 9], device=query.device)
    rows = info_nce(query, key, reduction="none", key_ids=ids, backend=backend)
    for i, kept, at in [(0, [0, 1, 3], 0), (1, [0, 1, 2, 3], 1), (2, [1, 2, 3], 1), (3, [0, 1, 2, 3], 3)]:
        target = torch.tensor([at], device=query.device)
        alone = info_nce(query[[i]], key[kept], target=target, backend=backend)
        torch.testing.assert_close(rows[i], alone, rtol=1e-12, atol=0)


@both_backends
def test_query_ids_are_labels(backend):
    """Row 1 has label 5, as key 3 has; its own positive is kept although it has that label too."""
    query, key = two(4, backend=backend)
    labels = {"query_ids": torch.tensor([4, 5, 6, 8]), "key_ids": torch.tensor([4, 5, 7, 5])}
    labels = on(DEVICE[backend], labels)
    rows = info_nce(query, key, reduction="none", backend=backend, **labels)
    target = torch.tensor([1], device=query.device)
    torch.testing.assert_close(
        rows[1], info_nce(query[[1]], key[:3], target=target, backend=backend), rtol=1e-12, atol=0
    )
    plain = info_nce(query, key, reduction="none", backend=backend)
    torch.testing.assert_close(rows[[0, 2, 3]], plain[[0, 2, 3]], rtol=1e-12, atol=0)  # nothing of theirs is equal


@both_backends
@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_in_batch_negatives_join_the_explicit_ones_when_asked(backend, mode):
    query, key = two(backend=backend)
    extra = torch.randn((6, 3, 4) if mode == "paired" else (3, 4), dtype=torch.float64, device=query.device)
    call = {"negative_keys": extra, "negative_mode": mode, "reduction": "none", "backend": backend}
    default, false, true = (info_nce(query, key, in_batch_negatives=x, **call) for x in (None, False, True))
    assert torch.equal(default, false)
    neg = lambda x: torch.log(torch.expm1(x))  # noqa: E731  neg - pos from a loss
    both = torch.logaddexp(neg(default), neg(info_nce(query, key, reduction="none", backend=backend)))
    torch.testing.assert_close(true, F.softplus(both), rtol=1e-10, atol=0)


@both_backends
@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 99])
def test_ignored_rows_count_neither_in_the_loss_nor_in_the_mean(backend, ignore_index):
    query, key = two(9, backend=backend)
    target = torch.tensor([0, 8, 3, ignore_index, 2, 2, ignore_index, 7, 1], device=query.device)
    kept = target != ignore_index
    assert 0 < kept.sum() < 9
    call = {"ignore_index": ignore_index, "backend": backend}
    for reduction in ("mean", "sum"):
        all_rows = evaluate(
            info_nce, {"query": query, "positive_key": key, "target": target}, reduction=reduction, **call
        )
        few = {"query": query[kept], "positive_key": key, "target": target[kept]}
        want = evaluate(info_nce, few, reduction=reduction, **call)
        torch.testing.assert_close(all_rows[0], want[0], rtol=1e-12, atol=0)
        assert not all_rows[1]["query"][~kept].any()
        torch.testing.assert_close(all_rows[1]["query"][kept], want[1]["query"], rtol=1e-12, atol=0)
        torch.testing.assert_close(all_rows[1]["positive_key"], want[1]["positive_key"], rtol=1e-12, atol=1e-15)
    none = info_nce(query, key, target=target, reduction="none", **call)
    assert torch.equal(none == 0, ~kept)


@both_backends
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_targets_and_ids_may_have_any_integer_dtype(backend, dtype):
    query, key = two(backend=backend)
    vectors = {"target": torch.tensor([5, 0, 3, 3, 1, 2]), "key_ids": torch.tensor([1, 2, 1, 3, 3, 1])}
    vectors = on(DEVICE[backend], vectors)
    want = info_nce(query, key, backend=backend, **vectors)
    assert torch.equal(info_nce(query, key, backend=backend, **{k: v.to(dtype) for k, v in vectors.items()}), want)


@both_backends
def test_ids_use_all_64_bits(backend, monkeypatch):
    monkeypatch.setattr(plan, "DENSE", 0)  # one plan with ids and without, so that results are the same to the bit
    query, key = two(backend=backend)
    ids = torch.tensor([0, 2**32, 2**40, -(2**63), 2**63 - 1, 2**53 + 1], device=query.device)
    plain = info_nce(query, key, backend=backend)
    assert torch.equal(info_nce(query, key, key_ids=ids, backend=backend), plain)
    query_ids = torch.tensor([2**32, 0, 1, 2**63 - 1, -(2**63), 2**53], device=query.device)  # 4 of 6 elsewhere
    assert info_nce(query, key, query_ids=query_ids, key_ids=ids, backend=backend) < plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"symmetric": True, "target": torch.arange(6)}, "symmetric.*target"),
        ({"positive_key": torch.randn(7, 4)}, "6 rows.*got 7"),
        ({"symmetric": True, "positive_key": torch.randn(7, 4)}, "6 rows.*got 7"),
        ({"in_batch_negatives": False}, "no negatives"),
        ({"query_ids": torch.arange(6)}, "query_ids alone"),
        ({"negative_ids": torch.arange(6)}, "negative_keys"),
        ({"negative_ids": torch.arange(6), "negative_keys": torch.randn(6, 4)}, "negative_ids alone"),
        ({"key_ids": torch.arange(6), "negative_keys": torch.randn(6, 4)}, "key_ids have no effect"),
        (
            {"key_ids": torch.arange(6), "negative_ids": torch.arange(5), "negative_keys": torch.randn(6, 4)},
            r"negative_ids must have shape \(6,\) or \(6, I\), got \(5,\)",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_cannot_be_combined_is_refused(options, message, backend):
    call = {"query": torch.randn(6, 4), "positive_key": torch.randn(6, 4), "backend": backend} | options
    with pytest.raises(ValueError, match=message):
        info_nce(**call)


# Empty


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("empty", ["no rows", "no rows, targets", "all ignored", "no rows, negatives", "symmetric"])
def test_nothing_to_count_gives_nan_as_mean_and_0_as_sum(backend, reduction, empty):
    """NaN for the mean and 0 for the sum, as F.cross_entropy; zero gradients."""
    n, m = (0, 5) if empty == "no rows, targets" else (4, 4) if empty == "all ignored" else (0, 0)
    inputs = {"query": torch.randn(n, 3), "positive_key": torch.randn(m, 3), "temperature": torch.tensor(0.1)}
    if empty == "no rows, negatives":
        inputs["negative_keys"] = torch.randn(5, 3)
    if empty in ("no rows, targets", "all ignored"):
        inputs["target"] = torch.full((n,), -100)
    options = {"reduction": reduction, "symmetric": empty == "symmetric"}
    loss, gradients = evaluate(info_nce, on(DEVICE[backend], inputs), backend=backend, **options)
    want = F.cross_entropy(torch.zeros(n, 5), torch.full((n,), -100), reduction=reduction)
    torch.testing.assert_close(loss.cpu(), want, rtol=0, atol=0, equal_nan=True)
    assert math.isnan(want) if reduction == "mean" else not want.any()
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any(), name


# The module


EVERY = {
    "temperature": 0.3, "reduction": "sum", "negative_mode": "paired", "symmetric": True, "normalize": False,
    "in_batch_negatives": True, "ignore_index": -1, "learnable_temperature": True, "max_logit_scale": 50.0,
    "label_smoothing": 0.1,
    "backend": "torch", "workspace_limit": 4096,
}  # fmt: skip
ALL = EVERY | {"positives": "all", "margin": 0.2}  # which no call may have beside label_smoothing
ALL["distributed"] = True  # nor any without a process group


def test_the_module_passes_every_option_on(monkeypatch):
    seen = {}
    monkeypatch.setattr("fused_infonce.losses.info_nce.info_nce", lambda *a, **k: seen.update(k, positional=a))
    names = set(inspect.signature(FusedInfoNCELoss.forward).parameters)
    vectors = {name: object() for name in names - {"self", "query", "positive_key", "negative_keys", "temperature"}}
    FusedInfoNCELoss(**ALL)("q", "k", "n", temperature=0.7, **vectors)
    options = {k: v for k, v in ALL.items() if k not in ("learnable_temperature", "max_logit_scale")}
    assert seen == options | vectors | {"temperature": 0.7, "positional": ("q", "k", "n")}


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.2, "symmetric": True}, EVERY], ids=["default", "two", "every"]
)
def test_copies_and_pickles_give_the_same_loss(options):
    query, key = two()
    negatives = torch.randn(6, 3, 4, dtype=torch.float64) if options is EVERY else None
    loss = FusedInfoNCELoss(**options)
    want = loss(query, key, negatives)
    for other in (copy.deepcopy(loss), copy.copy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(query, key, negatives), want)
        assert repr(other) == repr(loss)
    fresh = FusedInfoNCELoss(**(options | {"temperature": 0.9}))
    fresh.load_state_dict(loss.state_dict())
    assert list(loss.state_dict()) == (["logit_scale"] if options is EVERY else [])
    assert torch.equal(fresh(query, key, negatives), want) == (options is EVERY)
    deep = copy.deepcopy(loss)
    deep.temperature = 0.01
    assert torch.equal(loss(query, key, negatives), want)


def test_the_representation_names_every_option_that_is_set():
    assert repr(FusedInfoNCELoss()) == "FusedInfoNCELoss(temperature=0.1, reduction='mean')"
    text = repr(FusedInfoNCELoss(**ALL))
    assert "temperature=0.3" in text
    for name, value in ALL.items():
        assert name == "temperature" or f"{name}={value!r}" in text


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        FusedInfoNCELoss(0.1, "mean", "unpaired", True)
    with pytest.raises(TypeError):
        info_nce(*two(), None, 0.1, "mean", "unpaired", True)
    with pytest.raises(TypeError):
        FusedInfoNCELoss()(*two(), None, torch.arange(6))


# Backends

TRITON_ON_CPU = """
import torch
from fused_infonce import info_nce
q, k = torch.randn(2, 5, 4)
auto = info_nce(q, k)
assert torch.equal(auto, info_nce(q, k, backend="torch"))
try:
    info_nce(q, k, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_triton_on_a_cpu_says_why_not(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", TRITON_ON_CPU]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "backend='triton' cannot run" in done.stdout
    assert "cpu" in done.stdout or "Triton cannot be imported" in done.stdout


def test_auto_on_a_cpu_is_torch():
    assert registry.resolve("auto", torch.ones(1)) == "torch"  # even where the interpreter could run Triton


@both_backends
@pytest.mark.parametrize("limit", [1, 1000, 10**9])
def test_workspace_limit_does_not_change_the_loss(backend, limit):
    query, key = two(12, backend=backend)
    inputs = {"query": query, "positive_key": key}
    want = evaluate(info_nce, inputs, backend=backend)
    got = evaluate(info_nce, inputs, backend=backend, workspace_limit=limit)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-16)


def test_the_environment_sets_the_workspace_limit(monkeypatch):
    inputs = torch.randn(2, 3000, 8)
    set_limit(monkeypatch, str(2**20))
    plan = explain(*inputs)
    assert plan == explain(*inputs, workspace_limit=2**20)
    assert "at most 1 MiB" in str(plan)
    assert plan != explain(*inputs, workspace_limit=2**26)
    assert "at most 5000 bytes" in str(explain(*inputs, workspace_limit=5000))
    set_limit(monkeypatch, "")  # is as good as none
    assert explain(*inputs) == explain(*inputs, workspace_limit=2**26)


@pytest.mark.least_limit
@pytest.mark.parametrize("wrong", ["0", "-1", "256", "65535", "64M", "1e9"])
def test_a_limit_below_64_kib_is_taken_for_one_in_another_unit(wrong, monkeypatch):
    inputs = torch.randn(2, 5, 8)
    if wrong.isdecimal():
        with pytest.raises(ValueError, match=rf"workspace_limit must be a number of bytes, 65536 .*, got {wrong}"):
            info_nce(*inputs, workspace_limit=int(wrong))
    assert info_nce(*inputs, workspace_limit=65536).isfinite()
    set_limit(monkeypatch, wrong)
    with pytest.raises(ValueError, match="FUSED_INFONCE_WORKSPACE_LIMIT must be a number of bytes"):
        info_nce(*inputs)
