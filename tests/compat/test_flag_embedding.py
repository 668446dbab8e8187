"""The mixin over FlagEmbedding's embedders against those themselves, through their own `forward`."""

import contextlib
import random
import subprocess
import sys
import warnings

import pytest
import torch
from support.flag_models import CLASSES, FINETUNE, ORIGINALS, features, gradient, make, table
from support.helpers import bounds, error, set_limit
from support.libraries import library, without_package
from torch.utils._python_dispatch import TorchDispatchMode

from fused_infonce.backends import plan
from fused_infonce.compat import common
from fused_infonce.compat.flag_embedding import FusedEmbedderMixin


@pytest.fixture(autouse=True)
def says_again():
    common.say_once.cache_clear()


def run(kind, weight, which, shape, options, teacher=None, parts=1, no_in_batch=False, autocast=None):
    """(loss, gradient of the table)."""
    n, g = shape
    model = make(kind, weight, which, **options)
    inputs = {"queries": features(0, n, parts), "passages": features(n, n * g, parts)}
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        loss = model(**inputs, teacher_scores=teacher, no_in_batch_neg_flag=no_in_batch).loss
    loss.backward()
    return loss.detach(), gradient(model)


def configuration(seed):
    """A random call that the original accepts."""
    draw = random.Random(seed)
    kind = draw.choice(list(ORIGINALS))
    n, g, d = draw.randint(1, 12), draw.randint(1, 5), draw.randint(4, 40)
    no_in_batch, normalize = draw.random() < 0.3, draw.random() < 0.7
    options = {
        "temperature": draw.choice([1, 0.5, 0.1, 0.05, 0.02, 0.01] if normalize else [1, 2, 5]),
        "normalize_embeddings": normalize,
        "kd_loss_type": "kl_div" if no_in_batch else draw.choice(["kl_div", "m3_kd_loss"]),
        "sub_batch_size": draw.choice([-1, 2, 5]),
        "sentence_pooling_method": draw.choice(["cls", "mean", "last_token"]),
    }
    if kind != "m3" and draw.random() < 0.3:
        options |= {"use_mrl": True, "mrl_dims": draw.sample(range(2, d + 1), 3)}
    teacher = None if draw.random() < 0.35 else [draw.gauss(0, 2) for _ in range(n * g)]
    dtype, autocast = draw.choice(
        [(torch.float32, None)] * 6
        + [(torch.float64, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)]
        + [(torch.bfloat16, torch.bfloat16)]
    )
    parts = draw.choice([1, 1, 2]) if n > 1 else 1
    return kind, (n, g), d, options, teacher, dtype, {"parts": parts, "no_in_batch": no_in_batch, "autocast": autocast}


@pytest.mark.parametrize("seed", range(360))
def test_equals_the_original(seed):
    torch.manual_seed(seed)
    kind, (n, g), d, options, teacher, dtype, how = configuration(seed)
    weight = table(n, n * g, d).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing falls back
        warnings.filterwarnings("ignore", "a batch of one pair")
        ours = run(kind, weight, "fused", (n, g), options, teacher, **how)
    theirs, exact = (run(kind, weight, which, (n, g), options, teacher, **how) for which in ("plain", "exact"))
    narrow = dtype == torch.bfloat16 or how["autocast"]
    bound = 1e-2 if narrow else bounds(dtype, options["temperature"])[1]
    for a, b, true in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b, true = a.double(), b.double(), true.double()
        # where theirs is itself that exact: it cancels in logsumexp - positive, and in 16 bits its logits are rounded
        allowed = bound * true.norm() + 2 * (b - true).norm() + 1e-12  # in float64 it cancels too
        assert (a - b).norm() <= allowed
        assert (a - true).norm() <= allowed


@pytest.mark.parametrize("kind", ORIGINALS)
@pytest.mark.parametrize("distillation", [None, "kl_div", "m3_kd_loss"])
@pytest.mark.parametrize("normalize", [True, False])
def test_one_part_in_100000_at_a_moderate_temperature(kind, distillation, normalize):
    for n, g, d in ((2, 1, 3), (9, 4, 16), (33, 3, 24)):
        weight = table(n, n * g, d).float()
        teacher = torch.randn(n * g).tolist() if distillation else None
        options = {"temperature": 0.2 if normalize else 2, "normalize_embeddings": normalize}
        options["kd_loss_type"] = distillation or "kl_div"
        ours, theirs = (run(kind, weight, which, (n, g), options, teacher) for which in ("fused", "plain"))
        for a, b in zip(ours, theirs, strict=True):
            assert error(a, b) <= 1e-5


