"""`sweep` against the list of each row's products in float64: every option, backend and dtype, ranks and their ties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles.profile import profile as dense
from support.helpers import DEVICE, TRITON, embeddings
from support.memory import MIB, PeakMemory
from torch import Tensor

from fused_infonce import info_nce
from fused_infonce.temperature import Sweep, sweep

every_backend = pytest.mark.parametrize("backend", ["torch", "reference", TRITON])
N, M, D, H = 7, 9, 5, 3
RANGE = (0.02, 0.9)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not normalised": {"normalize": False},
    "symmetric": {"symmetric": True},
    "target": {"target": torch.tensor([8, 0, 3, 3, 5, 1, 2])},
    "key ids": {"key_ids": torch.tensor([0, 1, 0, 2, 3, 4, 4])},
    "ids and both directions": {
        "key_ids": torch.tensor([0, 1, 0, 2, 3, 4, 4]), "query_ids": torch.tensor([0, 1, 0, 2, 3, 0, 1]),
        "symmetric": True,
    },
    "ids and a target": {
        "key_ids": torch.arange(9) % 4, "query_ids": torch.arange(7) % 3, "target": torch.tensor([8, 0, 3, 3, 5, 1, 2])
    },
    "more keys": {"negatives": (4,)},
    "own keys": {"negatives": (N, H)},
}  # fmt: skip


def on(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def call(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return query, key and options of a call; the rows are of the dtype and held in float64."""
    options = dict(OPTIONS[name])
    m = M if "target" in options else N
    query, key = (torch.randn(size, D, dtype=torch.float64).to(dtype).double() for size in (N, m))
    if "negatives" in options:
        options["negatives"] = torch.randn(*options["negatives"], D, dtype=torch.float64).to(dtype).double()
    return query, key, options


def swept(query: Tensor, key: Tensor, options: dict[str, Any], backend: str, dtype: torch.dtype, **more: Any) -> Sweep:
    device = DEVICE.get(backend, "cpu")
    given = {name: on(device, x.to(dtype) if name == "negatives" else x) for name, x in options.items()}
    return sweep(query.to(device, dtype), key.to(device, dtype), RANGE, backend=backend, **given, **more)


def assert_same(found: Sweep, want: dict[str, Tensor], loose: float) -> None:
    """Compare in units of logits: `loose` of a log-sum, more below a temperature of 0.05, 10 times of a mean, and 100
    times of a variance.

    Without `normalize` a product is as long as the rows are.
    """
    beta = 1 / found.temperatures.double().cpu()[:, None]
    longest = max(1.0, want["pos"].abs().max().item(), want["hardest"].nan_to_num(0, 0, 0).abs().max().item())
    for name in ("above", "ties"):
        assert getattr(found, name).dtype == torch.int64
        assert torch.equal(getattr(found, name).cpu(), want[name]), name
    scale: dict[str, Any] = {"log_z": (0.05 * beta).clamp(min=1), "mean": 10, "variance": 100 * longest}
    for name in ("pos", "hardest", "log_z", "mean", "variance"):
        x, y = getattr(found, name).double().cpu(), want[name]
        assert x.shape == y.shape, name
        torch.testing.assert_close(x.isinf(), y.isinf())
        unit = {"log_z": 1.0, "mean": beta, "variance": beta**2}.get(name, 1.0)
        difference = ((x - y).nan_to_num(0, 0, 0) * unit).abs()
        assert (difference <= loose * longest * scale.get(name, 1.0)).all(), (name, difference.max().item())


@every_backend
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_what_dense_code_gives(name, backend):
    query, key, options = call(name)
    found = swept(query, key, options, backend, torch.float64)
    assert found.temperatures.dtype == torch.float64
    assert found.temperatures[0].item() == pytest.approx(0.9, rel=1e-15)
    assert 0.02 / math.sqrt(2) < found.temperatures[-1] <= 0.02
    assert_same(found, dense(query, key, found.temperatures.cpu(), **options), 1e-12)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_of_fewer_bits_is_float32_within_the_bounds(name, dtype, backend):
    query, key, options = call(name, dtype)
    found = swept(query, key, options, backend, dtype)
    assert found.log_z.dtype == torch.float32
    assert_same(found, dense(query, key, found.temperatures.double().cpu(), **options), 1e-5)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("limit", [1, 300, 5000])
def test_parts_of_any_size_give_the_same(name, limit):
    query, key, options = call(name)
    found = swept(query, key, options, "torch", torch.float64, workspace_limit=limit)
    assert_same(found, dense(query, key, found.temperatures, **options), 1e-12)


