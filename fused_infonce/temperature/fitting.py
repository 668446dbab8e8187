"""The temperature that held-out pairs ask for: the minimum of their negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends import BackendName
from ..backends.ladder import Ladder
from ..compose.arguments import call_options
from ..distributed import DistributedLike, together
from .ranking import Bounds
from .sweep import WIDEST, Sweep, of_ranks, problem_of

BOUNDS = (0.003, 3.0)  # of a fitted temperature
NEAR = 4.0  # a first range around `init`: this factor on both sides
STEPS = 20  # of a bisection, each of O(N): it ends within 1e-5 of the widest bounds, from where one pass is enough
SEPARABLE = "every pair is ranked first: the lower the temperature, the lower the NLL"
TIED = "no negative scores above its positive, but in {} of {} rows one is tied: duplicates or collapsed embeddings"
TOO_LOW = "the NLL still falls at the lowest temperature of the bounds: lower it"
TOO_HIGH = "the NLL still falls at the highest temperature of the bounds: raise it, unless recall is at chance"


class Verdict(NamedTuple):
    """How a training temperature t compares with the fitted one.

    verdict: "too warm" where the fitted one is lower, "too cold" where it is higher, "right" where they are within
        the tolerance or two standard errors
    ratio: the fitted temperature over t. sigmas: log of it, in standard errors of the log
    """

    verdict: Literal["too cold", "right", "too warm"]
    ratio: float
    sigmas: float


class Fit(NamedTuple):
    """The temperature with the least negative log-likelihood on some pairs; see `fit`.

    temperature: the minimum, or where there is none the end of the bounds that is nearest to it
    stderr: its standard error from rows taken as independent, (sum_i g_i^2)^(1/2) / sum_i h_i t^2, with g and h the
        first two derivatives of row losses in 1 / t (the sandwich, White 1982); NaN where there is no minimum
    nll: at `temperature`. converged: whether the last step was within the tolerance. reason: why it ended. passes: over
        the scores
    recall: the share of rows whose positive scores highest, (pessimistic, optimistic) on ties, from the same passes
    """

    temperature: float
    stderr: float
    nll: float
    converged: bool
    reason: str
    passes: int
    recall: Bounds

    def versus(self, temperature: float | Tensor, within: float = 0.1) -> Verdict:
        """Return whether a training temperature is too cold, right or too warm for these pairs.

        within: by which share of itself it may differ and still be right.
        """
        temperature = checks.one_temperature("temperature", temperature)
        checks.not_negative("within", within)
        if not self.converged:
            raise ValueError(f"there is no fitted temperature to compare with: {self.reason}")
        ratio = self.temperature / temperature
        error = self.stderr / self.temperature
        sigmas = math.log(ratio) / error if error else math.copysign(math.inf, ratio - 1)
        if abs(ratio - 1) <= within or abs(sigmas) <= 2:
            return Verdict("right", ratio, sigmas)
        return Verdict("too cold" if ratio > 1 else "too warm", ratio, sigmas)


@together
@torch.no_grad()
def fit(
    query: Tensor,
    key: Tensor,
    *,
    init: float | None = None,
    bounds: tuple[float, float] = BOUNDS,
    tolerance: float = 1e-4,
    max_passes: int = 12,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_bias: Tensor | None = None,
    negatives: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Fit:
    """Compute the temperature with the least negative log-likelihood on pairs that the model was not trained on.

        t* = argmin_t mean_i log(1 + exp(log_z_i(t) - pos_i / t))

    which is convex in 1 / t, so that there is at most one minimum. A sweep finds it to within its interpolation, and
    steps of Newton's method, each one pass with one exponential a score, end at it.

    Args:
        query: (N, D), N of 2 or more. key: (M, D).
        init: where to start, with a sweep of the temperatures within a factor of 4; by default one of all the bounds.
        bounds: the least and the greatest temperature, at most 4096 apart in ratio.
        tolerance: of the last step, relative to t. max_passes: over the scores.
        The other arguments are those of `sweep`; over several processes all find the same.

    Returns:
        A `Fit`. Where every pair is ranked first, or the NLL still falls at an end of the bounds, it has not converged,
        says so in `reason`, and its temperature is that end of the bounds.

    Raises:
        ValueError: shapes, devices, values, fewer than two pairs, no pair with a negative. TypeError: types, dtypes.
        RuntimeError: a backend that cannot run.

    Reference: Guo et al. 2017, arXiv:1706.04599 (temperature scaling), for the softmax over keys in place of classes.
    """
    low, high = bounds_of(bounds)
    if init is not None and not low <= checks.positive_float("init", init) <= high:
        raise ValueError(f"init must be within bounds ({low:g}, {high:g}), got {init:g}")
    checks.positive_float("tolerance", tolerance)
    checks.whole("max_passes", max_passes, 1)
    options = call_options(backend, workspace_limit, distributed=distributed)
    problem = problem_of(query, key, target, query_ids, key_ids, key_bias, negatives, symmetric, normalize)
    window = (low, high) if init is None else (max(low, init / NEAR), min(high, init * NEAR))
    with of_ranks(problem, options, f"temperatures in {low}, {high} from {window}", least=2) as swept:

        def sweep_of(coldest: float, warmest: float) -> Sweep:
            return swept(Ladder.over(coldest, warmest))

        return Search(sweep_of, symmetric, (low, high), tolerance, max_passes).run(window)


def bounds_of(bounds: Any) -> tuple[float, float]:
    """Return bounds of a temperature, checked."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"bounds must be two numbers, the least and the greatest temperature, got {bounds!r}")
    low, high = (checks.positive_float("bounds", x) for x in bounds)
    if not low < high <= WIDEST * low:
        raise ValueError(f"bounds must be increasing and within a factor of {WIDEST:g}, got {bounds}")
    return low, high


