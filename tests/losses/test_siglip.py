"""SigLIP's loss against dense code, in every option, at its bounds, and in what it may hold and compute."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles.siglip import siglip_loss as dense
from support.helpers import (
    DEVICE,
    both_backends,
    bounds,
    cases,
    embeddings,
    error,
    evaluate,
    interpreted,
    on,
    watch_plans,
)
from support.memory import MIB, PeakMemory
from torch.utils.flop_counter import FlopCounterMode

from fused_infonce import SigLipLoss, siglip_loss
from fused_infonce.backends import plan

N, M, D = 7, 4, 5


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Let few scores be made in blocks, as many are."""
    monkeypatch.setattr(plan, "DENSE", 0)


def at_once(monkeypatch, few):
    """Let few scores be made at once, as they are elsewhere."""
    monkeypatch.setattr(plan, "DENSE", few * 2**18)


def call_of(n=N, m=0, d=D, dtype=torch.float64, scale=3.0, bias=-2.0):
    """Return a call's tensors by name; with m negatives."""
    image = torch.randn(n, d, dtype=torch.float64)
    rows = {"image_features": image, "text_features": image + torch.randn(n, d, dtype=torch.float64)}
    if m:
        rows["negative_text_features"] = torch.randn(m, d, dtype=torch.float64)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    scalars = {"logit_scale": torch.tensor(scale, dtype=stats), "logit_bias": torch.tensor(bias, dtype=stats)}
    return {name: F.normalize(x, dim=-1).to(dtype) for name, x in rows.items()} | scalars


def compare(backend, inputs, rtol=1e-11, upstream=None, **options):
    """Assert that a call in float64 and its gradients are those of dense code."""
    got = evaluate(siglip_loss, on(DEVICE[backend], inputs), upstream, backend=backend, **options)
    options.pop("workspace_limit", None)
    want = evaluate(dense, inputs, upstream, **options)
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=rtol, atol=1e-14)
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name].cpu(), gradient, rtol=rtol, atol=1e-11, msg=name)
    return want


@cases(
    pairs=True,
    normalize=[False, True],
    reduction=["mean", "sum", "none"],
    scale=["float", "scalar", "one element", "per image"],
    bias=[None, "float", "scalar", "one element"],
    negatives=[False, True],
    ids=[None, "texts", "images and texts", "images and negatives"],
    weight=[None, "rows", "learned"],
    few=[False, True],
)
def test_gradients_are_those_of_dense_code_and_of_finite_differences(
    backend, normalize, reduction, scale, bias, negatives, ids, weight, few, monkeypatch
):
    at_once(monkeypatch, few)
    inputs = call_of(m=M if negatives else 0)
    options = {"normalize": normalize, "reduction": reduction}
    if normalize:
        inputs |= {name: 2 * x for name, x in inputs.items() if name.endswith("features")}
    for name, kind in (("logit_scale", scale), ("logit_bias", bias)):
        value = inputs.pop(name)
        shape = {"scalar": (), "one element": (1,), "per image": (N, 1)}.get(kind)
        if shape is not None:
            inputs[name] = value * (0.5 + torch.rand(shape, dtype=torch.float64))
        elif kind == "float":
            options[name] = value.item()
    if weight is not None:
        inputs["weight"] = 0.1 + torch.rand(N, dtype=torch.float64)
    if weight == "rows":
        options["weight"] = inputs.pop("weight").to(DEVICE[backend])
    if ids is not None:
        sizes = {"image_ids": N, "text_ids": N, "negative_ids": M}
        words = {"texts": "text_ids", "images": "image_ids", "negatives": "negative_ids"}
        inputs |= {words[x]: torch.randint(3, (sizes[words[x]],)) for x in ids.split(" and ")}
        if not negatives and inputs.pop("negative_ids", None) is not None:
            inputs.pop("image_ids")
    upstream = torch.linspace(1, 2, N, dtype=torch.float64) if reduction == "none" else None
    _, gradients = compare(backend, inputs, upstream=upstream, **options)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients.values())
    if not interpreted(backend):
        names = [name for name, x in inputs.items() if x.is_floating_point()]
        others = {name: x for name, x in inputs.items() if not x.is_floating_point()}

        def loss(*tensors):
            return siglip_loss(**dict(zip(names, tensors, strict=True)), **others, **options, backend=backend)

        leaves = [inputs[name].to(DEVICE[backend]).requires_grad_() for name in names]
        assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


