"""`fit` against the minimum of dense code in float64, what it says where there is none, and `HeldOutTemperature`."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.helpers import DEVICE, TRITON
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_infonce import ClipLoss, FusedInfoNCELoss, SigLipLoss
from fused_infonce.temperature import Bounds, Fit, HeldOutTemperature, IndividualTemperature, fit, sweep


def pairs(n: int = 200, d: int = 12, noise: float = 2.0) -> tuple[Tensor, Tensor]:
    query = torch.randn(n, d, dtype=torch.float64)
    return query, query + noise * torch.randn(n, d, dtype=torch.float64)


def nll(query: Tensor, key: Tensor, t: float, symmetric: bool = False) -> float:
    scores = F.normalize(query.double(), dim=1) @ F.normalize(key.double(), dim=1).T / t
    both = [scores, scores.T] if symmetric else [scores]
    return sum(F.cross_entropy(s, torch.arange(len(s))).item() for s in both) / len(both)


def minimum(query: Tensor, key: Tensor, symmetric: bool = False) -> float:
    """Return the temperature with the least NLL by golden sections."""
    low, high = math.log(0.003), math.log(3.0)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if nll(query, key, math.exp(a), symmetric) < nll(query, key, math.exp(b), symmetric) else (
            a, high
        )  # fmt: skip
    return math.exp((low + high) / 2)


@pytest.mark.parametrize("noise", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_from_any_start_it_ends_at_the_minimum_within_seven_passes(noise, dtype):
    query, key = pairs(noise=noise)
    want = minimum(query.to(dtype), key.to(dtype))
    for init in (None, 0.5, 0.1, 0.02):
        found = fit(query.to(dtype), key.to(dtype), init=init)
        assert found.converged
        assert found.reason == "converged"
        assert found.temperature == pytest.approx(want, rel=1e-4)
        assert found.passes <= 7
        assert found.nll == pytest.approx(nll(query, key, want), rel=1e-5)


def test_it_is_the_minimum_that_scipy_finds():
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    query, key = pairs()
    best = optimize.minimize_scalar(lambda x: nll(query, key, math.exp(x)), bounds=(-5, 1), options={"xatol": 1e-10})
    assert fit(query, key).temperature == pytest.approx(math.exp(best.x), rel=1e-4)
    assert minimum(query, key) == pytest.approx(math.exp(best.x), rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_on_every_backend_and_in_both_directions(backend):
    query, key = pairs(40)
    want = minimum(query, key, symmetric=True)
    device = DEVICE.get(backend, "cpu")
    found = fit(query.to(device), key.to(device), symmetric=True, backend=backend, bounds=(0.05, 0.5))
    assert found.temperature == pytest.approx(want, rel=1e-4)
    assert found.stderr == pytest.approx(fit(query, key, symmetric=True).stderr, rel=1e-3)


def test_the_standard_error_is_the_spread_of_fits_to_other_pairs():
    negatives = torch.randn(100, 12, dtype=torch.float64)
    fits = []
    for _ in range(40):  # each row against negatives of all draws, so that rows are independent given these
        query, key = pairs(150)
        fits.append(fit(query, key, negatives=negatives, key_ids=torch.zeros(150, dtype=torch.int64)))
    spread = torch.tensor([x.temperature for x in fits]).std().item()
    said = sum(x.stderr for x in fits) / len(fits)
    assert 0.7 < said / spread < 1.4  # of 40 draws the spread is known to a ninth


def test_where_there_is_no_minimum_it_says_why():
    query, key = pairs(noise=0.1)
    found = fit(query, key)
    assert not found.converged
    assert found.temperature == 0.003
    assert math.isnan(found.stderr)
    assert found.reason.startswith("every pair is ranked first")
    assert found.nll == pytest.approx(nll(query, key, 0.003), abs=1e-12)
    with pytest.raises(ValueError, match="no fitted temperature to compare with: every pair is ranked first"):
        found.versus(0.1)
    low = fit(*pairs(), bounds=(0.5, 2.0))
    assert (low.converged, low.temperature) == (False, 0.5)
    assert low.reason.startswith("the NLL still falls at the lowest")
    query, key = pairs()
    high = fit(query, -key)  # whose positives are the worst
    assert (high.converged, high.temperature) == (False, 3.0)
    assert high.reason.startswith("the NLL still falls at the highest")
    few = fit(*pairs(), max_passes=1)
    assert (few.converged, few.passes) == (False, 1)
    assert few.reason == "max_passes=1 passes were not enough"
    query[0, 0] = math.nan
    assert fit(query, key).reason == "the NLL is not finite"


def test_mistakes_are_refused():
    query, key = pairs(4)
    with pytest.raises(ValueError, match="query must have 2 rows or more, got 1"):
        fit(query[:1], key[:1])
    with pytest.raises(ValueError, match=r"^no pair has a negative"):
        fit(query, key, key_ids=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^init must be within bounds \(0.003, 3\), got 5"):
        fit(query, key, init=5.0)
    with pytest.raises(ValueError, match=r"^bounds must be increasing and within a factor of 4096"):
        fit(query, key, bounds=(1.0, 0.1))
    with pytest.raises(ValueError, match=r"^bounds must be two numbers"):
        fit(query, key, bounds=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^max_passes must be 1 or more, got 0"):
        fit(query, key, max_passes=0)
    with pytest.raises(ValueError, match=r"^tolerance must be positive"):
        fit(query, key, tolerance=0.0)


def test_a_training_temperature_is_too_cold_right_or_too_warm():
    found = Fit(0.06, 0.003, 1.0, True, "converged", 2, Bounds(0.5, 0.5))
    verdicts = {0.03: "too cold", 0.056: "right", 0.064: "right", 0.2: "too warm"}
    assert {t: found.versus(t).verdict for t in verdicts} == verdicts
    assert found.versus(0.03).ratio == pytest.approx(2)
    assert found.versus(0.03).sigmas == pytest.approx(math.log(2) / 0.05)
    assert found.versus(0.0635, within=0).verdict == "right"  # within two standard errors
    with pytest.raises(ValueError, match=r"^temperature must be positive"):
        found.versus(0.0)


def test_the_fitted_temperature_is_better_than_any_other_of_a_sweep():
    query, key = pairs()
    found, every = fit(query, key), sweep(query, key)
    assert found.nll <= min(every.nll(t).item() for t in every.temperatures.tolist())
    assert found.nll == pytest.approx(every.nll(found.temperature).item(), rel=1e-5)


def test_a_temperature_that_follows_held_out_pairs():
    query, key = pairs()
    loss, t = FusedInfoNCELoss(temperature=1.0), fit(query, key).temperature
    follow = HeldOutTemperature(loss, every=3, smoothing=0.5)
    found = follow.step(query, key)
    assert found is follow.last is not None
    assert loss.temperature == pytest.approx(t)  # the start is not kept
    assert [follow.step(query, key) for _ in range(2)] == [None, None]
    loss.temperature = 4 * t
    follow.step(query, key)
    assert loss.temperature == pytest.approx(2 * t)
    state = follow.state_dict()
    assert state == {"steps": 4, "temperature": loss.temperature, "fitted": True}
    again = HeldOutTemperature(FusedInfoNCELoss(temperature=1.0), every=3, smoothing=0.5)
    again.load_state_dict(state)
    assert again.loss.temperature == loss.temperature
    assert [again.step(query, key) is None for _ in range(3)] == [True, True, False]
    assert again.loss.temperature == pytest.approx(math.sqrt(2) * t)


def test_held_out_pairs_are_embedded_where_a_fit_is_due():
    encoder, (query, key) = torch.nn.Linear(12, 12).double(), pairs()
    calls = []

    def embedded() -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        return encoder(query), encoder(key)

    follow = HeldOutTemperature(FusedInfoNCELoss(temperature=1.0), every=3)
    found = [follow.step(embedded) for _ in range(4)]
    assert [x is None for x in found] == [False, True, True, False]
    assert calls == [False, False]
    assert found[0] == fit(encoder(query).detach(), encoder(key).detach())
    for wrong in ((query,), (embedded, key)):
        with pytest.raises(TypeError, match="step takes query and key, or one function of no arguments"):
            follow.step(*wrong)


def test_a_temperature_stays_where_a_fit_has_no_minimum():
    loss = FusedInfoNCELoss(temperature=0.07)
    with pytest.warns(UserWarning, match="the temperature stays as it is: every pair is ranked first") as warned:
        found = HeldOutTemperature(loss, symmetric=True).step(*pairs(noise=0.1))
    assert warned[0].filename == __file__
    assert found is not None
    assert not found.converged
    assert loss.temperature == 0.07


def test_a_fit_takes_what_the_loss_does_with_its_rows():
    query, key = pairs()
    loss = FusedInfoNCELoss(temperature=1.0, normalize=False, symmetric=True)
    HeldOutTemperature(loss, bounds=(0.03, 30.0)).step(query, key)
    want = fit(query, key, bounds=(0.03, 30.0), normalize=False, symmetric=True)
    assert loss.temperature == want.temperature
    assert loss.temperature > 1.0
    HeldOutTemperature(loss, normalize=True, symmetric=False).step(query, key)
    assert loss.temperature == fit(query, key).temperature


def test_smoothing_begins_with_a_temperature_that_was_fitted():
    query, key = pairs()
    want = fit(query, key).temperature
    follow = HeldOutTemperature(FusedInfoNCELoss(temperature=1), every=1, smoothing=0.9)
    with pytest.warns(UserWarning, match="the temperature stays as it is"):
        follow.step(*pairs(noise=0.1))  # without a minimum
    assert follow.loss.temperature == 1
    follow.step(query, key)
    assert follow.loss.temperature == want
    follow.loss.temperature = 2  # an int
    follow.step(query, key)
    assert follow.loss.temperature == pytest.approx(2**0.9 * want**0.1)


def test_a_state_is_of_numbers_that_are_checked_before_they_are_taken():
    query, key = pairs()
    held = torch.tensor([1.0])
    follow = HeldOutTemperature(FusedInfoNCELoss(temperature=held), every=1)
    follow.step(query, key)
    state = follow.state_dict()
    held.fill_(0.7)
    assert state["temperature"] == pytest.approx(fit(query, key).temperature, rel=1e-6)
    for bad in (-1.0, "0.1"):
        with pytest.raises((TypeError, ValueError), match="temperature"):
            follow.load_state_dict(state | {"steps": 9, "temperature": bad})
    assert (follow.steps, held.item()) == (1, pytest.approx(0.7))
    follow.load_state_dict(state)
    assert follow.loss.temperature is held
    assert held.item() == state["temperature"]


def test_a_step_that_raised_an_error_was_none():
    query, key = pairs()
    follow = HeldOutTemperature(FusedInfoNCELoss(temperature=1.0), every=3)
    with pytest.raises(ValueError, match=r"key must"):
        follow.step(query, key[:5])
    assert follow.step(query, key) is not None


@pytest.mark.parametrize("loss", [ClipLoss(), FusedInfoNCELoss(torch.full((20,), 0.1))], ids=["none", "one a row"])
def test_a_fit_without_a_minimum_of_a_loss_without_one_number(loss):
    with pytest.warns(UserWarning, match="the temperature stays as it is"):
        found = HeldOutTemperature(loss).step(torch.eye(20), torch.eye(20))
    assert found is not None
    assert not found.converged


@pytest.mark.parametrize(
    ("query", "key", "rows"),
    [(torch.ones(50, 8), 2 * torch.ones(50, 8), 50), (torch.eye(9).repeat(2, 1), torch.eye(9).repeat(2, 1), 18)],
    ids=["collapsed", "twice"],
)
def test_ties_are_not_pairs_that_are_ranked_first(query, key, rows):
    found = fit(query, key)
    assert not found.converged
    assert found.reason.startswith(f"no negative scores above its positive, but in {rows} of {rows} rows one is tied")


def test_a_fit_reads_little_from_a_device():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    query, key = pairs()
    with Reads() as reads:
        found = fit(query, key)
    assert reads.count <= 45 + 10 * found.passes


def test_what_cannot_follow_is_refused():
    for held in (torch.nn.Parameter(torch.tensor(0.1)), lambda: 0.1, IndividualTemperature(4, 0.1)):
        with pytest.raises(ValueError, match="loss must hold a number or a tensor, in place of which others are"):
            HeldOutTemperature(FusedInfoNCELoss(temperature=held))
    loss = FusedInfoNCELoss(temperature=0.1)
    with pytest.raises(TypeError, match="loss must be a loss of fused_infonce that holds a temperature, got Linear"):
        HeldOutTemperature(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss learns its temperature"):
        HeldOutTemperature(FusedInfoNCELoss(temperature=0.1, learnable_temperature=True))
    with pytest.raises(ValueError, match=r"must be a softmax over keys.*a sigmoid of every pair, is none"):
        HeldOutTemperature(SigLipLoss(temperature=0.1))
    with pytest.raises(TypeError, match="its own arguments and those of fit, got smooting"):
        HeldOutTemperature(loss, smooting=0.5)
    for made, what in ((None, "NoneType"), ((1, 2, 3), "3 things")):
        with pytest.raises(TypeError, match=f"must return query and key, got {what}"):
            HeldOutTemperature(loss).step(lambda made=made: made)
    with pytest.raises(ValueError, match="smoothing must be less than 1"):
        HeldOutTemperature(loss, smoothing=1.0)
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        HeldOutTemperature(loss, every=0)
    with pytest.raises(ValueError, match="the state must hold steps, temperature and fitted, got "):
        HeldOutTemperature(loss).load_state_dict({"steps": 1})