@every_backend
def test_rows_without_negatives_and_keys_that_are_left_out(backend):
    query, key = torch.randn(4, D, dtype=torch.float64), torch.randn(6, D, dtype=torch.float64)
    bias = torch.tensor([0, 0, 0, 0, -math.inf, 0]).double()
    target = torch.arange(4)
    options = {"target": target, "key_bias": bias}
    found = swept(query, key, options, backend, torch.float64)
    want = dense(query, key[[0, 1, 2, 3, 5]], found.temperatures.cpu(), target=target)
    assert_same(found, want, 1e-12)
    none = swept(query, key[:4], {"key_ids": torch.zeros(4, dtype=torch.int64)}, backend, torch.float64)
    assert_same(none, dense(query, key[:4], none.temperatures.cpu(), key_ids=torch.zeros(4)), 1e-12)
    assert none.nll(0.1) == 0
    assert not none.effective_negatives(0.1).any()
    assert not none.hardest_share(0.1).any()
    assert (none.confidence(0.1) == 1).all()


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value, backend):
    query, key = torch.randn(5, D), torch.randn(5, D)
    query[2, 1] = value
    for normalize in (True, False):
        found = swept(query, key, {"normalize": normalize}, backend, torch.float32)
        for name in ("log_z", "mean", "variance"):
            assert getattr(found, name).isnan().any(0).tolist() == [i == 2 for i in range(5)], name
        if normalize or math.isnan(value):
            assert found.above[2] == 4  # of four negatives
    poisoned = torch.randn(5, D)
    poisoned[0, 0] = -value
    found = swept(torch.randn(5, D), poisoned, {"normalize": False}, backend, torch.float32)
    assert found.log_z.isnan().any(0).tolist() == [False, True, True, True, True]


def test_every_function_of_a_temperature_is_that_of_the_logits():
    """On the ladder and between, where the interpolation is off by less than a hundred thousandth."""
    query, key, _ = embeddings("loose", 60, 8)
    found = sweep(query, key, (0.02, 1.0))
    for t in (*found.temperatures.tolist(), 0.85, 0.3, 0.0771, 0.03, 0.021):
        logits = query @ key.T / t
        others = logits.masked_fill(torch.eye(60, dtype=torch.bool), -math.inf)
        p, whole = torch.softmax(others, 1), torch.softmax(logits, 1)
        exact = {
            "nll": info_nce(query, key, temperature=t), "hardest_share": p.amax(1), "confidence": whole.amax(1),
            "effective_negatives": torch.exp(torch.special.entr(p).sum(1)), "probability": whole.diagonal(),
            "losses": F.cross_entropy(logits, torch.arange(60), reduction="none"),
        }  # fmt: skip
        rung = bool((found.temperatures == t).any())
        for name, want in exact.items():
            bound = 1e-10 if rung else 1e-3 if name == "effective_negatives" else 3e-5
            torch.testing.assert_close(getattr(found, name)(t), want, rtol=bound, atol=bound, msg=f"{name} at {t}")
        mean, variance = found.at(t).mean, found.at(t).variance
        d = query @ key.T
        torch.testing.assert_close(mean, (p * d).sum(1), rtol=0, atol=1e-10 if rung else 1e-3 * t)
        spread = (p * (d - (p * d).sum(1, True)) ** 2).sum(1)
        torch.testing.assert_close(variance, spread, rtol=0, atol=1e-10 if rung else 0.05 * t**2)


