"""The temperature to start a training from, in closed form."""

from __future__ import annotations

import math

from .. import checks


def starting_temperature(candidates: int, probability: float = 0.9, gap: float = 1.0) -> float:
    """Return the temperature at which a positive that scores `gap` above all of its negatives has this probability.

        t = gap / log(candidates p / (1 - p)),    from    p = exp(gap / t) / (exp(gap / t) + candidates)

    Below it a pair that is told apart so well has less than 1 - p left to learn, and above it more, however good the
    encoder. The more negatives, the lower it is. With p = 1/2 and a gap of cos(pi / 4), 1 / t is the fixed scale of
    AdaCos, sqrt(2) log(classes - 1).

    Args:
        candidates: the negatives of a row, all of them at one cosine. probability: p, in (0, 1).
        gap: how far the positive's cosine is above theirs, in (0, 2]; 1 where negatives are orthogonal to the query and
            the positive is the query itself.

    Raises:
        ValueError: values, and a p that is no more than chance, 1 / (candidates + 1). TypeError: types.

    Reference: Zhang et al. 2019, arXiv:1905.00292 (AdaCos), section 3.1, whose scale is of this kind.
    """
    count = checks.whole("candidates", candidates, 1)
    p = checks.fraction("probability", probability)
    checks.positive_float("gap", gap)
    if gap > 2:
        raise ValueError(f"gap must be a difference of cosines, at most 2, got {gap}")
    if not 1 / (count + 1) < p < 1:
        raise ValueError(f"probability must be between chance, 1 / (candidates + 1), and 1, got {probability}")
    return gap / math.log(count * p / (1 - p))