SHAPES = [(1, 0, 1), (2, 1, 3), (15, 0, 16), (16, 17, 15), (17, 33, 8), (33, 1, 33), (63, 0, 7), (129, 40, 20)]


@both_backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_and_any_workspace_give_the_same(backend, shape):
    n, m, d = shape
    if interpreted(backend) and n > 100:
        n, m = 65, 33
    inputs = call_of(n, m, d)
    compare(backend, inputs, workspace_limit=20_000 if interpreted(backend) else 3000)
    if backend == "torch":
        compare(backend, {k: x.T.contiguous().T if x.dim() else x for k, x in inputs.items()})


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_compare(backend, reduction):
    inputs = call_of(0, 3)
    loss, gradients = evaluate(siglip_loss, on(DEVICE[backend], inputs), backend=backend, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss.sum() == 0
    if reduction != "mean":
        assert all(not x.any() for x in gradients.values())
    one = call_of(1)
    compare(backend, one | {"negative_text_features": torch.zeros(0, D, dtype=torch.float64)}, reduction=reduction)


# Logits of pairs down to -30 and up to 90, where log(1 + e^x) - x and the sum of a softplus with e^x are lost.
PLACES = [(10.0, -10.0), (30.0, -10.0), (100.0, -30.0), (5.0, 0.0), (100.0, 0.0)]


@cases(
    pairs=True,
    kind=["tight", "loose", "cone_98"],
    place=PLACES,
    normalize=[True, False],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    few=[False, True],
)
def test_loss_and_gradients_keep_the_bounds(backend, kind, place, normalize, dtype, few, monkeypatch):
    at_once(monkeypatch, few)
    n, d = (256, 64) if backend == "torch" else (30, 32)
    scale, bias = place
    rows = [x.to(dtype) for x in embeddings(kind, n, d, 19)]
    inputs = dict(zip(("image_features", "text_features", "negative_text_features"), rows, strict=True))
    inputs |= {"logit_scale": torch.tensor(scale), "logit_bias": torch.tensor(bias)}
    want = evaluate(dense, {k: x.double() for k, x in inputs.items()}, normalize=normalize)
    upstream = 2.0**10 if dtype == torch.float16 else 1.0
    loss, gradients = evaluate(
        siglip_loss, on(DEVICE[backend], inputs), torch.tensor(upstream), normalize=normalize, backend=backend
    )
    of_loss, of_gradients = bounds(dtype, 1 / scale)
    assert loss.dtype == torch.float32
    assert error(loss, want[0]) <= of_loss
    for name, gradient in want[1].items():
        assert gradients[name].dtype == inputs[name].dtype
        allowed = 1e-4 if name.startswith("logit") else of_gradients
        if dtype == torch.float16:
            allowed = max(allowed, 2 * error((gradient * upstream).half(), gradient * upstream))
        assert error(gradients[name].double() / upstream, gradient) <= allowed, name


@both_backends
def test_a_positive_far_above_the_bias_keeps_its_digits(backend):
    """Of one pair alone, whose loss e^-40 the dense form with its x - x would take for 0."""
    x = torch.ones(1, 16, device=DEVICE[backend]) / 4
    loss, gradients = evaluate(
        siglip_loss, {"image_features": x, "text_features": x.clone()}, backend=backend, logit_scale=60.0,
        logit_bias=-20.0,
    )  # fmt: skip
    assert error(loss, torch.tensor(math.exp(-40), dtype=torch.float64)) <= 1e-5
    assert error(gradients["image_features"], -60 * math.exp(-40) * x.double()) <= 1e-5


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_of_many_small_losses_keeps_its_digits(backend, dtype):
    """log(1 + e^-18) of each negative, where 1 + e^-18 is 1 in float32, beside a positive of log(1 + e^-22)."""
    text = torch.zeros(40, 40, dtype=dtype, device=DEVICE[backend])
    text.diagonal().fill_(1)
    rows = siglip_loss(text, text.clone(), 40.0, -18.0, reduction="none", backend=backend)
    want = 39 * math.log1p(math.exp(-18)) + math.log1p(math.exp(-22))
    assert error(rows, torch.full((40,), want, dtype=torch.float64)) <= (2e-6 if dtype == torch.float32 else 1e-14)


@both_backends
@pytest.mark.parametrize("few", [False, True])
def test_logits_beyond_the_range_of_an_exponential_are_losses_themselves(backend, few, monkeypatch):
    at_once(monkeypatch, few)
    image, text = torch.randn(2, 6, 8, device=DEVICE[backend]) * 4
    inputs = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(2.0, device=image.device)}
    got = evaluate(siglip_loss, inputs, logit_bias=90.0, backend=backend)
    want = evaluate(dense, {k: x.double().cpu() for k, x in inputs.items()}, logit_bias=90.0)
    assert want[0] > 300
    assert error(got[0], want[0]) <= 1e-6
    assert all(error(got[1][name], gradient) <= 1e-5 for name, gradient in want[1].items())


