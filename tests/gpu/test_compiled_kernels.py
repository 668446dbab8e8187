"""On a GPU with compiled kernels: accuracy at sizes of many tiles, the capture of graphs, no synchronisation, memory.

The other tests run there too, with the Triton backend on real tensors. See conftest.py for these without a GPU.
"""

import math
from functools import partial

import pytest
import torch
from oracles import info_nce as dense
from support.helpers import bounds, check, embeddings, error, evaluate, info_nce, on, stretch, watch_plans
from support.stand_in import DEVICE, captured, forbid_waiting, size, synchronize

from benchmarks.contest import peak_bytes
from fused_infonce import FusedInfoNCELoss, explain
from fused_infonce.backends.device import facts

pytestmark = pytest.mark.usefixtures("triton_device")
MIB = 2**20
OPTIONS = {
    "default": {},
    "symmetric": {"symmetric": True},
    "none": {"reduction": "none"},
    "raw": {"normalize": False},
    "unpaired": {"negatives": (300,), "in_batch_negatives": True},
    "paired": {"negatives": (16,), "negative_mode": "paired", "in_batch_negatives": True},
}


def inputs_of(n, d, dtype, t=0.05, kind="medium", negatives=()):
    """Of few and short rows without a GPU."""
    n, d = size(n, min(n, 33)), size(d, min(d, 24))
    negatives = tuple(size(x, min(x, 33)) for x in negatives)
    rows = embeddings(kind, n, d, *negatives)
    names = ("query", "positive_key", "negative_keys")
    inputs = {name: stretch(x, 0.8, 1.25).to(dtype) for name, x in zip(names, rows, strict=True) if x is not None}
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    return inputs | {"temperature": torch.tensor(t, dtype=stats)}


def call(option, n, d, dtype, t=0.05, kind="medium"):
    options = dict(OPTIONS[option])
    negatives = options.pop("negatives", ())
    shape = (n, *negatives) if options.get("negative_mode") == "paired" else negatives
    return inputs_of(n, d, dtype, t, kind, shape), options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("d", [64, pytest.param(100, marks=pytest.mark.sanitizer), 256, 312, 384, 768])
