"""What every exported loss owes: a call, gradients, `torch.compile`, autocast, a pickle, a representation."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from support.examples import from_example
from support.helpers import DEVICE, TRITON, watch_plans
from support.memory import PeakMemory
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_infonce
from fused_infonce import (
    ClipLoss,
    DCLLoss,
    DebiasedLoss,
    DistillationLoss,
    DualTemperatureLoss,
    FusedInfoNCELoss,
    GlobalContrastiveLoss,
    GroupedInfoNCELoss,
    GuidedInfoNCELoss,
    MACLLoss,
    MatryoshkaLoss,
    MoCoLoss,
    MultipleNegativesLoss,
    NTXentLoss,
    RobustInfoNCELoss,
    SigLipLoss,
    SupConLoss,
)

N, D = 8, 16


def rows(*shape):
    return torch.randn(*shape, D, requires_grad=True)


# name -> (the module, given a backend; its inputs)
CALLS = {
    "ClipLoss": (lambda **o: ClipLoss(normalize=True, **o), lambda: (rows(N), rows(N), torch.tensor(10.0))),
    "DCLLoss": (lambda **o: DCLLoss(sigma=0.5, **o), lambda: (rows(N), rows(N))),
    "DebiasedLoss": (lambda **o: DebiasedLoss(negatives="keys", symmetric=True, **o), lambda: (rows(N), rows(N))),
    "DistillationLoss": (
        lambda **o: DistillationLoss(alpha=0.5, symmetric=True, **o),
        lambda: (rows(N), rows(N), torch.randn(N, 5), torch.randn(N, 5)),
    ),
    "DualTemperatureLoss": (lambda **o: DualTemperatureLoss(symmetric=True, **o), lambda: (rows(N), rows(N))),
    "FusedInfoNCELoss": (lambda **o: FusedInfoNCELoss(learnable_temperature=True, **o), lambda: (rows(N), rows(N))),
    "GlobalContrastiveLoss": (
        lambda **o: GlobalContrastiveLoss(N, negatives="keys", **o),
        lambda: (rows(N), rows(N), torch.arange(N)),
    ),
    "GroupedInfoNCELoss": (
        lambda **o: GroupedInfoNCELoss(3, distillation="m3_kd_loss", **o),
        lambda: (rows(N), rows(3 * N), torch.randn(N, 3)),
    ),
    "GuidedInfoNCELoss": (
        lambda **o: GuidedInfoNCELoss(0.1, contrast_queries=True, contrast_keys=True, **o),
        lambda: (rows(N), rows(N), rows(5)),
    ),
    "MACLLoss": (lambda **o: MACLLoss(negatives="keys", symmetric=True, **o), lambda: (rows(N), rows(N))),
    "MatryoshkaLoss": (
        lambda **o: MatryoshkaLoss(FusedInfoNCELoss(learnable_temperature=True, **o), [D, D // 2], [1, 0.5]),
        lambda: (rows(N), rows(N)),
    ),
    "MoCoLoss": (lambda **o: MoCoLoss(D, queue_size=20, **o), lambda: (rows(N), torch.randn(N, D))),
    "MultipleNegativesLoss": (
        lambda **o: MultipleNegativesLoss(
            directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
            hardness="all_negatives",
            hardness_strength=2.0,
            **o,
        ),
        lambda: (rows(N), rows(2, N)),
    ),
    "NTXentLoss": (NTXentLoss, lambda: (rows(N), rows(N), rows(N))),
    "RobustInfoNCELoss": (lambda **o: RobustInfoNCELoss(symmetric=True, **o), lambda: (rows(N), rows(N))),
    "SigLipLoss": (
        lambda **o: SigLipLoss(normalize=True, **o),
        lambda: (rows(N), rows(N), torch.tensor(10.0), torch.tensor(-3.0, requires_grad=True), rows(5)),
    ),
    "SupConLoss": (SupConLoss, lambda: (rows(N, 2), torch.arange(N) % 3)),
}
# A loss that has no entry is made and called as in the example of its docstring.
CLASSES = {name for name in fused_infonce.__all__ if name.endswith("Loss")}
CALLS |= {name: from_example(getattr(fused_infonce, name)) for name in sorted(CLASSES - set(CALLS))}
every_loss = pytest.mark.parametrize("name", CALLS)
# Losses that together compile every operator over kernels. All are compiled with a learned temperature, in PyTorch, in
# tests/temperature, and most with a number in a test of their own.
KERNELS = ("ClipLoss", "GuidedInfoNCELoss", "NTXentLoss", "SigLipLoss")


def make(name, **options):
    torch.manual_seed(0)
    return CALLS[name][0](**options), CALLS[name][1]()


def gradients(value, module, inputs):
    leaves = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
    return torch.autograd.grad(value, leaves)


def test_every_exported_class_is_a_loss_or_its_statistics():
    exported = {name for name in fused_infonce.__all__ if inspect.isclass(getattr(fused_infonce, name))}
    assert exported == CLASSES | {"Distributed", "RowStatistics", "Statistics"}
    assert all(issubclass(getattr(fused_infonce, name), nn.Module) for name in CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_example_of_a_docstring_runs(name):
    make, inputs = from_example(getattr(fused_infonce, name))
    loss = make()
    assert isinstance(loss, getattr(fused_infonce, name))
    extra = (10.0,) if name == "ClipLoss" else ()  # whose example passes the scale by name
    value = loss(*inputs(), *extra[: 3 - len(inputs())])
    value.backward()
    assert value.isfinite()


@pytest.mark.parametrize(
    ("name", "backend"),
    [("MoCoLoss", "torch"), *(pytest.param(name, "triton", marks=TRITON.marks) for name in KERNELS)],
)
def test_compiled_equals_eager(name, backend):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        module, inputs = make(name, backend=backend)
        module = module.to(DEVICE[backend])
        inputs = [x.detach().to(DEVICE[backend]).requires_grad_(x.requires_grad) for x in inputs]
        run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        values = [run(*inputs), run(*inputs)]  # a queue has moved on
        results.append([*values, *gradients(sum(values), module, inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@every_loss
def test_under_autocast_the_loss_is_float32_and_gradients_are_the_inputs(name):
    module, inputs = make(name)
    if name == "MoCoLoss":
        module.queue.copy_(module.queue.bfloat16())
    rounded = copy.deepcopy(module)(*(x.detach().bfloat16().float() if x.requires_grad else x for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = module(*inputs)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, rounded, rtol=3e-4, atol=1e-6)  # what is not a product sees them unrounded
    for x, gradient in zip((x for x in inputs if x.requires_grad), gradients(value, module, inputs), strict=False):
        assert gradient.dtype == x.dtype
        assert gradient.isfinite().all()
        assert gradient.any()


@every_loss
def test_a_pickle_gives_the_same_loss_and_representation(name):
    module, inputs = make(name)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert repr(again) == repr(module)
    assert repr(module).startswith(name)
    assert torch.equal(again(*inputs), module(*inputs))


class Largest(TorchDispatchMode):
    """Notes the most elements of a result of any operator."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@every_loss
