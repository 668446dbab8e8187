"""Grouped InfoNCE and its distillations against dense code with one mask a group member."""

from __future__ import annotations

import pytest
import torch
from oracles import grouped as dense
from support.helpers import DEVICE, both, both_backends, cases, elsewhere, error, interpreted

from fused_infonce import GroupedInfoNCELoss, grouped_info_nce
from fused_infonce.backends import plan
from fused_infonce.losses import grouped

N, G, D = 4, 3, 5
KINDS = [None, "kl_div", "m3_kd_loss"]


def call(n=N, g=G, d=D, spare=0, dtype=torch.float64, device="cpu", grad=True):
    """Queries, passages of n + spare groups, and a teacher's scores."""
    query = torch.randn(n, d, dtype=torch.float64)
    passages = torch.randn((n + spare) * g, d, dtype=torch.float64)
    teacher = 2 * torch.randn(n, g, dtype=torch.float64)
    return [x.to(device, dtype).requires_grad_(grad and i < 2) for i, x in enumerate((query, passages, teacher))]


def both_of(inputs, teacher, backend, options):
    """Pairs of the values and gradients of ours and of the dense code; a third input is the temperature."""

    def call(function, **more):
        def loss(query, passages, *t):
            given = options | ({"temperature": t[0]} if t else {})
            return function(query, passages, G, teacher_scores=teacher, **given, **more)

        return loss

    return both([call(grouped_info_nce, backend=backend), call(dense.grouped_info_nce)], inputs)


@cases(
    lambda c: c["in_batch"] or c["distillation"] != "m3_kd_loss",
    pairs=True,
    distillation=KINDS,
    in_batch=[True, False],
    normalize=[True, False],
    reduction=["mean", "sum", "none"],
    temperature=["float", "scalar", "per row"],
    spare=[0, 2],
    blocks=["one", "several"],
)
def test_gradients_are_those_of_finite_differences_and_of_dense_code(
    backend, distillation, in_batch, normalize, reduction, temperature, spare, blocks, monkeypatch
):
    device = DEVICE[backend]
    if blocks == "several":
        monkeypatch.setattr(plan, "DENSE", 0)
    *inputs, teacher = call(spare=spare, device=device)
    options = {
        "in_batch_negatives": in_batch, "normalize": normalize, "reduction": reduction, "distillation": distillation,
        "offset": G if spare else 0,
    }  # fmt: skip
    if temperature == "float":
        options["temperature"] = 0.4
    else:
        shape = (N,) if temperature == "per row" else ()
        inputs.append((0.3 + 0.3 * torch.rand(shape, dtype=torch.float64, device=device)).requires_grad_())
    teacher = teacher if distillation else None
    limit = 200 if blocks == "several" else None

    def fused(query, passages, t=0.4):
        given = options | {"temperature": t}
        return grouped_info_nce(
            query, passages, G, teacher_scores=teacher, backend=backend, workspace_limit=limit, **given
        )

    assert interpreted(backend) or torch.autograd.gradcheck(fused, inputs, fast_mode=True)
    for ours, truth in both_of(inputs, teacher, backend, options):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distillation", KINDS)
@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_losses_and_gradients_keep_the_bounds_of_infonce(backend, dtype, distillation, temperature):
    """Against the dense code in float64 on the same numbers."""
    n, g, d = (17, 4, 24) if backend == "torch" else (6, 3, 16)
    query, passages, teacher = call(n, g, d, dtype=torch.float64, grad=False)
    passages.view(n, g, d)[:, 0] += query  # positives that are alike
    inputs = [x.to(DEVICE[backend], dtype).requires_grad_() for x in (query, passages)]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    teacher = teacher if distillation else None
    options = {"temperature": temperature, "distillation": distillation}
    moved = None if teacher is None else teacher.to(DEVICE[backend])
    got = grouped_info_nce(*inputs, g, teacher_scores=moved, backend=backend, **options)
    want = dense.grouped_info_nce(*exact, g, teacher_scores=teacher, **options)
    single = 1e-5 * max(1, 0.05 / temperature)
    assert got.dtype == torch.float32
    assert error(got, want) <= single
    bound = 5e-3 if dtype == torch.bfloat16 else single
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, exact), strict=True):
        assert a.dtype == dtype
        assert error(a, b) <= bound


@both_backends
def test_target_overrides_the_positive(backend):
    *inputs, _ = call(spare=1, device=DEVICE[backend])
    target = torch.tensor([7, 2, -100, 2], device=DEVICE[backend])
    for reduction in ("mean", "sum", "none"):
        for ours, truth in both_of(
            inputs, None, backend, {"target": target, "reduction": reduction, "temperature": 0.3}
        ):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)


@both_backends
def test_one_group_alone_has_no_nan_in_its_gradient(backend):
    """Nothing is outside the group: the last member has no competitors, and no NaN in its gradient."""
    *inputs, teacher = call(1, device=DEVICE[backend])
    t = torch.tensor(0.5, dtype=torch.float64, device=DEVICE[backend], requires_grad=True)
    for ours, truth in both_of([*inputs, t], teacher, backend, {"distillation": "m3_kd_loss"}):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)


