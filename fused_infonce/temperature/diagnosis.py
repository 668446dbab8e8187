"""Whether a training is well: gauges of its pairs, of a step or of its learned temperature, and what they warn of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..backends import BackendName
from ..backends.row_losses import infonce
from ..compose.rows import unit
from .fitting import TOO_HIGH, TOO_LOW, Fit, fit
from .rules import Warned, judged
from .scale import HasTemperature, held_by
from .sweep import Sweep, problem_of, sweep

TWIN = 0.1  # of the squared distance of nearest keys: in 6 dimensions or more chance has one in a thousand so near
ROUNDED = 2.0**-9  # half of the spacing of bfloat16 below 1: a probability nearer to 1 is 1
AROUND = 32.0  # times the temperature, both ways: where the fitted one is looked for
LEAST_HISTORY = 50  # temperatures, of which fewer may stand still by chance


@dataclass(frozen=True)
class Diagnosis:
    """Gauges by name, and what they warn of; it prints as a table. See `diagnose` and `diagnose_step`.

    fit: how the fit of a temperature ended, "converged" or why there is none; of a step, which has no fit, None
    """

    gauges: dict[str, float]
    warnings: tuple[Warned, ...]
    fit: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the gauges, the warnings and the fit in dictionaries and lists, as JSON takes them."""
        warnings = [warned._asdict() for warned in self.warnings]
        return {"gauges": dict(self.gauges), "warnings": warnings, "fit": self.fit}

    def __str__(self) -> str:
        width = max(map(len, self.gauges))
        table = [f"{name:<{width}}  {value:.6g}" for name, value in self.gauges.items()]
        table += [] if self.fit is None else [f"{'fit':<{width}}  {self.fit}"]
        return "\n".join([*table, "", *(map(str, self.warnings) if self.warnings else ["no warnings"])])


@torch.no_grad()
def diagnose(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    *,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_bias: Tensor | None = None,
    negatives: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    loss: HasTemperature | None = None,
    optimizer: Optimizer | None = None,
    history: Sequence[float] | None = None,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
) -> Diagnosis:
    """Compute gauges of pairs at the temperature of their training, and warn of what they show to be wrong.

    Give it pairs that the model was not trained on: those it was are ranked first and ask for ever colder temperatures.
    It takes a pass over the scores, those of `fit`, and one over the keys against each other.

    Args:
        query: (N, D), N of 2 or more. key: (M, D). temperature: a positive number or a tensor of one element.
        target, query_ids, key_ids, key_bias, negatives, symmetric, normalize, backend, workspace_limit: as of `sweep`.
            Keys that a `key_bias` of -inf leaves out, such as padding, have no part in any gauge.
        loss: the loss of the training, of whose learned temperature there are gauges. optimizer: of the training.
        history: the temperatures of the training's steps so far, the oldest first.

    Returns:
        A `Diagnosis`, of these gauges as far as they are known; the docs say what each warning means:
            temperature, nll, recall_at_1: the temperature, and at it the mean loss of the rows and their recall
            fitted_temperature, fitted_ratio, fitted_sigmas: that of `fit`, what it is of the temperature, and the log
                of that in standard errors; none where the fit has no minimum within a factor of 32 of the temperature
            negatives: the keys that a row is scored against, but for its positive
            hardest_share, effective_negatives: medians over the rows that have negatives, as of `Sweep`.
                effective_share: the second over `negatives`
            lost_in_16_bits: the share of the gradients 1 - p_i of rows whose p_i rounds to 1 in bfloat16
            mean_cosine, rank_share: of different rows of a side, and exp of the entropy of the eigenvalues of its
                covariance over min(D, N - 1), where sides differ the one that is further from good
            modality_gap: the distance of the means of both sides in root mean squares of a row's from its own side's
            equal_keys: the share of rows whose positive has an equal among their negatives. near_positive: of rows that
                rank a negative above a positive whose nearest other key is closer than a tenth of the squared distance
                that nearest keys have among so many, of their effective rank
            scale_of_max, weight_decay, movement: of a learned temperature, as of `diagnose_step`

    Raises:
        ValueError: shapes, devices, values, fewer than two pairs, no pair with a negative. TypeError: types, dtypes.
        RuntimeError: a backend that cannot run.

    References: the rank is that of Roy & Vetterli 2007; the gap, Liang et al. 2022, arXiv:2203.02053.
    """
    t = checks.one_temperature("temperature", temperature)
    problem = problem_of(query, key, target, query_ids, key_ids, key_bias, negatives, symmetric, normalize)
    target = problem.target
    if key_bias is not None:
        key, target, key_ids = _kept(key, target, key_ids, key_bias > -math.inf)
    given: dict[str, Any] = {
        "target": target, "query_ids": query_ids, "key_ids": key_ids, "negatives": negatives, "backend": backend,
        "workspace_limit": workspace_limit,
    }  # fmt: skip
    found = sweep(query, key, [t], **given, symmetric=symmetric, normalize=normalize)
    if not found.nll(t).isfinite():
        raise ValueError(f"query and key must be finite, got a loss of {found.nll(t).item()}")
    counted = len(key) - 1 + (0 if negatives is None else negatives.shape[-2])
    there = found.at(t).log_z > -math.inf
    gauges = {
        "temperature": t, "nll": found.nll(t).item(), "recall_at_1": found.recall(1).pessimistic,
        "negatives": float(counted), "hardest_share": _median(found.hardest_share(t)[there]),
    }  # fmt: skip
    behind = found.at(t).log_z.double() - found.pos.double() / t
    gauges |= _of_rows(behind[there], found.effective_negatives(t)[there], counted)
    best = fit(query, key, bounds=(t / AROUND, t * AROUND), **given, symmetric=symmetric, normalize=normalize)
    gauges |= _of_fit(best, t)
    sides = [_Side(rows) for rows in (query, key)]
    twins = sweep(key if target is None else key[target], key, [1.0], **given)  # the positives against the other keys
    gauges |= _of_sides(*sides) | _of_twins(twins, found.above, sides[1])
    gauges |= _of_learned(loss, optimizer, history)
    return _diagnosis(gauges, best.reason)


