"""Every temperature at once: likelihood, entropy, confidence and ranks of pairs from one pass over their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends, checks, contrast
from ..backends import BackendName, Options
from ..backends.contract import KeySet, Problem
from ..backends.indexing import slices, take_rows
from ..backends.ladder import Ladder, Profile
from ..backends.registry import resolve
from ..backends.row_losses import infonce
from ..backends.rows import as_held
from ..compose.across import Met, across, meet
from ..compose.arguments import call_options, of_keys
from ..distributed import Call, DistributedLike, together
from .calibration import Calibration, calibration
from .interpolation import AtOne, between
from .ranking import Bounds, Ranks

if TYPE_CHECKING:
    from .fitting import Fit

DEFAULT_RANGE = (1 / 256, 1.0)  # 17 temperatures
WIDEST = 4096.0  # ratio of a range: every factor of 2 doubles what rounding does to an exponential that is squared


@dataclass(frozen=True)
class Sweep:
    """Pairs of queries and keys at a ladder of temperatures, and at any between its ends.

        log_z_i(t) = log sum_j exp(d_ij / t)    over the negatives j of row i, which its positive y is not among
        d_ij = cos(q_i, k_j), or q_i . k_j with normalize=False

    With `symmetric` there are 2 N rows, the N queries against the keys and after them the N keys against the queries.

    Attributes:
        temperatures: (K,) in ratio sqrt(2), the warmest first. pos, hardest: d_iy and max_j d_ij, (N,); hardest is -inf
            in a row without negatives. above, ties: (N,) int64, how many negatives score above the positive, and how
            many are tied with it within the rounding of the products. log_z: (K, N). mean, variance: (K, N), of d_ij
            under softmax_j(d_ij / t): the first two derivatives of log_z in 1 / t.

    Between the temperatures log_z is the quintic in 1 / t with these derivatives at both ends. A method's temperature
    must be in the range, else it is a ValueError. In float32 log_z is within 1e-5 max(1, 0.05 / t) of its size, and the
    mean within 1e-4 t at 0.01 and above: scores are rounded, and logits are 1 / t times these.
    """

    temperatures: Tensor
    pos: Tensor
    hardest: Tensor
    above: Tensor
    ties: Tensor
    log_z: Tensor
    mean: Tensor
    variance: Tensor

    @cached_property
    def _rungs(self) -> list[float]:
        """The inverse temperatures, read once from a device."""
        rungs: list[float] = (1 / self.temperatures).tolist()
        return rungs

    def at(self, t: float) -> AtOne:
        """Return log_z, mean and variance (N,) at a temperature of the range."""
        low, high = 1 / self._rungs[-1], 1 / self._rungs[0]
        t = checks.one_temperature("t", t)
        if not low * (1 - 1e-6) <= t <= high * (1 + 1e-6):
            raise ValueError(f"t must be in [{low:.6g}, {high:.6g}], the range of this sweep, got {t}")
        return between(self._rungs, self.log_z, self.mean, self.variance, 1 / t)

    def losses(self, t: float) -> Tensor:
        """Return InfoNCE of every row, log(1 + exp(log_z_i - pos_i / t)), (N,)."""
        return infonce(self.at(t).log_z - self.pos / t)

    def nll(self, t: float) -> Tensor:
        """Return the mean of the rows' losses, of no dimensions."""
        return self.losses(t).mean()

    def effective_negatives(self, t: float) -> Tensor:
        """Return exp of the entropy of softmax_j(d_ij / t) over the negatives, (N,): over how many it spreads.

        0 in a row without negatives.
        """
        log_z, mean, _ = self.at(t)
        return torch.exp(log_z - mean / t)

    def hardest_share(self, t: float) -> Tensor:
        """Return the softmax over the negatives at the hardest of them, (N,); 0 in a row without negatives."""
        log_z = self.at(t).log_z
        return torch.exp(self.hardest / t - log_z).masked_fill(log_z == -math.inf, 0)

    def probability(self, t: float) -> Tensor:
        """Return the softmax over the positive and the negatives at the positive, (N,): exp of minus the loss."""
        return torch.exp(-self.losses(t))

    def confidence(self, t: float) -> Tensor:
        """Return the softmax over the positive and the negatives at whichever scores highest, (N,)."""
        best = torch.maximum(self.pos, self.hardest) / t
        return torch.exp(best - torch.logaddexp(self.at(t).log_z, self.pos / t)).clamp(max=1)

    @property
    def ranks(self) -> Ranks:
        """The ranks of the positives, with both bounds that ties leave."""
        return Ranks(self.above, self.ties)

    def recall(self, k: int) -> Bounds:
        """Return the share of rows whose positive is among the k highest scores, (pessimistic, optimistic) on ties."""
        return self.ranks.recall(k)

    def mrr(self, k: int | None = None) -> Bounds:
        """Return the mean of 1 / rank of the positives, with k 0 beyond it, (pessimistic, optimistic) on ties."""
        return self.ranks.mrr(k)

    def median_rank(self) -> Bounds:
        """Return the median rank of the positives, from 1, (pessimistic, optimistic) on ties."""
        return self.ranks.median_rank()

    def calibration(self, t: float, bins: int = 15) -> Calibration:
        """Return how well the confidences agree with how often the positive scores highest, ties counting against it.

        `nll` is that of the positives, as of the method, and `brier` that of the highest score being right.
        """
        first = self.above + self.ties == 0
        return calibration(self.confidence(t), first, bins, self.nll(t).item())

    def plot(
        self, path: str | Path, fit: Fit | None = None, temperature: float | None = None, random: Tensor | None = None
    ) -> None:
        """Draw NLL and calibration error, negatives, reliability, and densities of the scores; needs the extra "plot".

        Args:
            path: of the picture, which ends in .png, .svg, .pdf or another of `files.PICTURES`; folders are made.
            fit: to the same pairs, whose temperature is marked with its interval; by default the minimum of the sweep.
            temperature: that of the training, to be marked. random: (R,), scores of random negatives, to be drawn too.

        Raises:
            ImportError: matplotlib is missing. ValueError: another format, a temperature out of the range,
            scores that are not finite.
        """
        from .plots import draw

        draw(path, self, fit, temperature, random)


