"""What a file of pairs says about its temperature, as a table for people and as an object for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends import BackendName
from ..backends.ladder import Ladder
from ..compose.arguments import call_options
from .diagnosis import Diagnosis, diagnose
from .famous import FAMOUS
from .fitting import BOUNDS, Fit, Search, Verdict
from .ranking import Bounds
from .sweep import Sweep, by_part, prepared, problem_of
from .thresholds import Threshold, threshold

CHUNK = 1024  # rows of one sweep, after which a progress bar moves
RANDOM = 100_000  # pairs of a query and a key that is no positive of it
RANKS = (1, 5, 10)


def nothing(amount: int) -> None:
    """Take note of progress by doing nothing."""


@dataclass(frozen=True)
class Pairs:
    """Queries with their positive keys, swept a chunk of rows at a time.

    query: (N, D). key: (M, D). target: (N,) int64, the key of each query; None: key i of query i, M = N. ids: (M,)
    int64; a key with the id of a query's positive is no negative of it. symmetric: keys against queries too. All are on
    one device, and results on the CPU.
    """

    query: Tensor
    key: Tensor
    target: Tensor | None = None
    ids: Tensor | None = None
    symmetric: bool = False
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        shapes = f"{tuple(self.query.shape)} and {tuple(self.key.shape)}"
        if self.query.shape[1] != self.key.shape[1]:
            raise ValueError(f"query and key must be of one width D, got shapes {shapes}: are they of one model?")
        if self.query.dtype != self.key.dtype:
            raise TypeError(f"query and key must have one dtype, got {self.query.dtype} and {self.key.dtype}")
        if self.target is None and len(self.query) != len(self.key):
            raise ValueError(f"without a target, row i of key is the positive of row i of query; got shapes {shapes}")
        if self.symmetric and self.target is not None:
            raise ValueError("symmetric needs row i of key to be the positive of row i of query: leave target out")
        if self.target is not None and not ((self.target >= 0) & (self.target < len(self.key))).all():
            row = int(((self.target < 0) | (self.target >= len(self.key))).nonzero()[0])
            raise ValueError(
                f"target must be rows of key, 0 to {len(self.key) - 1}, got {self.target[row].item()} for query {row}: "
                "are query and key the wrong way round?"
            )
        if len(self.query) < 2:
            raise ValueError(f"a temperature is fitted to 2 pairs or more, got {len(self.query)}")

    def to(self, device: str) -> Pairs:
        """Return the pairs on a device."""
        target, ids = (None if x is None else x.to(device) for x in (self.target, self.ids))
        return replace(self, query=self.query.to(device), key=self.key.to(device), target=target, ids=ids)

    @property
    def positives(self) -> Tensor:
        """The row of every query's positive key, (N,) int64."""
        return torch.arange(len(self.query), device=self.query.device) if self.target is None else self.target

    @property
    def rows(self) -> int:
        """How many rows a sweep has."""
        return len(self.query) * (2 if self.symmetric else 1)

    def sweeps(self, advance: Callable[[int], None] = nothing) -> Callable[[float, float], Sweep]:
        """Return a function that sweeps the pairs from a coldest to a warmest temperature, of which keys are prepared
        once; it calls `advance` with how many rows more are done."""
        positives, options = self.positives, call_options(self.backend, None)
        ids = None if self.ids is None else self.ids[positives]
        directions = [(self.query, self.key, ids, self.ids)]
        if self.symmetric:
            directions.append((self.key, self.query, self.ids, ids))
        problems = []
        for query, key, query_ids, key_ids in directions:
            problems.append(prepared(problem_of(query, key, positives, query_ids, key_ids), options))
            advance(0)

        def sweep_of(coldest: float, warmest: float) -> Sweep:
            ladder = Ladder.over(coldest, warmest)
            return joined((by_part(problem, options, ladder, CHUNK) for problem in problems), self.rows, advance)

        return sweep_of

    def diagnosis(self, temperature: float) -> Diagnosis:
        """Return what is wrong with a training at this temperature; see `diagnose`."""
        ids = None if self.ids is None else self.ids[self.positives]
        return diagnose(
            self.query, self.key, temperature, target=self.target, query_ids=ids, key_ids=self.ids,
            symmetric=self.symmetric, backend=self.backend,
        )  # fmt: skip

    def random(self, advance: Callable[[int], None] = nothing, count: int = RANDOM) -> Tensor:
        """Return the cosines of a query and a random key that is no positive of it, of at most `count` such pairs.

        Every query has as many of them, but for one more, and the same keys are drawn each time.
        """
        device = self.query.device
        i = torch.arange(count, device=device) * len(self.query) // count  # in order, as a file is read best
        j = torch.randint(len(self.key), (count,), generator=torch.Generator().manual_seed(0)).to(device)
        positive = self.positives[i]
        other = j != positive if self.ids is None else self.ids[j] != self.ids[positive]
        i, j = i[other], j[other]
        cosines = torch.empty(len(i), device=device)
        for a, b, some in zip(*(x.split(CHUNK // 4) for x in (i, j, cosines)), strict=True):
            some.copy_(torch.cosine_similarity(self.query[a].float(), self.key[b].float(), dim=1))
            advance(0)
        return cosines.cpu()


def joined(directions: Iterable[Iterable[Sweep]], rows: int, advance: Callable[[int], None]) -> Sweep:
    """Return the sweep of the rows of several, so many in all, over one ladder, on the CPU; each is let go of."""
    whole: list[Tensor] = []
    temperatures, done = None, 0
    for part in chain.from_iterable(directions):
        temperatures, *found = (getattr(part, each.name).cpu() for each in fields(part))
        whole = whole or [x.new_empty((*x.shape[:-1], rows)) for x in found]
        for to, x in zip(whole, found, strict=True):
            to[..., done : done + x.shape[-1]] = x
        done += len(part.pos)
        advance(len(part.pos))
    assert temperatures is not None
    return Sweep(temperatures, *whole)


class Line(NamedTuple):
    """What one temperature makes of the pairs: the NLL, the calibration error, and medians over the rows."""

    temperature: float
    nll: float
    ece: float
    effective_negatives: float
    hardest_share: float


@dataclass(frozen=True)
class Report:
    """The sweep of some pairs, the temperature fitted to them, the scores of random negatives, and the temperature of
    the training where it is known."""

    pairs: Pairs
    sweep: Sweep
    fit: Fit
    random: Tensor
    temperature: float | None = None
    diagnosis: Diagnosis | None = None

    @staticmethod
    def of(
        pairs: Pairs, temperature: float | None = None, diagnosed: bool = False,
        advance: Callable[[int], None] = nothing,
    ) -> Report:  # fmt: skip
        """Sweep the pairs and fit a temperature to them.

        Args:
            temperature: that of their training, to compare with. diagnosed: whether to warn of what is wrong at that
                temperature. advance: as of `Pairs.sweeps`.
        """
        if temperature is not None:
            checked_temperature(temperature)
        elif diagnosed:
            raise ValueError("a diagnosis is of a training: give its temperature")

        random = pairs.random(advance)
        sweep_of = pairs.sweeps(advance)
        found = sweep_of(*BOUNDS)
        best = Search(sweep_of, pairs.symmetric, BOUNDS).run_from(found, BOUNDS)
        del sweep_of  # and with it the keys
        advance(0)
        diagnosis = pairs.diagnosis(temperature) if diagnosed and temperature is not None else None
        return Report(pairs, found, best, random, temperature, diagnosis)

    @property
    def verdict(self) -> Verdict | None:
        """How the temperature of the training compares with the fitted one, where there are both."""
        return self.fit.versus(self.temperature) if self.temperature is not None and self.fit.converged else None

    def lines(self) -> list[Line]:
        """Return what the defaults, the training's and the fitted temperature make of the pairs, coldest first."""
        own = [] if self.temperature is None else [self.temperature]
        fitted = [self.fit.temperature] if self.fit.converged else []
        return [self.line(t) for t in sorted({*FAMOUS, *own, *fitted})]

    def line(self, t: float) -> Line:
        """Return what a temperature makes of the pairs."""
        of_rows = (self.sweep.effective_negatives(t), self.sweep.hardest_share(t))
        return Line(t, self.sweep.nll(t).item(), self.sweep.calibration(t).ece, *(x.median().item() for x in of_rows))

    def use(self) -> dict[str, float] | None:
        """Return the fitted temperature under the names that libraries give it, or None where there is none."""
        if not self.fit.converged:
            return None
        t = self.fit.temperature
        return {"temperature": t, "scale": 1 / t, "logit_scale": -math.log(t)}

    def plot(self, path: Path) -> None:
        """Draw the report; see `Sweep.plot`."""
        self.sweep.plot(path, self.fit, self.temperature, self.random)

    def as_dict(self) -> dict[str, Any]:
        """Return everything that the report says, of numbers, strings, lists and None alone."""
        verdict = self.verdict
        return {
            "pairs": len(self.pairs.query),
            "keys": len(self.pairs.key),
            "dimensions": self.pairs.query.shape[1],
            "symmetric": self.pairs.symmetric,
            "retrieval": {name: list(bounds) for name, bounds in self.retrieval().items()},
            "thresholds": {name: finite(x._asdict()) for name, x in self.thresholds().items()},
            "temperatures": [finite(line._asdict()) for line in self.lines()],
            "fit": finite(self.fit._asdict()),
            "trained_at": self.temperature,
            "verdict": None if verdict is None else finite(verdict._asdict()),
            "use": self.use(),
            "diagnosis": None if self.diagnosis is None else finite(self.diagnosis.as_dict()),
        }

    def thresholds(self) -> dict[str, Threshold]:
        """Return the cosines that tell positives from the hardest and from random negatives with equal errors."""
        found = {"hardest": self.sweep.hardest, "random": self.random}
        return {name: threshold(self.sweep.pos, scores) for name, scores in found.items()}

    def retrieval(self) -> dict[str, Bounds]:
        """Return retrieval metrics by name, with both bounds that ties leave."""
        recalls = {f"recall_at_{k}": self.sweep.recall(k) for k in RANKS}
        return {**recalls, "mrr": self.sweep.mrr(), "median_rank": self.sweep.median_rank()}

    def __str__(self) -> str:
        parts = [self._retrieval(), self._thresholds(), self._table(), self._verdict(), self._warnings()]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _retrieval(self) -> list[str]:
        """Return the metrics with ties counted against the positives, and beside them for them where that differs."""
        shown = {name.replace("_at_", "@").replace("_", " "): b for name, b in self.retrieval().items()}
        cells = {name: [f"{x:.4g}" for x in bounds] for name, bounds in shown.items()}
        if all(low == high for low, high in cells.values()):
            return ["retrieval", *(f"{name:<13}{low:>9}" for name, (low, _) in cells.items())]
        head = f"{'retrieval':<13}{'ties last':>11}{'ties first':>11}"
        return [head, *(f"{name:<13}{high:>11}{low:>11}" for name, (high, low) in cells.items())]

    def _thresholds(self) -> list[str]:
        names = {"hardest": "each query's hardest negative", "random": "random negatives"}
        rows = [f"{'':<13}{x.score:>9.4f}{x.error:>9.4f}  {names[k]}" for k, x in self.thresholds().items()]
        return [f"{'cosine':<13}{'at least':>9}{'errors':>9}  tells positives from", *rows]

    def _table(self) -> list[str]:
        head = f"{'temperature':<13}{'NLL':>9}{'ECE':>9}{'negatives':>11}{'hardest':>9}  source"
        notes = dict(FAMOUS)
        for t, note in ((self.temperature, "yours"), (self.fit.temperature if self.fit.converged else None, "fitted")):
            if t is not None:
                notes[t] = f"{note}; {FAMOUS[t]}" if t in FAMOUS else note
        rows = [
            f"{x.temperature:<13.4g}{x.nll:>9.4f}{x.ece:>9.4f}{x.effective_negatives:>11.1f}{x.hardest_share:>9.3g}"
            f"  {notes.get(x.temperature, '')}"
            for x in self.lines()
        ]
        return [head, *(row.rstrip() for row in rows)]

    def _warnings(self) -> list[str]:
        if self.diagnosis is None:
            return []
        return [str(warned) for warned in self.diagnosis.warnings] or ["There is nothing to warn of."]

    def _verdict(self) -> list[str]:
        use, verdict = self.use(), self.verdict
        if use is None:
            return [f"No temperature fits best: {self.fit.reason}."]
        lines = [f"The temperature that fits these pairs best is {self.fit.temperature:.4g} +- {self.fit.stderr:.2g}."]
        if verdict is not None:
            lines.append(
                f"A training at {self.temperature:g} is {verdict.verdict} for them: the best is {verdict.ratio:.3g} "
                f"times that, {abs(verdict.sigmas):.1f} standard errors away."
            )
        return [*lines, "Use " + ", or ".join(f"{name}={value:.4g}" for name, value in use.items()) + "."]


def finite(values: Any) -> Any:
    """Return nested values with None for NaN and infinity, which JSON lacks."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def checked_temperature(t: float) -> None:
    """Check a temperature of a training, and say so where it looks like its inverse."""
    t = checks.one_temperature("temperature", t)
    low, high = BOUNDS
    if not low <= t <= high:
        hint = f": is it a scale, of the temperature {1 / t:.4g}?" if low <= 1 / t <= high else ""
        raise ValueError(f"temperature must be in [{low:g}, {high:g}], got {t:g}{hint}")
