"""What may be wrong with a training, and how its gauges show it: a table of rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

Gauges = Mapping[str, float]

FACTOR = 1.5  # off the fitted temperature: the NLL of pairs with Gaussian noise is a tenth above its least
SIGMAS = 2.0  # standard errors, as of `Fit.versus`: what fewer pairs cannot tell is no warning
SHARE = 0.9  # of a row's gradient that one negative has, or of the negatives that share it: all but a tenth
ALONE = 1.4  # effective negatives: exp of the entropy of two, of which one has the SHARE, is 1.38
NEARLY_EQUAL = 0.9  # mean cosine of different rows: nine tenths of every row are one direction that they all share
FLAT = 0.1  # effective rank, of the dimensions that there are: nine tenths of them hold next to nothing
EQUAL = 0.01  # of the keys: each has a loss of log 2 or more, which no training removes
TWINS = 0.05  # of the rows: such rows push away what is all but their positive, and at worst cost so much recall
APART = 1.0  # distance of the means of two sides, in lengths of a row from its mean: a plane parts them
LOST = 0.1  # of the gradient: a tenth of what the pairs would teach
AT_MOST = 0.999  # of `max_logit_scale`: the clamp is reached but for rounding
STILL = 1e-4  # relative change of a temperature over a history: less than one step of Adam at a rate of 1e-4


class Warned(NamedTuple):
    """A warning of a `Diagnosis`: a name, the number it is about, what that says, why it comes about and what to do."""

    name: str
    number: float
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name} ({self.number:.4g}): {self.cause}. {self.remedy}."


class Rule(NamedTuple):
    """A warning and the gauges that raise it.

    number: the gauge that is shown. raised: whether gauges raise it, asked where all that it `needs` are there. unless:
    warnings that explain the same, under which this one is not judged
    """

    name: str
    number: str
    raised: Callable[[Gauges], bool]
    cause: str
    remedy: str
    needs: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()


def significant(gauges: Gauges) -> float:
    """Return the fitted temperature over the one in use where they differ significantly, else 1."""
    return gauges["fitted_ratio"] if abs(gauges["fitted_sigmas"]) > SIGMAS else 1.0


def flat(gauges: Gauges) -> bool:
    """Return whether the softmax is spread over nearly all negatives: no colder than pairs at chance ask for."""
    return gauges.get("effective_share", math.nan) > SHARE


RULES = (
    Rule(
        "cold", "fitted_ratio", lambda g: significant(g) > FACTOR and not flat(g),
        "these pairs ask for so many times the temperature in use, whose probabilities are overconfident",
        "Raise it, or let HeldOutTemperature set it; a learned one has followed the pairs that it was trained on",
        ("fitted_sigmas",),
    ),
    Rule(
        "warm", "fitted_ratio", lambda g: significant(g) < 1 / FACTOR,
        "these pairs ask for this part of the temperature in use, whose probabilities say less than the scores know",
        "Lower it, or let HeldOutTemperature set it",
        ("fitted_sigmas",),
    ),
    Rule(
        "one negative", "hardest_share", lambda g: g["hardest_share"] > SHARE and g["negatives"] >= 2,
        "the hardest negative has this share of the median row's gradient, and the others teach it nothing",
        "Raise the temperature, give more negatives, or see whether the hardest ones are positives",
        ("negatives",),
    ),
    Rule(
        "one negative", "effective_negatives",
        lambda g: g["effective_negatives"] < ALONE and g["negatives"] >= 2 and "hardest_share" not in g,
        "the gradient of the median row is spread over no more negatives than these, and the others teach it nothing",
        "Raise the temperature, give more negatives, or see whether the hardest ones are positives",
        ("negatives",),
    ),
    Rule(
        "all negatives", "effective_share", lambda g: flat(g) and g["negatives"] >= 2,
        "the gradient of the median row is spread over this share of its negatives, hard and easy ones nearly alike",
        "Lower the temperature; where recall_at_1 is at chance, see first whether the pairs are pairs",
        ("negatives",),
    ),
    Rule(
        "collapse", "mean_cosine", lambda g: g["mean_cosine"] > NEARLY_EQUAL,
        "rows of different pairs have this cosine in the mean: nearly all of each is one direction that all share",
        "Subtract the mean of the embeddings, check that the encoder is not frozen, in eval mode, or without its head, "
        "and lower the learning rate",
    ),
    Rule(
        "collapse", "rank_share", lambda g: g["rank_share"] < FLAT,
        "the effective rank of the embeddings is this share of their dimensions: they lie in few of these",
        "Look for a bottleneck in the head, lower the temperature, and give more or more diverse negatives",
        unless=("collapse",),
    ),
    Rule(
        "duplicates", "equal_keys", lambda g: g["equal_keys"] > EQUAL,
        "this share of the positives has an equal key among its row's negatives",
        "Pass ids with which equal keys are left out, such as key_ids, or remove them from the data",
        unless=("collapse",),
    ),
    Rule(
        "false negatives", "near_positive", lambda g: g["near_positive"] > TWINS,
        "this share of the rows has a negative that scores above its positive, which another key all but equals",
        "Leave such negatives out: by ids, by a guide (GuidedInfoNCELoss), or with a margin when they are mined",
        unless=("collapse",),
    ),
    Rule(
        "modality gap", "modality_gap", lambda g: g["modality_gap"] > APART,
        "the means of the two sides are so many times further apart than rows are from the mean of their side",
        "Harmless where queries only ever meet keys; else train at a higher temperature, or subtract each side's mean",
    ),
    Rule(
        "16 bits lose it", "lost_in_16_bits", lambda g: g["lost_in_16_bits"] > LOST,
        "this share of the gradient is of rows whose probability rounds to 1 in bfloat16, so that it is 0 there",
        "Compute the loss with this library, which keeps it; in other code, cast the logits to float32 first",
    ),
    Rule(
        "clamped", "scale_of_max", lambda g: g["scale_of_max"] >= AT_MOST,
        "the learned scale is at this part of max_logit_scale, where only the clamp holds it",
        "A learned temperature fits the training pairs: fix it, set it with HeldOutTemperature, or raise the maximum",
    ),
    Rule(
        "decayed", "weight_decay", lambda g: g["weight_decay"] > 0,
        "the optimizer decays the temperature's parameter at this rate: a logit scale towards a temperature of 1",
        "Put it into a parameter group of its own with weight_decay=0",
    ),
    Rule(
        "stuck", "movement", lambda g: g["movement"] < STILL,
        "the learned temperature has changed by this share of itself: the optimizer does not have it, it has no "
        "gradient, or steps are rounded away in 16 bits",
        "Give loss.parameters() to the optimizer, and keep logit_scale in float32",
        unless=("clamped",),
    ),
)  # fmt: skip


def judged(gauges: Gauges) -> tuple[Warned, ...]:
    """Return the warnings that gauges raise, in the order of the rules."""
    found: list[Warned] = []
    for rule in RULES:
        known = all(not math.isnan(gauges.get(name, math.nan)) for name in (rule.number, *rule.needs))
        explained = {each.name for each in found} & set(rule.unless)
        if known and not explained and rule.raised(gauges):
            found.append(Warned(rule.name, gauges[rule.number], rule.cause, rule.remedy))
    return tuple(found)
