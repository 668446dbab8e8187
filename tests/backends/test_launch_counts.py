"""What a call launches and allocates on a GPU: at small sizes launches, and not arithmetic, are what it costs."""

import collections
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from support.helpers import DEVICE, TRITON
from torch.utils._python_dispatch import TorchDispatchMode

from fused_infonce import FusedInfoNCELoss, NTXentLoss, checks, explain, info_nce, nt_xent
from fused_infonce.backends import plan

pytest.importorskip("fused_infonce.backends.triton", reason="triton is not installed", exc_type=ImportError)

from fused_infonce.backends.triton import accumulate, dense, tiles
from fused_infonce.backends.triton.launch import Excluded, Side
from fused_infonce.backends.triton.statistics import row_states, unwritten

VIEWS = {"view", "expand", "slice", "select", "t", "transpose", "permute", "unsqueeze", "detach", "alias", "unbind"}
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided"}
OTHER = {"fill_"}  # of a fresh allocation with NaN, by conftest


class Watch(TorchDispatchMode):
    """Operators that launch a kernel, and bytes of what is allocated."""

    def __init__(self):
        super().__init__()
        self.launched, self.bytes = collections.Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ALLOCATIONS:
            self.bytes += result.nbytes
        elif name not in VIEWS | OTHER:
            self.launched[name] += 1
        return result


@pytest.fixture
def watch(monkeypatch):
    """Kernels are counted and not run, in the tiles of a GPU."""
    found = Watch()
    monkeypatch.setattr(tiles, "architecture", lambda _: "sm_90")

    def run(kernel, grid, **arguments):
        found.launched["triton"] += min(grid) > 0

    def launch(self, *tensors):
        found.launched["triton"] += min(self.grid) > 0

    monkeypatch.setattr(dense.Launch, "__call__", launch)
    for launcher in ("coefficients", "finish", "gradient", "paired", "rows", "statistics"):
        monkeypatch.setattr(import_module(f"fused_infonce.backends.triton.{launcher}"), "run", run)
    return found


def unit(x):
    return F.normalize(x, dim=-1)


def cross_entropy(logits, labels, symmetric=False):
    loss = F.cross_entropy(logits, labels)
    return (loss + F.cross_entropy(logits.T, labels)) / 2 if symmetric else loss


def one(query, key):
    return cross_entropy(unit(query) @ unit(key).T / 0.05, torch.arange(len(query)))


def both(query, key):
    return cross_entropy(unit(query) @ unit(key).T / 0.05, torch.arange(len(query)), True)


def own(view_a, view_b):
    rows = unit(torch.cat([view_a, view_b]))
    logits = (rows @ rows.T / 0.05).fill_diagonal_(-torch.inf)
    return cross_entropy(logits, torch.arange(len(rows)).roll(len(view_a)))


def learned(query, key):
    t = torch.tensor(0.05, requires_grad=True)
    return cross_entropy(unit(query) @ unit(key).T / t, torch.arange(len(query)))


def info_nce_learned(query, key):
    return info_nce(query, key, temperature=torch.tensor(0.05, requires_grad=True), backend="triton")


LOSSES = {  # ours, the dense loss, and the most that ours launches: where scores are few, and where they are many
    "one": (lambda a, b: info_nce(a, b, temperature=0.05, backend="triton"), one, 8, 24),
    "symmetric": (lambda a, b: info_nce(a, b, temperature=0.05, backend="triton", symmetric=True), both, 8, 34),
    "self": (lambda a, b: nt_xent(a, b, 0.05, backend="triton"), own, 10, 20),
    "learned": (info_nce_learned, learned, 10, 30),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("width", [256, 64])
@pytest.mark.parametrize(
    ("few", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)], ids=str
)  # many products in bfloat16 are cast first on a CPU
@pytest.mark.interpreter
def test_fewer_kernels_than_the_dense_loss(name, width, few, dtype, watch, monkeypatch):
    ours, of_dense, most, most_of_many = LOSSES[name]
    if not few:
        monkeypatch.setattr(plan, "GPU_DENSE_WIDE", 0)
    counts = []
    for loss in (ours, of_dense):
        inputs = [torch.randn(512, width, dtype=dtype).requires_grad_() for _ in range(2)]
        watch.launched.clear()
        with watch:
            loss(*inputs).backward()
        counts.append(watch.launched.total())
    assert 0 < counts[0] <= (most if few else most_of_many) < counts[1], watch.launched


@pytest.mark.interpreter
def test_a_learned_temperature_that_cannot_be_read_launches_what_a_number_does(watch, monkeypatch):
    """On a GPU: its gradient is multiplied by the upstream, and there is no tensor to make of a number."""
    monkeypatch.setattr(checks, "values_are_free", lambda _: False)
    launched = []
    for loss in (LOSSES["one"][0], info_nce_learned):
        watch.launched.clear()
        with watch:
            loss(*[torch.randn(512, 64).requires_grad_() for _ in range(2)]).backward()
        launched.append(watch.launched.copy())
    number, tensor = launched
    assert number - tensor == {"full": 1}
    assert tensor - number == {"mul": 1, "lift_fresh": 1}  # that is the test's tensor


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.interpreter
def test_a_forward_alone_launches_less(name, watch):
    ours, *_ = LOSSES[name]
    inputs = [torch.randn(512, 64) for _ in range(2)]
    with watch, torch.no_grad():
        ours(*inputs)
    assert watch.launched["triton"] == 4
    assert watch.launched.total() <= 8


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"symmetric": True}], ids=str)
@pytest.mark.interpreter
def test_sums_of_several_blocks_do_not_start_from_zeros(options, watch):
    inputs = [torch.randn(1024, 128).requires_grad_() for _ in range(2)]
    options |= {"temperature": 0.05, "backend": "triton", "workspace_limit": 3 << 20}
    (chosen,) = explain(*inputs, **options)
    assert chosen.rows * chosen.cols < 1024 * 1024
    with watch:
        info_nce(*inputs, **options).sum().backward()
    assert watch.launched["triton"] > 0
    assert not [name for name in watch.launched if "zero" in name]


