"""Analytic gradients against finite differences in float64, and what repeated and double backward do."""

import pytest
import torch
from support.helpers import (
    DEVICE,
    FACTORS,
    both_backends,
    cases,
    differentiable,
    evaluate,
    make_call,
    on,
    valid,
    watch_plans,
)
from torch.autograd import gradcheck

from fused_infonce import FusedInfoNCELoss, info_nce
from fused_infonce.backends import plan

PLANS = ["default", "one block", "several blocks", "other"]


def function_of(inputs, options):
    """(f, tensors) for gradcheck: f of the floating inputs alone, those of rank 0 included."""
    names = [name for name, x in inputs.items() if differentiable(x)]
    fixed = {name: x for name, x in inputs.items() if name not in names}
    tensors = [inputs[name].requires_grad_() for name in names]
    return lambda *x: info_nce(**dict(zip(names, x, strict=True)), **fixed, **options), tensors


def no_silent_zero(loss, tensors):
    """Finite differences of a constant would pass too."""
    gradients = torch.autograd.grad(loss.sum(), tensors)
    assert all(g.abs().max() > 1e-6 for g in gradients)


@cases(valid, pairs=True, together=True, **FACTORS, plan=PLANS)
def test_gradients_of_every_pair_of_options_are_those_of_finite_differences(backend, case, monkeypatch):
    inputs, options = make_call(6, 5, 3, 3, **{name: case[name] for name in FACTORS})
    options |= {"backend": backend, "workspace_limit": 150 if case["plan"] == "several blocks" else None}
    if case["plan"] == "one block":
        monkeypatch.setattr(plan, "DENSE", 0)
    if case["plan"] == "other":  # than these sizes have
        watch_plans(monkeypatch, name="streaming" if backend == "triton" else "workspace")
    f, tensors = function_of(on(DEVICE[backend], inputs), options)
    no_silent_zero(f(*tensors), tensors)
    assert gradcheck(f, tensors, fast_mode=backend == "triton")


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_element_of_the_jacobian_is_that_of_finite_differences(backend, reduction):
    """Not fast_mode: the whole Jacobian of the default call, through the kernels too."""
    inputs, options = make_call(
        4, 4, 2, 0, normalize=True, temperature="per row", negatives=None, in_batch=None, symmetric=False, target=False,
        ids=None, reduction=reduction,
    )  # fmt: skip
    f, tensors = function_of(on(DEVICE[backend], inputs), options | {"backend": backend})
    assert gradcheck(f, tensors, fast_mode=False)


@both_backends
@pytest.mark.parametrize("missing", ["query", "positive_key", "negative_keys", "temperature"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_only_some_inputs_need_a_gradient(backend, missing, symmetric):
    case = {
        "normalize": True,
        "temperature": "scalar",
        "negatives": "unpaired",
        "in_batch": True,
        "target": False,
        "ids": None,
    }
    inputs, options = make_call(9, 9, 5, 6, **case, symmetric=symmetric, reduction="mean")
    inputs, options = on(DEVICE[backend], inputs), options | {"backend": backend}
    _, every = evaluate(info_nce, inputs, **options)
    for names in ({missing}, inputs.keys() - {missing}):  # it alone, and all but it
        leaves = {name: x.clone().requires_grad_(name in names) for name, x in inputs.items()}
        info_nce(**leaves, **options).backward()
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in names)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, every[name], rtol=1e-12, atol=0)


@both_backends
@pytest.mark.parametrize("learnable", [True, False])
def test_the_gradient_of_logit_scale_is_that_of_finite_differences(backend, learnable):
    """d loss / d logit_scale = -t d loss / d t."""
    device = DEVICE[backend]
    query, key = (torch.randn(6, 4, dtype=torch.float64, device=device) for _ in range(2))
    loss = FusedInfoNCELoss(0.2, learnable_temperature=True, backend=backend).to(device).double()
    f = lambda scale, q: torch.func.functional_call(loss, {"logit_scale": scale}, (q, key))  # noqa: E731
    scale = loss.logit_scale.detach().requires_grad_(learnable)
    assert gradcheck(f, (scale, query.requires_grad_()), fast_mode=backend == "triton")


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_repeated_backward_gives_the_same_bits_and_changes_nothing_saved(backend, reduction, symmetric):
    """retain_graph gives bitwise the same gradients again, scaled ones where the upstream is; nothing saved changes."""
    saved = []

    def pack(x):
        saved.append((x, x.clone(), x._version))
        return x

    q, k = (torch.randn(19, 8, device=DEVICE[backend], requires_grad=True) for _ in range(2))
    t = torch.tensor(0.1, device=DEVICE[backend], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = info_nce(q, k, temperature=t, reduction=reduction, symmetric=symmetric, backend=backend)
    upstream = torch.ones_like(loss)
    first = torch.autograd.grad(loss, (q, k, t), upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(torch.nan)  # what came out is the caller's to overwrite
    twice = torch.autograd.grad(loss, (q, k, t), 2 * upstream, retain_graph=True)
    again = torch.autograd.grad(loss, (q, k, t), upstream)
    for once, same, double in zip(kept, again, twice, strict=True):
        assert torch.equal(once, same)
        assert torch.equal(2 * once, double)
    assert saved
    for x, before, version in saved:
        assert x._version == version
        torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)  # what is not written is NaN here


@both_backends
def test_inputs_are_left_alone(backend):
    case = {"normalize": True, "temperature": "per row", "negatives": "paired", "in_batch": True, "target": True}
    inputs, options = make_call(9, 7, 5, 6, **case, ids="keys", symmetric=False, reduction="mean")
    inputs = on(DEVICE[backend], inputs)
    before = {name: (x.clone(), x._version) for name, x in inputs.items()}
    evaluate(info_nce, inputs, backend=backend, **options)
    for name, (copy, version) in before.items():
        assert torch.equal(inputs[name], copy)
        assert inputs[name]._version == version


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("of", ["query", "positive_key", "temperature"])
def test_double_backward_is_refused(backend, reduction, of):
    leaves = {name: torch.randn(5, 4, device=DEVICE[backend]) for name in ("query", "positive_key")}
    leaves = {name: x.requires_grad_() for name, x in (leaves | {"temperature": torch.tensor(0.2)}).items()}
    loss = info_nce(**leaves, reduction=reduction, backend=backend).sum()
    with pytest.raises(RuntimeError, match="double backward"):  # at once: gradients without a graph would drop out of a
        torch.autograd.grad(loss, leaves[of], create_graph=True)  # second derivative in silence


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_hessian_is_refused(backend, reduction):
    query, key = (torch.randn(5, 4, device=DEVICE[backend]) for _ in range(2))
    f = lambda x: info_nce(x, key, reduction=reduction, backend=backend).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.functional.hessian(f, query)


@both_backends
@pytest.mark.parametrize("of", ["query", "temperature"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_is_refused(backend, of, reduction):
    """Not a tangent that is silently 0."""
    inputs = {name: torch.randn(5, 4, device=DEVICE[backend]) for name in ("query", "positive_key")}
    inputs["temperature"] = torch.tensor(0.2)

    def f(x):
        return info_nce(**(inputs | {of: x}), reduction=reduction, backend=backend)

    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(f, (inputs[of],), (torch.ones_like(inputs[of]),))
