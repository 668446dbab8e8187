"""NT-Xent."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import contrast, reference, validation
from ..problem import Problem, accumulator
from .compose import call_options, reduced


def nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """NT-Xent, SimCLR's loss: every row of both views against all other rows, its other view the positive.

        loss_i = -log( exp(s_i,p(i)) / sum_{j != i} exp(s_ij) ),    z = [view_a; view_b],  s_ij = cos(z_i, z_j) / t_i

    The scores are symmetric, so half of them are computed.

    Args:
        view_a, view_b: (N, D) each, row i of one the positive of row i of the other; dtypes as in `info_nce`.
        temperature: as in `info_nce`; per row it has (2N,) values, those of `view_a` first.
        reduction: "mean" over the 2N rows, "sum", or "none": (2N,), the rows of `view_a` first.
        normalize, backend, workspace_limit: as in `info_nce`.

    Returns and raises: as `info_nce`. Reference: Chen et al. 2020, arXiv:2002.05709.
    """
    validation.one_of("reduction", reduction, validation.REDUCTIONS)
    validation.one_of("backend", backend, validation.BACKENDS)
    if not validation.alike(view_a, view_b):
        validation.embeddings("view_a", view_a, 2, "(N, D)")
        validation.embeddings("view_b", view_b, 2, "(N, D)")
        validation.same_kind({"view_a": view_a, "view_b": view_b})
        if view_a.shape != view_b.shape:
            raise ValueError(f"view_b must have shape {tuple(view_a.shape)} as view_a has, got {tuple(view_b.shape)}")
    rows = torch.cat([view_a, view_b])
    n = rows.shape[0]
    t = validation.temperature(temperature, n, accumulator(contrast.compute_dtype([rows])), rows.device)
    options = call_options(backend, workspace_limit, temperature, normalize)
    if backend == "reference":
        return reference.nt_xent(view_a, view_b, t, reduction, normalize=normalize)
    target = torch.arange(n, device=rows.device).roll(n // 2)
    problem = Problem(rows, rows, t, target, normalize=normalize, self_similar=True)
    return reduced(problem, options, reduction, symmetric=False)
