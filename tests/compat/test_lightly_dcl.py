"""Our decoupled loss of two views has the values and gradients of lightly's `DCLLoss` and `DCLWLoss`."""

from __future__ import annotations

import pytest
import torch
from support.libraries import library, without_package

from fused_infonce import DCLLoss, decoupled_nt_xent

library("lightly.utils.dist", without_package)
original = library("lightly.loss.dcl_loss", without_package)

# theirs makes a tensor of a tensor
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")


def call(seed):
    torch.manual_seed(seed)
    n, d = int(torch.randint(2, 40, ())), int(torch.randint(2, 48, ()))
    t = float(torch.empty(()).uniform_(0.05, 1))
    a = torch.randn(n, d)
    return [a, torch.rand(()) * a + torch.randn(n, d)], t


def both(losses, inputs, dtype):
    results = []
    for loss in losses:
        views = [x.to(dtype).requires_grad_() for x in inputs]
        value = loss(*views)
        results.append([value, *torch.autograd.grad(value, views)])
    return zip(*results, strict=True)


def check(ours, theirs, inputs):
    """Within 1e-5, and in float64 within 1e-10; where theirs is itself not that exact in float32, what it lacks."""
    exact = list(both([ours, theirs], inputs, torch.float64))
    for got, want in exact:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for (got, want), (_, truth) in zip(both([ours, theirs], inputs, torch.float32), exact, strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert got.shape == want.shape
        allowed = 1e-5 * truth.norm() + 2 * (want - truth).norm()
        assert (got - want).norm() <= allowed
        assert (got - truth).norm() <= allowed  # a loss near 0 is a difference of larger numbers


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("sigma", [None, 0.5])
def test_equals_the_original(seed, sigma):
    inputs, t = call(seed)
    theirs = original.DCLLoss(temperature=t) if sigma is None else original.DCLWLoss(temperature=t, sigma=sigma)
    check(DCLLoss(t, sigma=sigma), theirs, inputs)


@pytest.mark.parametrize("seed", range(20))
def test_sigma_is_the_originals_weight_function(seed):
    inputs, t = call(seed)
    sigma = 0.2 + 0.1 * seed
    check(DCLLoss(t, sigma=sigma), original.DCLWLoss(t, sigma), inputs)

    def weight(a, b):  # theirs is given unit rows, and the two views the other way round for the second
        return 1 + (a * a * b).sum(1).abs()

    def ours(a, b):
        x, y = (torch.nn.functional.normalize(z, dim=1) for z in (a, b))
        return decoupled_nt_xent(a, b, t, positive_weight=torch.cat([weight(x, y), weight(y, x)]))

    check(ours, original.DCLLoss(t, weight_fn=weight), inputs)


def test_a_sample_alone_has_loss_0_where_the_original_has_minus_infinity():
    """Theirs is -inf: of no negatives the logarithm of the sum is. Ours counts such a row as 0."""
    a, b = torch.randn(1, 4), torch.randn(1, 4)
    assert original.DCLLoss()(a, b) == -torch.inf
    assert DCLLoss()(a, b) == 0