def test_losses_and_gradients_keep_the_bounds(dtype, option, d):
    """At D = 312 with an odd number of rows, so that nothing is a multiple of 16."""
    n = (1000 if dtype != torch.float64 else 300) + (d == 312)
    inputs, options = call(option, n, d, dtype)
    check("triton", inputs, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("plan", ["workspace", "streaming"])
@pytest.mark.parametrize("kind", ["tight", "cone_98"])
@pytest.mark.parametrize("t", [0.01, 0.05, 1.0])
def test_each_plan_keeps_the_bounds(dtype, plan, kind, t, monkeypatch):
    """In several blocks, with a ragged last one."""
    plans = watch_plans(monkeypatch, name=plan, rows=600, cols=500)
    for option in ("default", "symmetric"):
        inputs, options = call(option, 1111, 128, dtype, t, kind)
        check("triton", inputs, **options)
    assert plans


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", ["workspace", "streaming"])
@pytest.mark.parametrize(("n", "d"), [(17, 8), (1, 64), (1111, 24), (1111, 128), (1111, 320)])
def test_tensor_descriptors_keep_the_bounds(dtype, plan, n, d, monkeypatch):
    """Tiles that reach past the ends of the tensors, loaded by TMA."""
    tiles = pytest.importorskip("fused_infonce.backends.triton.tiles")
    if tiles.architecture(DEVICE) not in tiles.HAS_TMA:
        pytest.skip("this GPU does not load through tensor descriptors")
    monkeypatch.setattr(tiles, "FORCE_TMA", True)
    watch_plans(monkeypatch, name=plan, rows=600, cols=500)
    for option in ("default", "symmetric"):
        inputs, options = call(option, n, d, dtype)
        check("triton", inputs, **options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_triton_and_torch_agree(option, dtype):
    """Both on the GPU, each within its bound of the truth, at a size whose plan is the automatic one."""
    inputs, options = call(option, 5000 if option != "paired" else 1000, 128, dtype)
    inputs = on(DEVICE, inputs)
    upstream = torch.rand(len(inputs["query"]), device=DEVICE) if option == "none" else None
    ours, theirs = (evaluate(info_nce, inputs, upstream, backend=b, **options) for b in ("triton", "torch"))
    loss_bound, gradient_bound = bounds(dtype, 0.05)
    assert error(ours[0], theirs[0]) <= 2 * loss_bound
    for name, want in theirs[1].items():
        assert error(ours[1][name], want) <= 2 * (1e-4 if name == "temperature" else gradient_bound), name


@pytest.mark.gpu
def test_auto_is_triton(monkeypatch):
    plans = watch_plans(monkeypatch)
    info_nce(*torch.randn(2, 8, 16, device="cuda"))
    assert plans[0].backend == "triton"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_graph_replays_on_other_values(option, dtype):
    """Forward and backward are captured, and replay on other values."""
    inputs, options = call(option, 500, 96, dtype)
    static = {name: x.requires_grad_() for name, x in on(DEVICE, inputs).items()}
    loss_of = FusedInfoNCELoss(**options, backend="triton")
    arguments = [static.get(name) for name in ("query", "positive_key", "negative_keys")]

    def step():
        loss = loss_of(*arguments, temperature=static["temperature"])
        return loss, torch.autograd.grad(loss.sum(), list(static.values()))

    replay, (loss, gradients) = captured(step)
    for seed in (1, 2):
        torch.manual_seed(seed)
        fresh, _ = call(option, 500, 96, dtype)
        with torch.no_grad():
            for name, x in fresh.items():
                static[name].copy_(x)
        replay()
        want_loss, want_gradients = step()
        assert torch.equal(loss, want_loss)
        assert all(torch.equal(x, y) for x, y in zip(gradients, want_gradients, strict=True))


@pytest.fixture
def no_synchronisation():
    yield lambda: forbid_waiting(True)
    forbid_waiting(False)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("extra", ["float", "scalar", "on the cpu", "per row", "target", "ids"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_call_does_not_wait_for_the_gpu(option, extra, backend, no_synchronisation):
    inputs, options = call(option, 500, 64, torch.bfloat16)
    if options.get("symmetric") and extra == "target":
        with pytest.raises(ValueError, match="symmetric"):
            info_nce(**on(DEVICE, inputs), target=torch.arange(len(inputs["query"]), device=DEVICE), **options)
        return
    inputs = on(DEVICE, inputs)
    n = len(inputs["query"])
    t = inputs.pop("temperature")
    if extra == "float":
        options["temperature"] = 0.05
    else:
        kinds = {"on the cpu": t.cpu(), "per row": t.expand(n).contiguous()}
        inputs["temperature"] = kinds.get(extra, t)
    if extra == "target":
        options |= {"target": torch.randint(n, (n,), device=DEVICE)}
    if extra == "ids":
        options |= {"key_ids": torch.randint(99, (n,), device=DEVICE)}
        if "negative_keys" in inputs:
            options |= {"negative_ids": torch.randint(99, inputs["negative_keys"].shape[:-1], device=DEVICE)}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def step():
        loss = info_nce(**leaves, **options, backend=backend)
        return torch.autograd.grad(loss.sum(), [x for x in leaves.values() if x.device.type == DEVICE.type])

    step()  # compiles
    no_synchronisation()
    gradients = step()
    forbid_waiting(False)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_negatives_by_index_keep_the_bounds_and_do_not_wait(dtype, no_synchronisation):
    """A row of the table that every query uses is summed in parts."""
    inputs = inputs_of(1000, 312, dtype, negatives=(700,))
    n, m = len(inputs["query"]), len(inputs["negative_keys"])
    inputs["negative_index"] = torch.randint(-1, m, (n, 16))
    inputs["negative_index"][:, 0] = 3
    check("triton", inputs, in_batch_negatives=True)
    inputs = on(DEVICE, inputs)
    no_synchronisation()
    _, gradients = evaluate(info_nce, inputs, in_batch_negatives=True, backend="triton")
    forbid_waiting(False)
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.gpu
def test_a_temperature_on_the_cpu_gets_its_gradient_there():
    inputs = on("cuda", inputs_of(64, 32, torch.float32))
    t = torch.tensor([0.07], requires_grad=True)
    inputs.pop("temperature")
    info_nce(**inputs, temperature=t).backward()
    _, want = evaluate(info_nce, inputs | {"temperature": t.detach().cuda()})
    assert t.grad.device.type == "cpu"
    assert error(t.grad, want["temperature"]) <= 1e-5


@pytest.mark.gpu  # values of a CPU's tensors are read, and raise
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("bad", [-1, 40, 10**9, -(2**62), 2**62])
def test_a_bad_target_gives_nan_and_touches_nothing_else(backend, bad):
    inputs = on("cuda", inputs_of(40, 32, torch.float32))
    target = torch.arange(40, device="cuda")
    good = evaluate(info_nce, inputs | {"target": target}, reduction="none", backend=backend)
    target = target.clone()
    target[7] = bad
    loss, gradients = evaluate(info_nce, inputs | {"target": target}, reduction="none", backend=backend)
    rows = torch.arange(40, device="cuda") != 7
    assert torch.equal(loss.isnan(), ~rows)
    assert torch.equal(loss[rows], good[0][rows])
    assert torch.equal(gradients["query"][rows], good[1]["query"][rows])
    assert info_nce(**inputs, target=target, backend=backend).isnan()
    synchronize()  # an illegal access would be reported here


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
def test_a_bad_temperature_gives_nan(backend, bad):
    inputs = on("cuda", inputs_of(40, 32, torch.float32))
    inputs.pop("temperature")
    t = torch.full((40,), 0.1, device="cuda")
    t[3] = bad
    loss = info_nce(**inputs, temperature=t, reduction="none", backend=backend)
    assert torch.equal(loss.isnan(), torch.arange(40, device="cuda") == 3)
    for scalar in (torch.tensor(bad, device="cuda"), torch.tensor([bad], device="cuda")):
        assert info_nce(**inputs, temperature=scalar, backend=backend).isnan()
    for host in (torch.tensor(bad), bad):  # values that are free to read
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            info_nce(**inputs, temperature=host, backend=backend)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("limit", [None, 32 * MIB])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_peak_memory_is_bounded(options, d, limit, backend):
    """The dense loss would need gigabytes."""
    n, d = size(32768, 33), size(d, 24)
    query, key = (torch.randn(n, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(2))

    def step():
        query.grad = key.grad = None
        info_nce(query, key, backend=backend, workspace_limit=limit, **options).sum().backward()

    step()  # what is allocated once: library workspaces, compiled kernels
    peak, _ = peak_bytes(step, DEVICE)
    single = 2 * n * d * 4  # the inputs, if they were float32
    assert peak <= (limit or facts(query.device).limit) + 4 * single
    assert peak < n * n * 4 / 2 or n < 32768


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("option", ["default", "symmetric", "none"])
@pytest.mark.parametrize("plan", ["workspace", "streaming"])
def test_a_repeated_call_gives_the_same_bits(dtype, option, plan, monkeypatch):
    watch_plans(monkeypatch, name=plan)
    inputs, options = call(option, 3000, 128, dtype)
    inputs = on(DEVICE, inputs)
    if option != "symmetric":
        inputs["target"] = torch.randint(33, (len(inputs["query"]),), device=DEVICE)
    first, *others = [evaluate(info_nce, inputs, backend="triton", **options) for _ in range(size(4, 2))]
    for loss, gradients in others:
        assert torch.equal(loss, first[0])
        assert all(torch.equal(gradients[name], x) for name, x in first[1].items())


def test_rows_beyond_32_bit_offsets_are_read_where_they_lie():
    """The last rows start beyond element 2^31; 4 GiB for the queries and 4 for their gradient."""
    n, d = size(2**21 + 40, 80), size(1024, 24)
    query = torch.zeros(n, d, device=DEVICE, dtype=torch.bfloat16)
    query[-40:] = torch.randn(40, d, device=DEVICE)
    key = torch.randn(40, d, device=DEVICE, dtype=torch.bfloat16)
    target = torch.full((n,), -100, device=DEVICE)
    target[-40:] = torch.arange(40, device=DEVICE)
    got = evaluate(info_nce, {"query": query, "positive_key": key, "target": target}, backend="triton")
    want = evaluate(info_nce, {"query": query[-40:].clone(), "positive_key": key}, backend="triton")
    assert error(got[0], want[0]) <= 1e-5
    assert error(got[1]["query"][-40:], want[1]["query"]) <= 5e-3
    assert not got[1]["query"][:-40].any()
    assert error(got[1]["positive_key"], want[1]["positive_key"]) <= 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["positive_key", "negative_keys", "target", "key_ids", "temperature"])
def test_inputs_on_two_devices_are_refused(which):
    inputs = on("cuda", inputs_of(8, 4, torch.float32, negatives=(5,)))
    inputs |= {"target": torch.arange(8, device="cuda"), "key_ids": torch.arange(8, device="cuda")}
    inputs |= {"temperature": torch.ones(8, device="cuda")}
    info_nce(**inputs, in_batch_negatives=True)
    inputs[which] = inputs[which].cpu()
    with pytest.raises(ValueError, match=rf"{which} must be on cuda.*got cpu"):
        info_nce(**inputs, in_batch_negatives=True)


@pytest.mark.gpu
def test_another_than_the_current_device_computes_the_same():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = on("cuda:1", inputs_of(64, 32, torch.float32))
    with torch.cuda.device(0):
        loss, gradients = evaluate(info_nce, inputs)
    want = evaluate(info_nce, on("cuda:0", inputs))
    assert loss.device.index == 1
    assert error(loss, want[0]) <= 1e-6
    assert all(error(gradients[name], x) <= 1e-5 for name, x in want[1].items())


@pytest.mark.parametrize("d", [128, 768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_one_pass_keeps_the_bounds_and_does_not_wait(d, dtype, no_synchronisation):
    """A host temperature is what onepass needs: within bounds, the same twice, captured, without synchronisation."""
    n = size(5000, 33)
    rows = torch.randn(2, n, d)
    rows[1] += rows[0]
    rows[0, 7], rows[1, 9] = 0, 0
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in rows]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert explain(*inputs, temperature=0.05, backend="triton")[0].name == "onepass"

    def step(tensors, function=info_nce, **options):
        loss = function(*tensors, temperature=0.05, **options)
        return loss, *torch.autograd.grad(loss, tensors)

    ours = partial(step, inputs, backend="triton")
    truth = step(exact, dense.info_nce)
    ours()
    no_synchronisation()
    first, second = ours(), ours()
    forbid_waiting(False)
    bound = bounds(dtype, 0.05, n)
    for value, again, want, most in zip(first, second, truth, (bound[0], bound[1], bound[1]), strict=True):
        assert torch.equal(value, again)
        assert error(value, want) <= most
    replay, held = captured(ours)
    replay()
    assert all(torch.equal(x, y) for x, y in zip(held, first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager(reduction, compiler):
    """`torch.compile(fullgraph=True)` on real tensors gives what eager gives.

    Its bits too, but where inductor compiles what is made of the statistics: its logarithms and sums are its own.
    """
    query, key = torch.randn(2, 512, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def loss(q, k):
        return info_nce(q, k, temperature=0.05, reduction=reduction).sum()

    torch._dynamo.reset()
    want = torch.autograd.grad(loss(query, key), (query, key))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(query, key), (query, key))
    for x, y in zip(got, want, strict=True):
        if compiler == "inductor" and reduction == "none":
            assert error(x, y) <= bounds(torch.bfloat16, 0.05)[1]
        else:
            assert torch.equal(x, y)
