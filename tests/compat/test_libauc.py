"""`GlobalContrastiveLoss` has the gradients, the estimates and the temperatures of LibAUC's `GCLoss`, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.libraries import library, seeds, without_package

from fused_infonce import GlobalContrastiveLoss
from fused_infonce.temperature import IndividualTemperature

original = library("libauc.losses.contrastive", without_package)

SAMPLES, N, D = 40, 8, 6
OPTIONS = {"tau_min": 0.05, "tau_max": 0.7, "rho": 0.3, "eta": 0.01, "beta": 0.9}


def pair(views, individual):
    """Return ours, theirs, and by how much their gradients are larger."""
    tables = [IndividualTemperature(SAMPLES, 0.1, bounds=(0.05, 0.7), lr=0.01) for _ in range(2)]
    ours = GlobalContrastiveLoss(
        SAMPLES, temperature=tables[0] if individual else 0.1, gamma=0.7, negatives="views" if views else "keys",
        key_temperature=tables[1] if individual and not views else None,
    ).double()  # fmt: skip
    kind = original.GCLoss_v1 if views else original.GCLoss_v2
    theirs = kind(N=SAMPLES, tau=0.1, gamma=0.7, enable_isogclr=individual, **OPTIONS)
    for name, x in vars(theirs).items():
        if isinstance(x, torch.Tensor):
            setattr(theirs, name, x.double())
    return ours, theirs, 2 if views else N - 1


def state_of(theirs, views):
    """Return their log u, and the temperatures that they have."""
    if views:
        return theirs.u.log().T, [getattr(theirs, "learnable_tau", None)]
    log_u = torch.cat([theirs.u1.log() + theirs.b1, theirs.u2.log() + theirs.b2], 1).T
    return log_u, [getattr(theirs, f"learnable_tau_{name}", None) for name in ("img", "txt")]


@pytest.mark.parametrize("seed", seeds(8))
@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize("individual", [True, False])
def test_a_training_has_the_originals_gradients_and_state(seed, views, individual):
    """The first epoch sees every sample once; there theirs takes a batch's own estimates too."""
    torch.manual_seed(seed)
    ours, theirs, factor = pair(views, individual)
    order = torch.randperm(SAMPLES)
    for epoch, index in [*((0, x) for x in order.split(N)), *((1, torch.randperm(SAMPLES)[:N]) for _ in range(15))]:
        theirs.adjust_gamma(epoch)
        a, b = torch.randn(2, N, D, dtype=torch.float64)
        inputs = a.requires_grad_(), (a.detach() + 0.3 * b).requires_grad_()
        want = theirs(*(F.normalize(x, dim=1) for x in inputs), index)
        want = want if views else want[0]
        for got, grad in zip(*(torch.autograd.grad(x, inputs) for x in (ours(*inputs, index), want)), strict=True):
            torch.testing.assert_close(factor * got, grad, rtol=1e-6, atol=1e-9)
    log_u, temperatures = state_of(theirs, views)
    torch.testing.assert_close(ours.log_u.view_as(log_u), log_u, rtol=1e-6, atol=1e-9)
    for table, tau in zip((ours.held_temperature, ours.key_temperature), temperatures, strict=False):
        if individual:
            torch.testing.assert_close(table.values, tau[:, 0], rtol=1e-6, atol=0)
            assert table.values.unique().numel() > SAMPLES / 2
