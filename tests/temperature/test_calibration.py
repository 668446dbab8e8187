"""`calibration` against bins filled one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_infonce.temperature import calibration, sweep


def error_of(groups: list[list[tuple[float, bool]]], n: int) -> float:
    return sum(abs(sum(c for c, _ in group) - sum(y for _, y in group)) for group in groups) / n


def drawn(n: int) -> tuple[Tensor, Tensor]:
    confidence = torch.rand(n, dtype=torch.float64) ** 0.5
    return confidence, torch.rand(n, dtype=torch.float64) < confidence**2


@pytest.mark.parametrize("bins", [1, 2, 7, 15])
@pytest.mark.parametrize("n", [1, 5, 100])
def test_it_is_what_bins_filled_one_by_one_give(n, bins):
    confidence, correct = drawn(n)
    confidence[0] = 1.0
    if n > 2:
        confidence[1], confidence[2] = 0.0, 1 / bins  # on the edges
    rows = list(zip(confidence.tolist(), correct.tolist(), strict=True))
    width: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for c, y in rows:
        width[next(b for b in range(bins) if c <= (b + 1) / bins or b == bins - 1)].append((c, y))
    order = sorted(rows, key=lambda row: row[0])
    mass = [[order[i] for i in range(n) if i * bins // n == b] for b in range(bins)]
    found = calibration(confidence, correct, bins)
    assert found.ece == pytest.approx(error_of(width, n))
    assert found.ece_equal_mass == pytest.approx(error_of(mass, n))
    assert found.brier == pytest.approx(sum((c - y) ** 2 for c, y in rows) / n)
    assert found.sizes.tolist() == [len(group) for group in width]
    for b, group in enumerate(width):
        if group:
            assert found.confidence[b].item() == pytest.approx(sum(c for c, _ in group) / len(group))
            assert found.accuracy[b].item() == pytest.approx(sum(y for _, y in group) / len(group))
        else:
            assert found.accuracy[b].isnan()


def test_what_is_calibrated_has_a_small_error_and_what_is_too_sure_a_large_one():
    confidence, _ = drawn(20_000)
    assert calibration(confidence, torch.rand(20_000, dtype=torch.float64) < confidence).ece < 0.02
    assert calibration(confidence, torch.rand(20_000, dtype=torch.float64) < confidence - 0.2).ece > 0.15


def test_of_a_sweep_it_is_that_of_the_highest_probability():
    query = torch.randn(100, 6, dtype=torch.float64)
    key = query + 2 * torch.randn_like(query)
    found, t = sweep(query, key), 0.125
    p = torch.softmax(torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T / t, 1)
    want = calibration(p.amax(1), p.argmax(1) == torch.arange(100), 10)
    got = found.calibration(t, 10)
    assert got.ece == pytest.approx(want.ece)
    assert got.brier == pytest.approx(want.brier)
    assert torch.equal(got.sizes, want.sizes)
    assert got.nll == pytest.approx(-p.diagonal().log().mean().item())


def test_mistakes_are_refused():
    confidence, correct = drawn(4)
    with pytest.raises(ValueError, match=r"^confidence must be in \[0, 1\], got 2"):
        calibration(torch.full_like(confidence, 2), correct)
    with pytest.raises(TypeError, match=r"^correct must be a bool tensor of shape \(4,\)"):
        calibration(confidence, correct.long())
    with pytest.raises(ValueError, match=r"^bins must be 1 or more, got 0"):
        calibration(confidence, correct, 0)
    with pytest.raises(ValueError, match=r"^confidence must have a row"):
        calibration(confidence[:0], correct[:0])
