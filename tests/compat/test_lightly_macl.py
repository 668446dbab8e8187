"""compat.lightly's `MACLLoss` has the values and gradients of lightly's, where that is accurate."""

from __future__ import annotations

import copy
import inspect
import random

import pytest
import torch
from support.helpers import evaluate
from support.libraries import library, of_lightly, seeds
from support.side_by_side import error_of, refuse_fallback

library("lightly.loss.ntx_ent_loss", of_lightly)
original = library("lightly.loss.macl_loss", of_lightly)

from fused_infonce.compat import lightly as drop_in  # noqa: E402


def views(n, d, spread, dtype=torch.float32):
    z0 = torch.randn(n, d)
    z1 = spread * z0 + torch.randn(n, d)
    return {name: (x * (0.5 + torch.rand(n, 1))).to(dtype) for name, x in (("z0", z0), ("z1", z1))}


def largest_share(inputs, loss):
    """The largest P of a row, near 1 where the original loses digits."""
    z = torch.nn.functional.normalize(torch.cat([*inputs.values()]).double(), dim=1)
    n = len(z) // 2
    cosines = z @ z.T
    cosines.fill_diagonal_(-torch.inf)
    pos = cosines[torch.arange(2 * n), torch.arange(2 * n).roll(n)]
    t = loss.temperature * (1 + loss.alpha * (pos.mean() - loss.A_0))
    return torch.softmax(cosines / t, 1)[torch.arange(2 * n), torch.arange(2 * n).roll(n)].max().item()


@pytest.mark.parametrize("seed", seeds(120))
def test_equals_the_original(seed, monkeypatch):
    """Within 1e-5 where no row is told apart more surely than 0.999; else the original's 1e-8 / (1 - P) shows."""
    refuse_fallback(monkeypatch, drop_in)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    options = {"temperature": 10 ** draw.uniform(-0.8, 0), "alpha": draw.random(), "A_0": draw.choice([0.0, 0.3])}
    ours, theirs = drop_in.MACLLoss(**options), original.MACLLoss(**options)
    inputs = views(draw.randint(2, 40), draw.choice([3, 8, 17, 64]), draw.choice([0.0, 0.5, 1.0]))
    exact = {name: x.double() for name, x in inputs.items()}
    lost = 2e-8 / (1 - largest_share(inputs, ours))
    for rows, bound in ((exact, 1e-10), (inputs, 1e-5)):
        got, want = evaluate(ours, rows), evaluate(theirs, rows)
        truth = evaluate(theirs, exact)
        assert got[0].dtype == want[0].dtype
        assert got[0].shape == want[0].shape
        for x, y, true in [(got[0], want[0], truth[0]), *((got[1][k], want[1][k], truth[1][k]) for k in rows)]:
            assert x.dtype == y.dtype
            assert (x - true).norm() <= (bound + lost) * true.norm()
            if rows is inputs:
                assert (x - y).norm() <= (bound + lost) * true.norm() + 2 * (y - true).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_dtype_is_the_originals_and_float32_under_autocast(dtype, autocast):
    """As of the original on a GPU; on a CPU its autocast leaves a loss in bfloat16."""
    inputs = views(6, 5, 1.0, dtype)
    seen = torch.bfloat16 if autocast else dtype  # what its products are of
    truth = original.MACLLoss()(**{name: x.to(seen).double() for name, x in inputs.items()})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = drop_in.MACLLoss()(**inputs)
    assert got.dtype == (torch.float32 if autocast else original.MACLLoss()(**inputs).dtype)
    torch.testing.assert_close(got.double(), truth, rtol=max(torch.finfo(got.dtype).eps / 2, 1e-5), atol=0)


def test_names_order_and_defaults_are_the_originals():
    for name in ("__init__", "forward"):
        a, b = (
            [(p.name, p.default, p.kind) for p in inspect.signature(getattr(m.MACLLoss, name)).parameters.values()]
            for m in (drop_in, original)
        )
        assert a == b
    assert isinstance(drop_in.MACLLoss(), original.MACLLoss)
    copy.deepcopy(drop_in.MACLLoss())


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"alpha": 1.5}, {"A_0": -0.1}, {"temperature": "0.1"}])
def test_a_bad_option_raises_what_the_original_raises(options):
    want = error_of(original.MACLLoss, **options)
    assert want in (ValueError, TypeError)
    assert error_of(drop_in.MACLLoss, **options) is want


@pytest.mark.filterwarnings("ignore:.*the original's own code")
@pytest.mark.parametrize(
    "bad",
    [
        {"z1": torch.randn(7, 5)}, {"z1": torch.randn(6, 4)}, {"z1": torch.randn(6, 5).double()}, {"z0": None},
        {"z0": torch.ones(0, 5), "z1": torch.ones(0, 5)}, {"z0": torch.randn(6)},
    ],
)  # fmt: skip
def test_bad_input_raises_or_returns_what_the_original_does(bad):
    arguments = views(6, 5, 1.0) | bad
    want = error_of(original.MACLLoss(), **arguments)
    assert error_of(drop_in.MACLLoss(), **arguments) is want
    if want is None:
        got = drop_in.MACLLoss()(**arguments)
        torch.testing.assert_close(got, original.MACLLoss()(**arguments), equal_nan=True)