def diagnose_step(
    loss: HasTemperature, *, optimizer: Optimizer | None = None, history: Sequence[float] | None = None
) -> Diagnosis:
    """Compute gauges of the last call of a loss made with `record=True`, and of its temperature, without a pass.

    Whether a temperature is too cold or too warm is not among them: the pairs of a training do not tell.

    Args:
        loss: any loss of this package that records, after a call. optimizer, history: as of `diagnose`.

    Returns:
        A `Diagnosis`, of these gauges as far as they are known:
            temperature, nll, negatives, effective_negatives, effective_share, lost_in_16_bits: as of `diagnose`, of the
                rows that count: none that the loss ignores, nor of weight 0. Rows of no recorded mean are left out of
                the medians
            scale_of_max: exp(logit_scale) over `max_logit_scale`
            weight_decay: of the optimizer's group that holds the temperature's parameter
            movement: the greatest over the least temperature of a history of 50 or more, less 1; without such a
                history 0 where the optimizer does not have the parameter, or it requires no gradient

    Raises:
        TypeError: a loss without a temperature, types. ValueError: a loss that has recorded nothing, or whose rows have
        nothing to record, as those of `SigLipLoss`; recorded losses that are not finite, values.
    """
    if not isinstance(loss, HasTemperature) and not hasattr(loss, "recorded"):
        raise TypeError(f"loss must be one of this package that records, got {type(loss).__name__}")
    kept = getattr(loss, "recorded", None)
    if kept is None:
        getattr(loss, "check_record", lambda: None)()  # a loss that cannot record says why
        raise ValueError("loss must have recorded a call: make it with record=True and call it, got nothing recorded")
    pos, neg, t = (x[kept.counted] for x in (kept.pos, kept.neg, kept.temperature))
    losses, effective = infonce(neg - pos), kept.effective_negatives()
    if not losses.isfinite().all():
        bad = losses[~losses.isfinite()]
        raise ValueError(f"the recorded losses must be finite, got {bad[0].item()} among {len(bad)} of {len(losses)}")
    negatives = max(kept.keys - 1, 0)
    gauges = {
        "temperature": t.double().mean().item(), "nll": losses.mean().item(), "negatives": float(negatives),
    }  # fmt: skip
    behind = (neg.double() - pos.double())[neg > -math.inf]
    gauges |= _of_rows(behind, effective[~effective.isnan()], negatives)
    gauges |= _of_learned(loss, optimizer, history)
    return _diagnosis(gauges)


def _diagnosis(gauges: dict[str, float], fit: str | None = None) -> Diagnosis:
    """Return the gauges that are known, with what they warn of."""
    return Diagnosis({name: x for name, x in gauges.items() if math.isfinite(x)}, judged(gauges), fit)


