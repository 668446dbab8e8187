"""A temperature that rises with the alignment of the positive pairs, as MACL has it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..backends import Options
from ..backends.contract import Problem, Temperature
from ..backends.indexing import take_rows
from ..backends.precision import without_autocast
from ..compose.arguments import call_options, of_keys
from ..compose.rows import dots, unit
from ..distributed import DistributedLike, gather, together


@together
def alignment_temperature(
    query: Tensor,
    positive_key: Tensor,
    temperature: float | Tensor = 0.1,
    alpha: float = 0.5,
    threshold: float = 0.0,
    *,
    normalize: bool = True,
    distributed: DistributedLike = False,
) -> Tensor:
    """Return a temperature that rises with the alignment of the positive pairs, for any loss.

        t = temperature (1 + alpha (A - threshold)),    A = mean_i cos(q_i, k_i)

    Early in a training pairs are not aligned, and a low temperature pushes hard negatives apart; later a higher one
    spares those that belong together. A gets no gradient. `model_aware_info_nce` has it inside.

    Args:
        query, positive_key: (N, D) each, row i of one the positive of row i of the other; float16, bfloat16, float32 or
            float64. With no rows the temperature is as it was given.
        temperature: a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per row; gradients flow
            to tensors.
        alpha: in [0, 1], how far the temperature follows. threshold: in [0, 1], the alignment that leaves it as it is.
        normalize: divide every row by max(norm, 1e-12) first; else A is the mean of the products as they are.
        distributed: over whose pairs A is the mean: False (this process's), True (those of the default process group),
            a `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d temperature, or (N,) for one per row: float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, values, a temperature that is not positive. TypeError: types, dtypes.

    Reference: Huang et al. 2023, arXiv:2207.07874.
    """
    options = call_options("auto", None, distributed=distributed)
    temperature = gather.shared(options.call, temperature)
    problem = of_keys(query, positive_key, None, temperature, "unpaired", symmetric=False, normalize=normalize)
    check_alignment(alpha, threshold)
    if options.call is not None:
        options.call.counts(f"pairs of {problem.acc_dtype}", f"alpha {alpha} {threshold}", [len(query)])
    t = aligned(problem, options, alpha, threshold)
    return t.values[0] if t.is_shared() else t.values


def check_alignment(alpha: float, threshold: float) -> None:
    """Check the two options of an alignment temperature."""
    checks.fraction("alpha", alpha)
    checks.fraction("threshold", threshold)


def aligned(problem: Problem, options: Options, alpha: float, threshold: float) -> Temperature:
    """Return the temperature of a problem by the alignment of its rows with their targets, over ranks that have met."""
    t = problem.temperature.values
    with torch.no_grad(), without_autocast(t.device.type):
        total, count = _alignment(problem)
        if options.call is not None:
            total, count = gather.total(options.call, torch.stack([total, count])).unbind()
        mean = torch.where(count == 0, threshold, total / count.clamp(min=1)).to(t.dtype)
    factor = 1 + alpha * (mean - threshold)
    said = "stay positive, with alpha (alignment - threshold) above -1"
    values = t * checks.only("the factor of the temperature", factor, (factor > 0) | factor.isnan(), said)
    lowest = values.min().item() if checks.values_are_free(values) and values.numel() else None
    return Temperature(values, lowest if lowest is not None and lowest > 0 else None)  # NaN is not


def _alignment(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the sum of the cosines of rows and their targets and the number of rows that count, float64."""
    x, y = problem.inputs[:2]
    target = problem.target
    if target is not None:
        y = take_rows(y, target.clamp(0, max(len(y) - 1, 0))) if len(y) else torch.zeros_like(x)
    acc = problem.acc_dtype
    cosines = dots(unit(x, problem.normalize, acc), unit(y, problem.normalize, acc)).double()
    counts = torch.ones_like(cosines) if target is None else (target >= 0).double()
    return torch.where(counts == 0, 0, cosines).sum(), counts.sum()