@both_backends
def test_groups_of_one_are_info_nce(backend):
    query, passages, teacher = call(g=1, device=DEVICE[backend])
    plain = grouped_info_nce(query, passages, 1, backend=backend)
    options = {"teacher_scores": teacher, "backend": backend}
    torch.testing.assert_close(grouped_info_nce(query, passages, 1, distillation="m3_kd_loss", **options), plain)
    torch.testing.assert_close(grouped_info_nce(query, passages, 1, distillation="kl_div", **options), plain)


@pytest.mark.parametrize("wanted", range(3))
def test_a_divergence_makes_the_gradients_alone_that_are_needed(wanted):
    query, passages, teacher = call(grad=False)
    t = torch.full((N,), 0.2, dtype=torch.float64)

    def gradients(*needed):
        for i, x in enumerate((query, passages, t)):
            x.requires_grad_(i in needed)
        loss = grouped._Divergence.apply(query, passages, t, teacher, 0, True, 1)
        with torch.no_grad():
            return loss.grad_fn.apply(torch.ones_like(loss))[:3]

    every, one = gradients(0, 1, 2), gradients(wanted)
    assert [x is not None for x in one] == [i == wanted for i in range(3)]
    assert torch.equal(one[wanted], every[wanted])


def test_own_groups_are_not_copied(monkeypatch):
    seen = []

    def info_nce(query, key, negatives=None, **options):
        seen.append((key, negatives))
        return query.sum()

    monkeypatch.setattr(grouped, "info_nce", info_nce)
    query, passages, _ = call(spare=1)
    grouped_info_nce(query, passages, G, in_batch_negatives=False, offset=G)
    ((key, negatives),) = seen
    assert key.data_ptr() == passages[G].data_ptr()
    assert negatives.data_ptr() == passages[G + 1].data_ptr()
    assert (key.shape, negatives.shape) == ((N, D), (N, G - 1, D))


def test_the_mean_over_two_processes_is_the_loss_of_all():
    query, passages, teacher = call(2 * N)
    for distillation in KINDS:
        options = {"temperature": 0.1, "distillation": distillation}
        whole = grouped_info_nce(query, passages, G, teacher_scores=teacher if distillation else None, **options)
        parts = [
            grouped_info_nce(
                query[rank * N : (rank + 1) * N], passages, G, offset=rank * N * G,
                teacher_scores=teacher[rank * N : (rank + 1) * N] if distillation else None, **options,
            )
            for rank in range(2)
        ]  # fmt: skip
        torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=0)


def test_teachers_get_no_gradient_under_autocast_either():
    query, passages, teacher = call(dtype=torch.float32)
    teacher.requires_grad_()
    for distillation in KINDS[1:]:
        options = {"teacher_scores": teacher, "distillation": distillation}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = grouped_info_nce(query, passages, G, **options)
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, [query, teacher], allow_unused=True)[1] is None


def test_under_autocast_the_scores_of_a_group_stay_in_float32():
    """The teacher's term alone, which is of them, is that of rows that are not rounded."""
    query, passages, teacher = call(dtype=torch.float32)

    def term():
        options = {"in_batch_negatives": False, "reduction": "none"}
        plain = grouped_info_nce(query, passages, G, **options)
        return grouped_info_nce(query, passages, G, teacher_scores=teacher, distillation="kl_div", **options) - plain

    want = term()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(term(), want, rtol=1e-5, atol=1e-5)
        rounded = grouped_info_nce(query, passages, G)
    assert error(rounded, grouped_info_nce(query, passages, G)) > 1e-4