def test_at_a_low_temperature_the_original_is_further_from_the_truth():
    torch.manual_seed(1)
    weight = table(16, 32, 24, alike=3)
    options = {"temperature": 0.02, "normalize_embeddings": True}
    ours, theirs, exact = (run("encoder", weight.float(), which, (16, 2), options) for which in CLASSES)
    assert error(ours[0], exact[0]) <= 1e-5
    assert error(theirs[0], exact[0]) > 1e-3


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("distillation", [None, "kl_div", "m3_kd_loss"])
@pytest.mark.parametrize("no_in_batch", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "m3"])
def test_no_matrix_of_scores(kind, distillation, no_in_batch, monkeypatch):
    if no_in_batch and distillation == "m3_kd_loss":
        distillation = "kl_div"
    monkeypatch.setattr(plan, "DENSE", 0)
    set_limit(monkeypatch, str(1 << 16))
    n, g, d = 256, 2, 8
    weight, teacher = table(n, n * g, d).float(), [0.0] * (n * g) if distillation else None
    options = {"kd_loss_type": distillation or "kl_div", "temperature": 0.5}
    sizes = []
    for which in ("fused", "plain"):
        with Largest() as largest:
            run(kind, weight, which, (n, g), options, teacher, no_in_batch=no_in_batch)
        sizes.append(largest.elements)
    assert sizes[1] >= n * n * g
    assert sizes[0] <= n * n * g / 4


def reps(n=4, g=3, d=5, dtype=torch.float32):
    return torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(n * g, d).to(dtype).requires_grad_()


METHODS = ("_compute_no_in_batch_neg_loss", "_compute_in_batch_neg_loss")


def call(method, which, arguments, change=None, **options):
    model = make("encoder", torch.zeros(2, 2), which, **options)
    for name, value in (change or {}).items():
        setattr(model, name, value)
    return getattr(model, method)(*arguments)


def test_what_is_returned_beside_the_loss():
    """The (N, G) scores as ever; none where they would be the matrix."""
    q, p = reps()
    local, _ = call(METHODS[0], "fused", (q, p), temperature=0.3)
    want, _ = call(METHODS[0], "plain", (q, p), temperature=0.3)
    torch.testing.assert_close(local, want)
    assert call(METHODS[1], "fused", (q, p))[0] is None


@pytest.mark.parametrize("distillation", ["kl_div", "m3_kd_loss"])
def test_teacher_targets_that_do_not_sum_to_one(distillation):
    q, p = reps()
    teacher = torch.rand(4, 3)
    teacher[0, 1] = 0
    results = []
    for which in ("fused", "plain"):
        _, loss = call(METHODS[1], which, (q, p, teacher), kd_loss_type=distillation)
        results.append((loss, *torch.autograd.grad(loss, (q, p))))
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_dtype", [None, torch.float32, torch.float64])  # `forward` makes float32
@pytest.mark.parametrize("distillation", ["kl_div", "m3_kd_loss"])
def test_the_dtype_is_the_originals(dtype, autocast, teacher_dtype, distillation):
    q, p = reps(dtype=dtype)
    teacher = None if teacher_dtype is None else torch.softmax(torch.randn(4, 3), 1).to(teacher_dtype)
    losses = []
    for which in ("fused", "plain"):
        with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
            losses.append(call(METHODS[1], which, (q, p, teacher), kd_loss_type=distillation)[1])
    assert losses[0].dtype == losses[1].dtype
    assert error(*losses) <= 2e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distillation", [None, "kl_div"])
def test_a_tensor_as_temperature_gets_its_gradient(method, distillation):
    q, p = reps()
    teacher = torch.softmax(torch.randn(4, 3), 1) if distillation else None
    results = []
    for which in ("fused", "plain"):
        t = torch.tensor(0.4, requires_grad=True)
        loss = call(method, which, (q, p, teacher), change={"temperature": t})[1]
        results.append((loss, *torch.autograd.grad(loss, (q, p, t))))
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) <= 1e-5


TEACHER = torch.softmax(torch.ones(4, 3), 1)
BAD = {
    "components": {"p": torch.ones(12, 6)},
    "dtypes": {"p": torch.ones(12, 5).double()},
    "integers": {"q": torch.ones(4, 5).long(), "p": torch.ones(12, 5).long()},
    "a list": {"p": [[1.0]]},
    "no queries": {"q": torch.ones(0, 5)},
    "no passages": {"p": torch.ones(0, 5)},
    "one dimension": {"q": torch.ones(5)},
    "teacher of other groups": {"teacher": torch.ones(4, 2)},
    "teacher of other queries": {"teacher": torch.ones(3, 3)},
    "teacher type": {"teacher": [[1.0] * 3] * 4},
}


@pytest.mark.filterwarnings("ignore:.*runs the original's own code here")
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distillation", ["kl_div", "m3_kd_loss", "unknown"])
def test_bad_input_raises_what_the_original_raises(what, method, distillation):
    q, p = reps()
    arguments = ({"q": q, "p": p, "teacher": TEACHER} | BAD[what]).values()
    outcomes = []
    for which in ("fused", "plain"):
        try:
            outcomes.append(call(method, which, arguments, kd_loss_type=distillation)[1])
        except Exception as why:
            outcomes.append(type(why))
    ours, theirs = outcomes
    if isinstance(theirs, type):
        assert ours is theirs
    else:  # it takes integers, and without passages or with other groups may make something of it
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_distillation(method):
    q, p = reps()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="Invalid kd_loss_type"):
            call(method, "fused", (q, p, TEACHER), kd_loss_type="unknown")
    assert torch.equal(call(method, "fused", (q, p), kd_loss_type="unknown")[1], call(method, "fused", (q, p))[1])