class Slopes(NamedTuple):
    """The first two derivatives of row losses in 1 / t, (N,)."""

    first: Tensor
    second: Tensor


def slopes(found: Sweep, t: float) -> Slopes:
    """Return s x' and s x'' + s (1 - s) x'^2, of log(1 + exp(x)) with x = log_z - pos / t and s = sigmoid(x)."""
    at = found.at(t)
    x, slope = at.log_z - found.pos / t, at.mean - found.pos
    share = torch.sigmoid(x)
    return Slopes(share * slope, share * at.variance + share * torch.sigmoid(-x) * slope**2)


def least(found: Sweep, low: float, high: float) -> float:
    """Return the temperature of [low, high] with the least NLL, by bisection of its slope in 1 / t."""
    if slopes(found, low).first.mean() <= 0:
        return low
    if slopes(found, high).first.mean() >= 0:
        return high
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        if slopes(found, middle).first.mean() > 0:  # the NLL falls as 1 / t does
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


class Search:
    """A search for the minimum, of one call of `fit`.

    Args:
        sweep_of: makes the sweep of the pairs over a range, given its coldest and its warmest temperature.
        symmetric: whether a sweep has both directions. bounds, tolerance, max_passes: as of `fit`.
    """

    def __init__(
        self, sweep_of: Callable[[float, float], Sweep], symmetric: bool, bounds: tuple[float, float],
        tolerance: float = 1e-4, max_passes: int = 12,
    ):  # fmt: skip
        self.sweep_of, self.symmetric, self.bounds = sweep_of, symmetric, bounds
        self.tolerance, self.max_passes, self.passes = tolerance, max_passes, 0

    def run(self, window: tuple[float, float]) -> Fit:
        """Search from a sweep of this range."""
        return self.run_from(self._pass(*window), window)

    def run_from(self, found: Sweep, window: tuple[float, float]) -> Fit:
        """Search from a sweep that was made, of a range of which `window` is a part."""
        if (found.log_z[0] == -math.inf).all():
            raise ValueError("no pair has a negative: ids or biases leave all other keys out")
        if not found.above.any():
            tied = int((found.ties > 0).sum())
            return self._without_minimum(self.bounds[0], TIED.format(tied, len(found.ties)) if tied else SEPARABLE)
        t = least(found, *window)
        while t in window and t not in self.bounds and self.passes < self.max_passes:  # it lies outside of the window
            window = max(self.bounds[0], t / NEAR**2), min(self.bounds[1], t * NEAR**2)
            found = self._pass(*window)
            t = least(found, *window)
        if t in self.bounds and t in window:
            return self._without_minimum(t, TOO_LOW if t == self.bounds[0] else TOO_HIGH)
        return self._newton(t, found)

    def _pass(self, low: float, high: float) -> Sweep:
        self.passes += 1
        return self.sweep_of(low, high)

    def _newton(self, t: float, found: Sweep) -> Fit:
        """Return the minimum near t by steps in 1 / t, each from a pass at that temperature alone."""
        step = math.inf
        while step > self.tolerance and self.passes < self.max_passes:
            found, here = self._pass(t, t), t
            g, h = (x.double().mean().item() for x in slopes(found, t))
            beta = 1 / t - g / h if h > 0 else math.nan
            if not math.isfinite(beta):  # NaN in the embeddings
                nll, recall = found.nll(here).item(), found.recall(1)
                return Fit(math.nan, math.nan, nll, False, "the NLL is not finite", self.passes, recall)
            t = 1 / min(max(beta, 0.5 / here), 2 / here)
            step = abs(t / here - 1)
        return self._at(t, found, step)

    def _at(self, t: float, found: Sweep, step: float) -> Fit:
        """Return the result of a search that ended at t, with what the last pass, near it, has found."""
        here = found.temperatures[-1].item() if len(found.temperatures) == 1 else t
        converged = step <= self.tolerance
        reason = "converged" if converged else f"max_passes={self.max_passes} passes were not enough"
        stderr = self._stderr(found, here)
        return Fit(t, stderr, found.nll(here).item(), converged, reason, self.passes, found.recall(1))

    def _stderr(self, found: Sweep, t: float) -> float:
        first, second = (x.double() for x in slopes(found, t))
        if self.symmetric:  # both losses of a pair are one observation
            first, second = (x.view(2, -1).mean(0) for x in (first, second))
        return (first.norm() / second.sum()).item() * t * t

    def _without_minimum(self, t: float, reason: str) -> Fit:
        found = self._pass(t, t)
        return Fit(t, math.nan, found.nll(t).item(), False, reason, self.passes, found.recall(1))
