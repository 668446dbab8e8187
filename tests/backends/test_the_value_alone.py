"""Small calls of pairs of which nothing has a gradient: they take other operators, on rows as they come."""

import math

import pytest
import torch
from support.helpers import KINDS, bounds, embeddings, error, stretch

from fused_infonce.backends.torch import small
from fused_infonce.backends.torch.value import value
from fused_infonce.compose import repeated
from fused_infonce.functional import decoupled_info_nce, info_nce, nt_xent

CALLS = {
    "one direction": info_nce,
    "both directions": lambda query, key, **options: info_nce(query, key, symmetric=True, **options),
    "self-similarity": nt_xent,
    "decoupled": decoupled_info_nce,
}
LARGEST = 1.8e19  # norm whose square float32 holds


@pytest.fixture
def values(monkeypatch):
    """The values that were computed alone."""
    found = []

    def watched(*call):
        found.append(value(*call))
        return found[-1]

    monkeypatch.setattr(small, "value", watched)
    monkeypatch.setattr(repeated, "value", watched)
    return found


def pairs(kind="loose", n=33, dtype=torch.float32):
    return [stretch(x, 0.1, 10).to(dtype) for x in embeddings(kind, n, 24)[:2]]


def exact(call, query, key, **options):
    return call(query.double(), key.double(), backend="reference", **options)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_keeps_the_bounds(values, name, kind, temperature, reduction):
    options = {"temperature": temperature, "reduction": reduction}
    dtypes = torch.float32, torch.bfloat16, torch.float64
    for dtype in dtypes:
        query, key = pairs(kind, dtype=dtype)
        want, got = exact(CALLS[name], query, key, **options), CALLS[name](query, key, **options)
        assert got.dtype == (dtype if dtype == torch.float64 else torch.float32)
        if want.abs() >= 1e-30:
            assert error(got, want) <= bounds(dtype, temperature)[0]
    assert len(values) == len(dtypes)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("norm", [0, 5e-13, 1e-11, LARGEST, 1e20, math.inf, math.nan])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_norms_have_their_limits(values, name, norm, side, temperature):
    """Up to 1e-12 they count as it; where their squares overflow the loss is NaN. Nothing else may overflow."""
    given = [x / x.norm(dim=-1, keepdim=True) for x in pairs(n=7)]
    given[1 - side] *= LARGEST
    given[side][2] *= norm
    want = exact(CALLS[name], *given, temperature=temperature)
    got = CALLS[name](*given, temperature=temperature)
    if norm > LARGEST or math.isnan(norm):
        assert got.isnan()
    else:
        assert error(got, want) <= bounds(torch.float32, temperature)[0]
    assert len(values) == 1


@pytest.mark.filterwarnings("ignore:a batch of one pair")
def test_it_is_for_nothing_but_the_value_of_pairs(values):
    query, key = pairs()
    info_nce(query, key, weight=torch.ones(33))
    info_nce(query, key, normalize=False)
    info_nce(query, key, margin=0.1)
    info_nce(query, key, target=torch.arange(33))
    info_nce(query, key, reduction="none")
    info_nce(query[:1], key[:1])
    info_nce(query, key.clone().requires_grad_())
    info_nce(query, key, temperature=torch.tensor(0.1, requires_grad=True))
    assert not values
    with torch.no_grad():
        info_nce(query, key.clone().requires_grad_())
    assert len(values) == 1