@pytest.mark.parametrize("backend", ["torch", "reference", TRITON])
def test_explain_returns_the_plans_of_a_call_and_computes_no_scores(name, backend, monkeypatch):
    """Nor does it change what the loss remembers, such as a queue."""
    monkeypatch.setitem(globals(), "N", 64)
    module, inputs = make(name, backend=backend)
    module = module.to(DEVICE.get(backend, "cpu"))
    inputs = [x.detach().to(DEVICE.get(backend, "cpu")).requires_grad_(x.requires_grad) for x in inputs]
    before = copy.deepcopy(module.state_dict())
    with Largest() as work:
        plans = module.explain(*inputs)
    assert work.elements < N * N
    assert {plan.backend for plan in plans} == {backend}
    assert all(plan.reason for plan in plans)
    assert all(plan.gradients for plan in plans[: 1 if name == "DualTemperatureLoss" else None])  # its second has none
    assert all((plan.name == "reference") == (backend == "reference") for plan in plans)
    assert len(str(plans).splitlines()) == len(plans) > 0
    assert all(torch.equal(x, before[key]) for key, x in module.state_dict().items())
    seen = watch_plans(monkeypatch)
    module(*inputs)
    assert set(plans) <= set(seen)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda **o: DistillationLoss(objective="kl_div", **o), [(N,)] * 4),
        (lambda **o: DistillationLoss(alpha=0.5, symmetric=True, **o), [(N,)] * 4),
        (lambda **o: GroupedInfoNCELoss(D, distillation="kl_div", **o), [(N,), (N * D,), (N,)]),
        (lambda **o: GroupedInfoNCELoss(D, distillation="m3_kd_loss", **o), [(N,), (N * D,), (N,)]),
        (lambda **o: GuidedInfoNCELoss(negative_mode="paired", **o), [(N,), (N,), (N, 3)]),
        (lambda **o: MoCoLoss(D, queue_size=500, reduction="none", **o), [(N,), (N,)]),
    ],
    ids=["distilled", "both ways", "kl_div", "m3_kd_loss", "paired guide", "queue"],
)
def test_explain_multiplies_and_copies_nothing_large(make, shapes, backend):
    loss, inputs = make(backend=backend), [rows(*shape) for shape in shapes]
    with FlopCounterMode(display=False) as products, PeakMemory() as memory:
        loss.explain(*inputs)
    assert products.get_total_flops() == 0
    assert memory.largest <= max(x.nbytes for x in inputs)


def test_explain_raises_what_the_call_raises():
    with pytest.raises(ValueError, match="view_b must have shape"):
        NTXentLoss().explain(rows(N), rows(N + 1))
    loss, inputs = make("FusedInfoNCELoss")
    assert loss(*inputs).item() > 0  # what follows a mistake computes again


@every_loss
def test_create_graph_is_refused(name):
    module, inputs = make(name)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(module(*inputs), inputs[0], create_graph=True)


@every_loss
@pytest.mark.parametrize("backend", ["torch", TRITON, "reference"])
def test_a_row_whose_norm_overflows_makes_the_loss_nan(name, backend):
    """Taken for zeros, as by F.normalize, it would be a legitimate row and the loss a plausible number."""
    loss, inputs = make(name, backend=backend)
    device = DEVICE.get(backend, "cpu")
    inputs = [x.detach().to(device, copy=True) for x in inputs]
    assert loss.to(device)(*inputs).isfinite().all()
    inputs[0][1] *= 1e20
    assert inputs[0].isfinite().all()
    if name == "DCLLoss" and device == "cpu":  # whose weights of the positives are checked where that is free
        with pytest.raises(ValueError, match="positive_weight must be finite, got nan"):
            loss(*inputs)
    else:
        assert loss(*inputs).isnan()


def test_a_queue_does_not_take_a_key_whose_norm_overflows_for_zeros():
    loss = MoCoLoss(4, queue_size=6)
    loss.enqueue(torch.full((1, 4), 1e20))
    assert loss.queue[:, 0].isnan().all()