@pytest.mark.parametrize("name", ["one", "symmetric", "self"])
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.interpreter
def test_recording_merges_states_that_are_there(name, few, watch, monkeypatch):
    """A launch for each direction of few scores and none of many; nothing is read, or as large as the scores.

    Beside it there are the temperature and the mask of the rows that count, `ones_like`.
    """
    options = {"temperature": 0.05, "backend": "triton"} | ({"symmetric": True} if name == "symmetric" else {})
    if not few:
        monkeypatch.setattr(plan, "GPU_DENSE_WIDE", 0)
    counts, sizes = [], []
    for record in (False, True):
        loss = (NTXentLoss if name == "self" else FusedInfoNCELoss)(**options, record=record)
        inputs = [torch.randn(512, 64).requires_grad_() for _ in range(2)]
        watch.launched.clear()
        watch.bytes = 0
        with watch:
            loss(*inputs).backward()
        counts.append(watch.launched.copy())
        sizes.append(watch.bytes)
    more, rows = counts[1] - counts[0], len(loss.recorded.pos)
    directions = few * (1 + (name == "symmetric"))
    assert more["triton"] == directions
    assert set(more) <= {"triton", "clone", "cat", "ones_like"}
    assert sizes[1] - sizes[0] <= 8 * 4 * rows


@pytest.mark.parametrize("limit", [1 << 22, 1 << 26, 1 << 28])
@pytest.mark.parametrize("size", [4096, 1 << 17, 1 << 21])
@pytest.mark.parametrize("columns", ["", "other", "own"])
def test_states_stay_within_the_limit(size, columns, limit, watch, monkeypatch):
    """On a device of 132 processors, whatever they would like to be given."""
    monkeypatch.setattr(tiles, "processors", lambda _: 132)
    x = torch.empty(size, 64, dtype=torch.bfloat16, device="meta")
    of_columns = unwritten(torch.empty(size, device="meta")) if columns else None
    side = Side(x, None)
    with watch:
        row_states(side, side, Excluded(), of_columns, limit, unshifted=False, mean=True, half=columns == "own")
    least = (3 if columns else 1) * 12 * size  # one slot of row states, two of columns': nothing can be done in less
    assert watch.bytes <= max(limit, least)


@pytest.mark.parametrize("device", [pytest.param(DEVICE["triton"], marks=TRITON.marks)])
@pytest.mark.parametrize("limit", [None, 1 << 14], ids=["whole", "blocks"])
def test_products_added_where_they_lie_give_the_same_gradients(device, limit, monkeypatch):
    """The same gradients; a CPU's library, which has no such product, is stood in for."""
    inputs = [torch.randn(200, 64, device=device).bfloat16().requires_grad_() for _ in range(2)]

    def gradients():
        loss = info_nce(*inputs, temperature=0.05, reduction="none", backend="triton", workspace_limit=limit).sum()
        return torch.autograd.grad(loss, inputs)

    def addmm(out_too, a, b, *, beta, out_dtype, out):
        assert out_too is out
        added.append(beta)
        return out.addmm_(a.to(out_dtype), b.to(out_dtype), beta=beta)

    added = []
    monkeypatch.setattr(accumulate, "adds_in_place", lambda _: False)
    apart = gradients()
    monkeypatch.setattr(accumulate, "adds_in_place", lambda _: True)
    if device == "cpu":
        monkeypatch.setattr(torch, "addmm", addmm)
    for got, want in zip(gradients(), apart, strict=True):
        torch.testing.assert_close(got, want)
    assert (0 in added and (1 in added or limit is None)) or device != "cpu"  # written first, then added to


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.interpreter
def test_factors_are_widened_only_where_products_cannot_be(wide, monkeypatch):
    """As on an AMD GPU, whose older PyTorch has no such product; a CPU's library, which has none, is stood in for."""
    multiply, seen = torch.mm, []

    def mm(a, b, *, out_dtype=None):
        seen.append((a.dtype, out_dtype))
        return multiply(a, b) if out_dtype is None else multiply(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(accumulate, "multiplies_wide", lambda _: wide)
    a, b = torch.randn(12, 40).bfloat16(), torch.randn(40, 16).bfloat16()
    side, sums = Side(torch.zeros(24, 16).bfloat16(), None), accumulate.Sums(1 << 12)
    for start in (0, 12, 0):
        sums.add(0, side, slice(start, start + 12), a, b)
    want = a.float() @ b.float()
    torch.testing.assert_close(sums.of[0][0], torch.cat([2 * want, want]))
    assert set(seen) == ({(torch.bfloat16, torch.float32)} if wide else set())


@pytest.mark.parametrize("device", [pytest.param(DEVICE["triton"], marks=TRITON.marks)])
def test_only_a_gpu_may_add_products_in_place(device):
    for able in (accumulate.adds_in_place, accumulate.multiplies_wide):
        assert able(torch.device(device)) in ({False} if device == "cpu" else {False, True})
