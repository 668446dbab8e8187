"""Calibration errors against those of torchmetrics."""

from __future__ import annotations

import pytest
import torch
from support.libraries import library

from fused_infonce.temperature import calibration, sweep

metrics = library("torchmetrics.functional.classification")


@pytest.mark.parametrize("bins", [1, 5, 15, 40])
def test_of_two_outcomes(bins):
    for case in range(20):
        generator = torch.Generator().manual_seed(case)
        probability = torch.rand(3 + 40 * case, generator=generator)
        correct = torch.rand(len(probability), generator=generator) < probability**2
        theirs = metrics.binary_calibration_error(probability, correct.int(), n_bins=bins, norm="l1")
        assert calibration(probability, correct, bins).ece == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize("t", [0.05, 0.125, 0.5])
def test_of_a_sweep_as_of_classes(t):
    query = torch.randn(300, 16)
    key = query + 2 * torch.randn_like(query)
    scores = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T
    theirs = metrics.multiclass_calibration_error(
        torch.softmax(scores / t, 1), torch.arange(300), num_classes=300, n_bins=15, norm="l1"
    )
    assert sweep(query, key).calibration(t).ece == pytest.approx(theirs.item(), abs=2e-5)