def _kept(
    key: Tensor, target: Tensor | None, key_ids: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the keys that are kept, (M,) of bools, with the targets among them and their ids."""
    out = ~(kept if target is None else kept[target])
    if out.any():
        raise ValueError(f"key_bias must not be -inf for a row's positive, got row {int(out.nonzero()[0])}'s")
    if target is None:
        return key, target, key_ids
    return key[kept], (kept.cumsum(0) - 1)[target], None if key_ids is None else key_ids[kept]


def _median(x: Tensor) -> float:
    return x.median().item() if len(x) else math.nan


def _of_rows(behind: Tensor, effective: Tensor, negatives: int) -> dict[str, float]:
    """Return the gauges of rows that have negatives: how far these are behind the positive, neg - pos, float64, and the
    effective number of them, of rows where it is known."""
    median = _median(effective)
    # 1 - p, to which the row's gradient is proportional; of rows so far ahead that it is 0 in float64 too, all is lost
    share = torch.sigmoid(behind)
    lost, whole = share[share < ROUNDED].sum().item(), share.sum().item()
    none = math.nan if not len(behind) else 1.0
    return {
        "effective_negatives": median, "effective_share": median / max(negatives, 1),
        "lost_in_16_bits": lost / whole if whole else none,
    }  # fmt: skip


def _of_fit(best: Fit, t: float) -> dict[str, float]:
    """Return the gauges of a fit within AROUND of t; one that ends at such a bound lies beyond it, at least so far."""
    if best.converged:
        verdict = best.versus(t)
        ratio, sigmas = verdict.ratio, verdict.sigmas
    elif best.reason in (TOO_LOW, TOO_HIGH):
        ratio, sigmas = best.temperature / t, math.copysign(math.inf, best.temperature - t)
    else:
        return {}
    return {"fitted_temperature": best.temperature, "fitted_ratio": ratio, "fitted_sigmas": sigmas}


def _of_sides(query: _Side, key: _Side) -> dict[str, float]:
    """Return the gauges of the directions of both sides."""
    apart, spread = (query.mean - key.mean).norm().item(), math.sqrt((query.variance + key.variance) / 2)
    return {
        "mean_cosine": max(query.mean_cosine, key.mean_cosine), "rank_share": min(query.rank_share, key.rank_share),
        "modality_gap": apart / spread if spread else math.nan,
    }  # fmt: skip


def _of_twins(twins: Sweep, above: Tensor, keys: _Side) -> dict[str, float]:
    """Return the gauges of other keys that are near a row's positive; above: of the rows, how many keys score so."""
    equal, distance = twins.ties > 0, 2 - 2 * twins.hardest
    near = (distance < TWIN * keys.nearest) & ~equal
    return {
        "equal_keys": equal.double().mean().item(),
        "near_positive": (near & (above[: len(near)] > 0)).double().mean().item(),
    }


class _Side:
    """The mean and the covariance of unit rows."""

    def __init__(self, rows: Tensor):
        x = unit(rows, True, torch.float64 if rows.dtype == torch.float64 else torch.float32)
        n, d = x.shape
        self.mean = x.mean(0).double()
        self.variance = max(1 - self.mean.square().sum().item(), 0.0)  # the mean squared distance from the mean
        self.mean_cosine = (n * self.mean.square().sum().item() - 1) / max(n - 1, 1)
        x -= self.mean.to(x.dtype)
        product = x.T @ x if d <= n else x @ x.T  # of the same eigenvalues but for zeros
        p = torch.linalg.eigvalsh(product.double()).clamp_min(0)
        p = p / p.sum()
        rank = torch.exp(-torch.special.xlogy(p, p).sum()).item()
        self.rank_share = rank / max(min(d, n - 1), 1)
        # about the squared distance of the nearest of n in so many dimensions, whose mean is twice the variance
        self.nearest = 2 * self.variance * n ** (-2 / rank)


def _of_learned(
    loss: HasTemperature | None, optimizer: Optimizer | None, history: Sequence[float] | None
) -> dict[str, float]:  # fmt: skip
    """Return the gauges of a learned temperature."""
    if loss is None:
        if optimizer is not None or history is not None:
            raise ValueError("optimizer and history are about the temperature that a loss holds: pass loss too")
        return {}
    scale, most = (getattr(held_by(loss), name, None) for name in ("logit_scale", "max_logit_scale"))
    held = getattr(loss, "held_temperature", None) if scale is None else scale
    if not isinstance(held, nn.Parameter):
        return {}
    gauges: dict[str, float] = {}
    if scale is not None and most is not None:
        gauges["scale_of_max"] = math.exp(scale.item()) / most
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    groups = [g for g in optimizer.param_groups if any(held is x for x in g["params"])] if optimizer else []
    if groups:
        gauges["weight_decay"] = float(groups[0].get("weight_decay", 0.0))
    seen = [checks.one_temperature("history", t) for t in (() if history is None else history)]
    if len(seen) >= LEAST_HISTORY:
        gauges["movement"] = max(seen) / min(seen) - 1
    elif not held.requires_grad or (optimizer is not None and not groups):
        gauges["movement"] = 0.0  # a gradient of 0 says nothing: `zero_grad(set_to_none=False)` may have made it
    return gauges