@pytest.mark.parametrize(
    ("distillation", "in_batch"), [(None, False), ("kl_div", True)]
)  # m3_kd_loss: in test_every_loss
def test_compiled_equals_eager(distillation, in_batch):
    query, passages, teacher = call(9, G, 8)
    loss = GroupedInfoNCELoss(G, temperature=0.1, distillation=distillation, in_batch_negatives=in_batch)
    teacher = teacher if distillation else None
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(query, passages, teacher)
        results.append((value, *torch.autograd.grad(value, (query, passages))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-14)


def test_module_equals_function():
    query, passages, teacher = call(spare=1, dtype=torch.float32)
    options = {"temperature": 0.3, "normalize": False, "reduction": "none"}
    got = GroupedInfoNCELoss(G, **options, distillation="kl_div")(query, passages, teacher, offset=G)
    want = grouped_info_nce(query, passages, G, **options, distillation="kl_div", teacher_scores=teacher, offset=G)
    assert torch.equal(got, want)
    target = torch.tensor([1, 4, 7, 0])
    got = GroupedInfoNCELoss(G, **options)(query, passages, target=target)
    assert torch.equal(got, grouped_info_nce(query, passages, G, **options, target=target))


QUERY, PASSAGES, TEACHER = torch.ones(N, D), torch.ones(N * G, D), torch.ones(N, G)
BAD = {
    "an array": ({"query": [1.0]}, TypeError, "query must be a tensor"),
    "passages by group": ({"passages": PASSAGES.view(N, G, D)}, ValueError, "passages must have 2 dimensions"),
    "integers": ({"passages": PASSAGES.long()}, TypeError, "passages must be float16"),
    "mixed dtypes": ({"passages": PASSAGES.double()}, TypeError, "passages must be torch.float32"),
    "mixed devices": ({"passages": elsewhere(*PASSAGES.shape)}, ValueError, "passages must be on cpu"),
    "components": ({"passages": torch.ones(N * G, D + 1)}, ValueError, f"passages must have {D} components"),
    "rows": ({"passages": PASSAGES[1:]}, ValueError, f"multiple of group_size={G} rows, got {N * G - 1}"),
    "too few groups": ({"passages": PASSAGES[G:]}, ValueError, f"passages must have {N * G} rows or more"),
    "group 0": ({"group_size": 0}, ValueError, "group_size must be 1 or more"),
    "group 2.0": ({"group_size": 2.0}, TypeError, "group_size must be an integer"),
    "group True": ({"group_size": True}, TypeError, "group_size must be an integer"),
    "offset below 0": ({"offset": -G}, ValueError, "offset must be 0 or more"),
    "offset in a group": ({"offset": 1}, ValueError, f"offset must be a multiple of group_size={G}"),
    "offset too large": ({"offset": G}, ValueError, f"passages must have {(N + 1) * G} rows or more"),
    "offset type": ({"offset": None}, TypeError, "offset must be an integer"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be positive and finite"),
    "temperature type": ({"temperature": "0.1"}, TypeError, "temperature must be a number"),
    "temperatures": ({"temperature": torch.ones(N + 1)}, ValueError, "temperature must be .*one value per row"),
    "target type": ({"target": [0] * N}, TypeError, "target must be an integer tensor"),
    "target shape": ({"target": torch.zeros(N + 1).long()}, ValueError, r"target must have shape \(4,\)"),
    "target range": ({"target": torch.full((N,), N * G)}, ValueError, r"target must be in \[0, 12\)"),
    "target and offset": (
        {"target": torch.zeros(N).long(), "offset": G, "passages": torch.ones(2 * N * G, D)}, ValueError,
        "target replaces offset",
    ),
    "target without in-batch": (
        {"target": torch.zeros(N).long(), "in_batch_negatives": False}, ValueError, "needs in_batch_negatives=True",
    ),
    "target and teacher": (
        {"target": torch.zeros(N).long(), "distillation": "kl_div", "teacher_scores": TEACHER}, ValueError,
        "target cannot be used with a distillation",
    ),
    "groups of one": ({"group_size": 1, "in_batch_negatives": False}, ValueError, "group_size must be above 1"),
    "distillation": ({"distillation": "kl", "teacher_scores": TEACHER}, ValueError, "distillation must be one of"),
    "no teacher": ({"distillation": "kl_div"}, ValueError, "needs teacher_scores"),
    "only a teacher": ({"teacher_scores": TEACHER}, ValueError, "teacher_scores need a distillation"),
    "m3": (
        {"distillation": "m3_kd_loss", "teacher_scores": TEACHER, "in_batch_negatives": False}, ValueError,
        "needs in_batch_negatives=True",
    ),
    "teacher type": (
        {"distillation": "kl_div", "teacher_scores": [[1.0]]}, TypeError, "teacher_scores must be a tensor",
    ),
    "teacher dtype": (
        {"distillation": "kl_div", "teacher_scores": TEACHER.long()}, TypeError, "teacher_scores must be float16",
    ),
    "teacher shape": (
        {"distillation": "kl_div", "teacher_scores": TEACHER.T}, ValueError, r"teacher_scores must have shape \(4, 3\)",
    ),
    "teacher elsewhere": (
        {"distillation": "kl_div", "teacher_scores": elsewhere(*TEACHER.shape)}, ValueError, "scores must be on",
    ),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "workspace": ({"workspace_limit": 0}, ValueError, "workspace_limit must be a number of bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_refused(what):
    replaced, kind, message = BAD[what]
    with pytest.raises(kind, match=message):
        grouped_info_nce(**({"query": QUERY, "passages": PASSAGES, "group_size": G} | replaced))


@pytest.mark.parametrize("what", ["group 0", "group 2.0", "temperature", "reduction", "backend", "workspace"])
def test_a_bad_option_of_the_module_is_refused(what):
    replaced, kind, message = BAD[what]
    with pytest.raises(kind, match=message):
        GroupedInfoNCELoss(**({"group_size": G} | replaced))
    with pytest.raises(ValueError, match="distillation must be one of"):
        GroupedInfoNCELoss(G, distillation="kl")