def ranks_of(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ranks by sorting every row's scores, where equal products have equal values: of small integers."""
    scores = query @ key.T
    pos = scores.diagonal()[:, None]
    descending = scores.sort(1, descending=True).values
    first = 1 + (descending > pos).sum(1)
    last = (descending >= pos).sum(1)
    return last, first


def test_ranks_are_those_of_sorting_with_planted_ties_and_copies():
    """Ties of other keys, copies of positives, and rows that repeat: integers, whose products are exact."""
    for case in range(200):
        generator = torch.Generator().manual_seed(case)
        n, d = 2 + case % 30, 1 + case % 5
        query, key = (
            torch.randint(-2, 3, (n, d), generator=generator).to([torch.float32, torch.float64][case % 2])
            for _ in range(2)
        )
        copies = torch.randint(n, (2, max(n // 3, 1)), generator=generator)
        key[copies[0]] = key[copies[1]]
        found = sweep(query, key, (0.5, 0.5), normalize=False)
        last, first = ranks_of(query, key)
        assert torch.equal(1 + found.above, first)
        assert torch.equal(1 + found.above + found.ties, last)
        for k in (1, 3, 10):
            assert found.recall(k) == ((last <= k).double().mean().item(), (first <= k).double().mean().item())
        reciprocal = [x.where(rank <= 3, 0).mean().item() for rank in (last, first) for x in [1 / rank.double()]]
        assert found.mrr(3) == pytest.approx(reciprocal, abs=1e-12)
        assert found.mrr() == pytest.approx([(1 / x.double()).mean().item() for x in (last, first)], abs=1e-12)
        assert found.median_rank() == tuple(x.double().quantile(0.5).item() for x in (last, first))


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [3, 64, 1000])
def test_a_copy_of_a_positive_is_tied_with_it_whatever_the_order_of_its_sum(d, dtype, backend):
    device = DEVICE.get(backend, "cpu")
    query, key = (torch.randn(40, d, device=device).to(dtype) for _ in range(2))
    key[20:] = key[:20] * 2 ** (torch.arange(20, device=device) % 3)[:, None]  # of another length, the same direction
    found = sweep(query, key, (0.1, 0.1), backend=backend)
    assert found.ties.tolist() == [1] * 40
    last = 1 + (query.double().cpu() @ F.normalize(key.double().cpu(), dim=1)[:20].T).sort(1, descending=True).indices
    ranks = 2 * (last - 1 == torch.arange(40)[:, None] % 20).int().argmax(1)
    assert (found.above.cpu() - ranks).abs().max() <= (2 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"key_ids": torch.arange(1400) // 2}], ids=str)
def test_memory_is_bounded(options):
    """Unit rows, results, a block of exponentials: no part of it grows with N M."""
    n, d, limit = 1400, 16, MIB // 2
    query, key = torch.randn(n, d), torch.randn(n, d)
    with PeakMemory() as memory:
        found = sweep(query, key, workspace_limit=limit, **options)
    results = sum(x.untyped_storage().nbytes() for x in vars(found).values())
    assert memory.peak <= 3 * results + 4 * query.nbytes + 2 * limit < 4 * n * n / 2


def test_mistakes_are_refused():
    query, key = torch.randn(4, D), torch.randn(5, D)
    target = torch.arange(4)
    with pytest.raises(ValueError, match=r"^key must have 4 rows as query has \(or pass target\), got 5"):
        sweep(query, key)
    with pytest.raises(ValueError, match=r"^symmetric=True .* cannot be used with target"):
        sweep(query, key, target=target, symmetric=True)
    with pytest.raises(ValueError, match=r"^target must name a key for every row, got -1 for row 2"):
        sweep(query, key, target=torch.tensor([0, 1, -1, 2]))
    with pytest.raises(ValueError, match=r"^key_bias must be 0, or -inf to leave a key out, got 0.5"):
        sweep(query, key, target=target, key_bias=torch.full((5,), 0.5))
    left_out = torch.zeros(5).index_fill(0, target[2], -torch.inf)
    with pytest.raises(ValueError, match=r"^key_bias must not be -inf for a row's positive.*: leave such rows out$"):
        sweep(query, key, target=target, key_bias=left_out)
    with pytest.raises(ValueError, match=r"^temperatures must be within a factor of 4096, got 1e-05 and 1"):
        sweep(query, query, (1e-5, 1.0))
    with pytest.raises(ValueError, match=r"^temperatures must hold a number, got none"):
        sweep(query, query, [])
    with pytest.raises(TypeError, match=r"^temperatures must be a sequence of numbers or a tensor, got float"):
        sweep(query, query, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^temperatures must be positive"):
        sweep(query, query, [-1.0])
    with pytest.raises(ValueError, match=r"^query must have 1 row or more, got 0"):
        sweep(query[:0], query[:0])
    with pytest.raises(ValueError, match=r"^t must be in \[0.1, 0.2\], the range of this sweep, got 0.3"):
        sweep(query, query, torch.tensor([0.1, 0.2])).nll(0.3)
    with pytest.raises(ValueError, match=r"^k must be 1 or more, got 0"):
        sweep(query, query).recall(0)
    with pytest.raises(ValueError, match=r"^negatives must have 5 components as query has, got 3"):
        sweep(query, query, negatives=torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"^paired negatives must have 4 rows as query has, got 2"):
        sweep(query, query, negatives=torch.randn(2, 3, D))
    with pytest.raises(ValueError, match="symmetric must be one of"):
        sweep(query, query, symmetric="both")  # type: ignore[arg-type]