@together
@torch.no_grad()
def sweep(
    query: Tensor,
    key: Tensor,
    temperatures: Sequence[float] | Tensor | None = None,
    *,
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
) -> Sweep:
    """Compute what every temperature of a range makes of pairs, in one pass over the scores and without holding them.

    Args:
        query: (N, D). key: (M, D), with M = N without `target`.
        temperatures: numbers whose least and greatest are the range, at most 4096 apart in ratio; by default 1/256 and
            1. The ladder starts at the greatest and goes down by factors of sqrt(2) until it has passed the least.
        target: (N,) integers, the key of every query; by default key i of query i.
        query_ids, key_ids: (N,) and (M,) integers; a key with its query's id is no negative of it.
        key_bias: (M,) floating, 0 or -inf; -inf leaves a key out, such as padding. Others are refused: under a bias the
            hardest negative and the ranks would depend on the temperature.
        negatives: further keys, (H, D) of all queries or (N, H, D) of one each, beside the other rows' keys.
        symmetric: also score the keys against the queries; see `Sweep`. Not with `target`.
        normalize: divide rows by their norms.
        backend, workspace_limit: as of every loss. A sweep has no gradient.
        distributed: as of every loss. Each process passes pairs of its own, which are ranked among the keys of all.

    Returns:
        A `Sweep`: float64 for float64 inputs, else float32. Over several processes it is that of all their pairs, in
        the order of the processes, and bitwise the same on all.

    Raises:
        ValueError: shapes, devices, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    Source: this library. log_z is a cumulant generating function in 1 / t, whose derivatives are the cumulants.
    """
    ladder = ladder_of(temperatures)
    options = call_options(backend, workspace_limit, distributed=distributed)
    problem = problem_of(query, key, target, query_ids, key_ids, key_bias, negatives, symmetric, normalize)
    with of_ranks(problem, options, f"temperatures {ladder}") as swept:
        return swept(ladder)


def ladder_of(temperatures: Any, name: str = "temperatures") -> Ladder:
    """Return the ladder over the range of these temperatures, checked."""
    if temperatures is None:
        return Ladder.over(*DEFAULT_RANGE)
    if isinstance(temperatures, Tensor):
        temperatures = temperatures.flatten().tolist()
    if not isinstance(temperatures, Sequence) or isinstance(temperatures, str):
        raise TypeError(f"{name} must be a sequence of numbers or a tensor, got {type(temperatures).__name__}")
    if not temperatures:
        raise ValueError(f"{name} must hold a number, got none")
    numbers = [checks.positive_float(name, t) for t in temperatures]
    low, high = min(numbers), max(numbers)
    if high > WIDEST * low:
        raise ValueError(f"{name} must be within a factor of {WIDEST:g}, got {low:g} and {high:g}")
    return Ladder.over(low, high)