@both_backends
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_not_finite_makes_the_losses_nan_that_see_it(backend, value, normalize):
    inputs = on(DEVICE[backend], call_of())
    ids = torch.arange(N, device=DEVICE[backend])
    for name, index in (("image_features", 2), ("text_features", 3)):
        bad = dict(inputs)
        bad[name] = bad[name].clone()
        bad[name][index, 0] = value
        rows = siglip_loss(**bad, normalize=normalize, reduction="none", backend=backend)
        alone = torch.arange(N, device=rows.device) == index
        assert rows.isnan().equal(alone if name == "image_features" else torch.ones_like(alone))
        other = ids.clone()
        other[5] = 3  # the pair of image 5 and text 3 is left out
        rows = siglip_loss(**bad, image_ids=other, text_ids=ids, normalize=normalize, reduction="none", backend=backend)
        assert not rows[5].isnan() or name == "image_features" == index
    assert siglip_loss(**inputs, normalize=normalize, backend=backend).isfinite()


@both_backends
@pytest.mark.parametrize("few", [False, True])
def test_a_row_of_weight_0_counts_for_nothing(backend, few, monkeypatch):
    at_once(monkeypatch, few)
    inputs = on(DEVICE[backend], call_of())
    inputs["image_features"][3] = math.nan
    weight = torch.ones(N, dtype=torch.float64, device=DEVICE[backend])
    weight[3] = 0
    kept = [i for i in range(N) if i != 3]
    rows = siglip_loss(**inputs, reduction="none", backend=backend)
    torch.testing.assert_close(siglip_loss(**inputs, weight=weight, backend=backend), rows[kept].mean())


@both_backends
@pytest.mark.parametrize("few", [False, True])
def test_zero_rows_have_no_gradient_and_poison_nothing(backend, few, monkeypatch):
    at_once(monkeypatch, few)
    inputs = call_of()
    inputs["image_features"][1], inputs["text_features"][4] = 0, 0
    _, gradients = compare(backend, inputs, normalize=True)
    assert not gradients["image_features"][1].any()


@both_backends
def test_every_run_gives_the_same_bits(backend):
    inputs = on(DEVICE[backend], call_of(*((600, 100, 33) if backend == "torch" else (40, 7, 9)), torch.float32))
    limit = 2**16 if backend == "torch" else 10_000
    first, *others = (evaluate(siglip_loss, inputs, backend=backend, workspace_limit=limit) for _ in range(3))
    for loss, gradients in others:
        assert torch.equal(loss, first[0])
        assert all(torch.equal(x, first[1][name]) for name, x in gradients.items())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_scores_are_made_once_and_need_the_workspace_alone(reduction):
    n, d = 4096, 64
    inputs = call_of(n, 0, d, torch.float32)
    with FlopCounterMode(display=False) as products, PeakMemory() as memory:
        evaluate(siglip_loss, inputs, torch.full((n,), 1 / n) if reduction == "none" else None, reduction=reduction)
    bytes_of_inputs = 2 * n * d * 4
    assert products.get_total_flops() <= (6 if reduction == "mean" else 8) * n * n * d
    assert memory.peak <= 64 * MIB + 4 * bytes_of_inputs
    assert memory.largest <= max(16 * MIB, bytes_of_inputs) < n * n * 4
    with torch.no_grad(), FlopCounterMode(display=False) as products:
        siglip_loss(**inputs)
    assert products.get_total_flops() <= 2 * n * n * d


