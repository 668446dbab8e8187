"""The closed form of a starting temperature, against the softmax and AdaCos."""

import math

import pytest
import torch

from fused_infonce import info_nce
from fused_infonce.temperature import starting_temperature


@pytest.mark.parametrize("candidates", [1, 7, 63, 4095])
@pytest.mark.parametrize("probability", [0.6, 0.9, 0.999])
@pytest.mark.parametrize("gap", [0.2, 1.0, 2.0])
def test_the_softmax_has_the_probability(candidates, probability, gap):
    t = starting_temperature(candidates, probability, gap)
    scores = torch.tensor([gap] + [0.0] * candidates, dtype=torch.float64) / t
    assert torch.softmax(scores, 0)[0].item() == pytest.approx(probability, rel=1e-12)


def test_the_loss_of_orthogonal_pairs_is_that_of_the_probability():
    rows = torch.eye(32, dtype=torch.float64)
    assert info_nce(rows, rows, temperature=starting_temperature(31)).item() == pytest.approx(-math.log(0.9), rel=1e-9)


def test_of_half_a_probability_and_an_angle_of_45_degrees_it_is_the_scale_of_adacos():
    classes = 10575  # of CASIA-WebFace, as in the paper
    assert 1 / starting_temperature(classes - 1, 0.5, math.cos(math.pi / 4)) == pytest.approx(
        math.sqrt(2) * math.log(classes - 1), rel=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "candidates must be"), ((1.5,), TypeError, "candidates must be"),
        ((9, 0.1), ValueError, "between chance"), ((9, 1.0), ValueError, "between chance"),
        ((9, 1.1), ValueError, r"probability must be in \[0, 1\]"), ((9, 0.9, 0.0), ValueError, "gap must be"),
        ((9, 0.9, 2.5), ValueError, "at most 2"), ((9, "high"), TypeError, "probability must be"),
    ],
)  # fmt: skip
def test_what_gives_no_temperature_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        starting_temperature(*arguments)