def problem_of(
    query: Tensor, key: Tensor, target: Any = None, query_ids: Any = None, key_ids: Any = None, key_bias: Any = None,
    negatives: Any = None, symmetric: bool = False, normalize: bool = True,
) -> Problem:  # fmt: skip
    """Return the problem of `sweep`'s arguments, checked, at a temperature of 1."""
    checks.flags(symmetric=symmetric, normalize=normalize)
    paired = isinstance(negatives, Tensor) and negatives.dim() == 3
    problem = of_keys(
        query, key, negatives, 1.0, "paired" if paired else "unpaired", symmetric=symmetric, normalize=normalize,
        in_batch_negatives=True, ignore_index=-1, target=target, query_ids=query_ids, key_ids=key_ids,
        key_bias=key_bias, positive_bias=key_bias is None, names=("key", "symmetric", "negatives"),
    )  # fmt: skip
    if problem.target is not None and (problem.target < 0).any():
        row = (problem.target < 0).nonzero()[0].item()
        raise ValueError(f"target must name a key for every row, got -1 for row {row}: leave such rows out")
    for bias in problem.biases:
        if ((bias != 0) & (bias != -math.inf)).any():
            bad = bias[(bias != 0) & (bias != -math.inf)][0].item()
            raise ValueError(f"key_bias must be 0, or -inf to leave a key out, got {bad:g}")
        own = bias if problem.target is None else take_rows(bias, problem.target.clamp(max=len(bias) - 1))
        if own.any():
            row = own.nonzero()[0].item()
            raise ValueError(f"key_bias must not be -inf for a row's positive, got row {row}'s: leave such rows out")
    return problem


@contextmanager
def of_ranks(
    problem: Problem, options: Options, alike: str = "", least: int = 1
) -> Iterator[Callable[[Ladder], Sweep]]:  # fmt: skip
    """Give a function that sweeps a problem over a ladder, or the problem of all ranks, of which this one is a part.

    alike: what else must be the same on every rank. least: the number of pairs that is needed.
    """
    call: Call | None = options.call
    met = None
    if call is not None:
        call.noted += f"{alike}; "
        met = meet(problem, options)
    rows = len(problem.query.rows) if met is None else sum(met.queries)
    if rows < least:
        raise ValueError(f"query must have {least} {'row' if least == 1 else 'rows'} or more, got {rows}")
    whole, products = across(problem, options, met=met)
    with products:
        yield lambda ladder: _swept(whole, options, met, ladder)


def _swept(problem: Problem, options: Options, met: Met | None, ladder: Ladder) -> Sweep:
    """Return the sweep of a problem over a ladder, of both directions where it has both, of the rows of all ranks."""
    directions = [problem.of_rows(), *([problem.swapped()] if problem.columns else [])]
    found = [contrast.profile(each, options, ladder) for each in directions]
    if met is not None:
        found = [_gathered(options.call, each, met.queries) for each in found]
    whole = Profile(*(torch.cat(parts, -1) for parts in zip(*found, strict=True)))
    return Sweep(1 / ladder.inverse(whole.pos), *whole)


def prepared(problem: Problem, options: Options) -> Problem:
    """Return a problem of one set of keys with these as a backend holds them, to be swept more than once."""
    backend = backends.get(resolve(options.backend, problem.query.rows))
    return replace(problem, keys=(as_held(problem.keys[0], problem, backend.takes_unit_rows),))


def by_part(problem: Problem, options: Options, ladder: Ladder, rows: int) -> Iterator[Sweep]:
    """Yield the sweeps of so many rows at a time of a problem with targets and without directions."""
    assert problem.target is not None
    for part in slices(len(problem.target), rows):
        query = KeySet._make(None if x is None else x[part] for x in problem.query)
        yield _swept(replace(problem, query=query, target=problem.target[part]), options, None, ladder)


def _gathered(call: Call, found: Profile, counts: Sequence[int]) -> Profile:
    """Return the profile of the rows of all ranks from that of this one's."""
    begun = [call.communicator.all_gather(x.movedim(-1, 0).contiguous(), counts) for x in found]
    return Profile(*(rows().movedim(0, -1).contiguous() for rows in begun))