@pytest.mark.parametrize("limit", [MIB // 4, MIB])
def test_the_workspace_limit_holds(limit):
    n, d = 2048, 32
    inputs = call_of(n, 0, d, torch.float32)
    with PeakMemory() as memory:
        evaluate(siglip_loss, inputs, workspace_limit=limit)
    assert memory.peak <= limit + 4 * 2 * n * d * 4


@both_backends
def test_what_is_saved_is_the_gradients_once(backend):
    n, d = (512, 64) if backend == "torch" else (96, 4)
    leaves = {k: x.to(DEVICE[backend]).requires_grad_() for k, x in call_of(n, 0, d, torch.float32).items()}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = siglip_loss(**leaves, backend=backend)
    assert 0 < sum(saved.values()) <= 2 * n * d * 4 + 8 * n
    loss.backward(retain_graph=True)
    first = {k: x.grad.clone() for k, x in leaves.items()}
    loss.backward()
    assert all(torch.equal(x.grad, 2 * first[k]) for k, x in leaves.items())


@both_backends
def test_only_what_is_asked_for_has_a_gradient(backend):
    inputs = on(DEVICE[backend], call_of(m=M))
    every = evaluate(siglip_loss, inputs, backend=backend)[1]
    for name, x in inputs.items():
        leaf = x.detach().requires_grad_()
        (got,) = torch.autograd.grad(siglip_loss(**inputs | {name: leaf}, backend=backend), leaf)
        torch.testing.assert_close(got, every[name], rtol=1e-12, atol=1e-14)


@both_backends
def test_plans(backend, monkeypatch):
    seen = watch_plans(monkeypatch)
    inputs = on(DEVICE[backend], call_of())
    loss = SigLipLoss(backend=backend)
    with torch.no_grad():
        (plan,) = loss.explain(**inputs)
        assert (plan.name, plan.flops) == ("forward", 2)
    leaf = inputs["logit_bias"].requires_grad_()
    (plan,) = loss.explain(**inputs)
    assert (plan.name, plan.flops, plan.gradients) == ("onepass", 6, True)
    (plan,) = SigLipLoss(backend=backend, reduction="none").explain(**inputs)
    assert (plan.name, plan.flops) == ("workspace", 8)
    assert "any block of scores" in str(loss.explain(**inputs))
    loss(**inputs).backward()
    assert leaf.grad is not None
    assert seen[-1].backend == backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scalar_of_16_bits_is_widened_first(dtype):
    inputs = call_of(dtype=dtype)
    inputs |= {"logit_scale": torch.tensor(9.7, dtype=dtype), "logit_bias": torch.tensor(-9.3, dtype=dtype)}
    got = evaluate(siglip_loss, inputs)
    want = evaluate(dense, {k: x.double() for k, x in inputs.items()})
    assert error(got[0], want[0]) <= 1e-5
    assert all(got[1][name].dtype == dtype for name in inputs)
    assert all(error(got[1][name], want[1][name]) <= 5e-3 for name in inputs)


def test_the_module_holds_scale_and_bias():
    inputs = call_of(dtype=torch.float32)
    image, text = inputs["image_features"], inputs["text_features"]
    torch.testing.assert_close(SigLipLoss()(**inputs), siglip_loss(**inputs))
    with pytest.raises(ValueError, match="logit_scale is missing"):
        SigLipLoss()(image, text)
    torch.testing.assert_close(SigLipLoss(temperature=0.2, bias=-3.0)(image, text), siglip_loss(image, text, 5.0, -3.0))
    learned = SigLipLoss(learnable_temperature=True, learnable_bias=True)
    torch.testing.assert_close(learned(image, text), siglip_loss(image, text, 10.0, -10.0))
    assert {name: (tuple(x.shape), x.dtype) for name, x in learned.named_parameters()} == {
        "logit_scale": ((1,), torch.float32), "logit_bias": ((1,), torch.float32),
    }  # fmt: skip
    learned(image, text).backward()
    assert learned.logit_bias.grad.abs() > 1e-3
    with torch.no_grad():
        learned.logit_bias.fill_(1.0)
    learned.reset_parameters()
    assert learned.logit_bias.item() == -10
    assert "learnable_bias=True" in repr(learned)
    with pytest.raises(TypeError, match="bias must be a number, got str"):
        SigLipLoss(bias="0")
    with pytest.raises(ValueError, match="learnable_bias must be one of"):
        SigLipLoss(learnable_bias="no")


def test_three_steps_learn_scale_and_bias():
    loss = SigLipLoss(learnable_temperature=True, learnable_bias=True, normalize=True)
    model = torch.nn.Linear(D, D)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    image, text = torch.randn(2, N, D)
    values = []
    for _ in range(4):
        value = loss(model(image), text)
        optimizer.zero_grad()
        value.backward()
        values.append(torch.stack([value.detach(), *(x.detach().clone()[0] for x in loss.parameters())]))
        optimizer.step()
    assert torch.stack(values).diff(dim=0).ne(0).all()
    assert values[-1][0] < values[0][0]