FALLBACKS = {
    "scores": ({"compute_score": lambda q, p: q @ p.T - 1}, "scores are not FlagEmbedding's"),
    "similarity": ({"_compute_similarity": lambda q, p: q @ p.T + 1}, "scores are not FlagEmbedding's"),
    "smoothing": ({"cross_entropy": torch.nn.CrossEntropyLoss(label_smoothing=0.1)}, "not the mean cross-entropy"),
    "sum": ({"cross_entropy": torch.nn.CrossEntropyLoss(reduction="sum")}, "not the mean cross-entropy"),
    "loss": ({"compute_loss": lambda scores, target: scores.mean()}, "not the mean cross-entropy"),
    "negative temperature": ({"temperature": -1.0}, "temperature -1.0 is not"),
    "temperatures": ({"temperature": torch.ones(4, 1)}, "is not a positive number"),
}


@pytest.mark.parametrize("what", FALLBACKS)
def test_what_a_subclass_replaces_runs_as_it_is(what):
    change, why = FALLBACKS[what]
    q, p = reps()
    with pytest.warns(UserWarning, match=why):
        scores, loss = call(METHODS[1], "fused", (q, p), change=change)
    want = call(METHODS[1], "plain", (q, p), change=change)
    assert torch.equal(scores, want[0])
    assert torch.equal(loss, want[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local = call(METHODS[0], "fused", (q, p), change=change)
    for ours, theirs in zip(local, call(METHODS[0], "plain", (q, p), change=change), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_odd_passages_and_targets_run_as_they_are():
    q, p = reps()
    more = torch.cat([p, p[:2]])
    with pytest.warns(UserWarning, match="not as many for every query"):
        _, loss = call(METHODS[1], "fused", (q, more))
    assert torch.equal(loss, call(METHODS[1], "plain", (q, more))[1])
    learned = torch.rand(4, 3, requires_grad=True)
    with pytest.warns(UserWarning, match="teacher_targets are not constant"):
        _, loss = call(METHODS[1], "fused", (q, p, learned), kd_loss_type="m3_kd_loss")
    assert torch.autograd.grad(loss, learned)[0].abs().sum() > 0


@pytest.mark.parametrize("no_in_batch", [False, True])
@pytest.mark.parametrize("self_distill", [False, True])
@pytest.mark.parametrize("teacher", [None, "kl_div", "m3_kd_loss"])
def test_unified_fine_tuning_of_m3(no_in_batch, self_distill, teacher):
    n, g, d = 3, 5, 8  # without in-batch negatives the original needs n <= g there
    if no_in_batch and teacher:
        teacher = "kl_div"
    weight, scores = table(n, n * g, d).float(), torch.randn(n * g).tolist() if teacher else None
    options = {"unified_finetuning": True, "use_self_distill": self_distill, "kd_loss_type": teacher or "m3_kd_loss"}
    options |= {"temperature": 0.5, "normalize_embeddings": True}
    said = contextlib.nullcontext() if no_in_batch else pytest.warns(UserWarning, match="unified_finetuning adds")
    with said:
        ours = run("m3", weight, "fused", (n, g), options, scores, no_in_batch=no_in_batch)
    for a, b in zip(ours, run("m3", weight, "plain", (n, g), options, scores, no_in_batch=no_in_batch), strict=True):
        assert error(a, b) <= 1e-5


def test_the_trainers_and_checkpoints_stay():
    trainer = library(f"{FINETUNE}.encoder_only.base.trainer", without_package).EncoderOnlyEmbedderTrainer
    weight = table(4, 8, 6).float()
    plain, fused = (make("encoder", weight, which, temperature=0.1) for which in ("plain", "fused"))
    assert isinstance(fused, ORIGINALS["encoder"])
    assert fused.state_dict().keys() == plain.state_dict().keys()
    inputs = {"queries": features(0, 4), "passages": features(4, 8)}
    want = trainer.compute_loss(None, plain, inputs)
    torch.testing.assert_close(trainer.compute_loss(None, fused, inputs), want, rtol=1e-5, atol=0)
    assert fused.eval()(**inputs).loss is None


@pytest.mark.parametrize("kind", ["encoder", "m3"])  # those of decoders import peft
def test_a_runner_takes_the_model_class_from_its_module(kind):
    """As the docstring says."""
    original = ORIGINALS[kind]
    runner = library(original.__module__.replace("modeling", "runner"), without_package)
    assert getattr(runner, original.__name__) is original


def test_nothing_of_flag_embedding_is_imported():
    code = (
        "import sys, fused_infonce.compat.flag_embedding as m; "
        "assert not {'FlagEmbedding', 'transformers', 'datasets'} & sys.modules.keys(); "
        "assert m.FusedEmbedderMixin.__mro__[1:] == (object,)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert FusedEmbedderMixin.__bases__ == (object,)
