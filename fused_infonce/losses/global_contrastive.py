"""The global contrastive losses SogCLR and iSogCLR, whose estimates over all samples make small batches do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import BackendName, Options, Reduction
from ..backends.contract import Problem
from ..backends.precision import without_autocast
from ..compose.across import across, blocked
from ..compose.arguments import call_options, of_keys, of_views, temperature_of
from ..compose.moving_average import Estimate, estimate, put_last
from ..compose.reduction import reduced_rows
from ..compose.rows import Later, log_add
from ..distributed import DistributedLike, gather, together
from ..temperature.individual import IndividualTemperature
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss, Negatives


class GlobalContrastiveLoss(ContrastiveLoss):
    """SogCLR, and with a table of temperatures iSogCLR: contrastive losses over all samples, from small batches.

        F_i = t_i ( log( mean_j exp(s_ij - s_ip) ) + rho ),    s_ij = cos(z_i, z_j) / t_i

    over the negatives j of all the data. Of each sample the module remembers a moving average u of the mean over its
    batches, in logarithms, so that no temperature overflows; a sample that is seen for the first time takes its own:

        g_i = mean_j exp(s_ij - b_i)  over the batch,    u_i <- (1 - gamma) u_i + gamma g_i
        value  t_i (log u_i + b_i - s_ip + rho),         gradient  t_i ( g_i / u_i d log g_i + d(b_i - s_ip) )

    With negatives="views" z are the rows of two views, p is the other view, b_i = 0 and u_i the mean of both views'.
    With negatives="keys" two towers are scored against one another in both directions, each with its own u, and
    b_i = s_ip. With gamma = 1 the second is `robust_info_nce(..., symmetric=True)`.

    An `IndividualTemperature` with `lr` as the temperature is iSogCLR: in training mode its samples are stepped by
    dF_i / dt_i = log u_i + rho - g_i / u_i (mean logit - b_i), of two directions that share it by their mean. Without
    `lr` it is learned by an optimizer.

    The state, `log_u`, is (samples,) or of two towers (2, samples), part of the state dict; -inf is a sample that was
    not seen. It is float32, and should stay so: 16 bits of a logarithm are few digits of u. It moves in training mode
    alone. An estimate that is not finite, as after an overflow under `GradScaler`, leaves its sample as it is; of a
    sample that is in a batch twice the last row counts. With `distributed` every rank has the whole state, and the
    samples of all ranks enter.

    LibAUC's `GCLoss_v1` and `GCLoss_v2` have these gradients times 2 and times N - 1; their values are others.

    Args:
        samples: the number of samples in the data, whose indices are 0 to samples - 1.
        temperature: t, a positive number, a tensor of one element or of one value per row, a callable of no arguments,
            evaluated at every call, or an `IndividualTemperature`. It may be assigned anew.
        key_temperature: an `IndividualTemperature` of the keys' direction; None: the queries' is that of both.
        gamma: in (0, 1], the weight of a batch in the moving averages. It may be assigned anew, as a schedule does.
        rho: not negative, in nats: by how much weights of the negatives may differ from equal ones; it matters where
            temperatures are learned. LibAUC has 0.3 for two views and 6 for images and texts.
        negatives: "views" (the inputs are two views of a batch) or "keys" (those of two towers).
        reduction: "mean", "sum" or "none" (one value per row of both views, or per pair).
        normalize: divide every row by its norm first, so that scores are cosines.
        learnable_temperature: hold the (1,) parameter `logit_scale = log(1 / temperature)`, as CLIP does. Give
            `loss.parameters()` to the optimizer, without weight decay.
        max_logit_scale: the largest `1 / temperature` that `clamp_logit_scale_()` leaves (CLIP: 100); None: no bound.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch memory; None: 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.
        record: keep what the rows of the last call were made of in `recorded`: the positives' logits, and the
            logsumexps and mean logits of the negatives.

    References: Yuan et al. 2022, arXiv:2202.12387; Qiu et al. 2023, arXiv:2305.11965;
    https://github.com/Optimization-AI/LibAUC (GCLoss).

    Example:
        >>> loss = GlobalContrastiveLoss(samples=1000, temperature=0.1)
        >>> index = torch.arange(32)
        >>> loss(torch.randn(32, 64, requires_grad=True), torch.randn(32, 64), index).backward()
        >>> from fused_infonce.temperature import IndividualTemperature
        >>> table = IndividualTemperature(1000, 0.1, lr=0.01)
        >>> isogclr = GlobalContrastiveLoss(samples=1000, temperature=table)
    """

    log_u: Tensor

    def __init__(
        self,
        samples: int,
        *,
        temperature: TemperatureLike = 0.1,
        key_temperature: IndividualTemperature | None = None,
        gamma: float = 0.9,
        rho: float = 0.3,
        negatives: Negatives = "views",
        reduction: Reduction = "mean",
        normalize: bool = True,
        learnable_temperature: bool = False,
        max_logit_scale: float | None = None,
        backend: BackendName = "auto",
        workspace_limit: int | None = None,
        distributed: DistributedLike = False,
        record: bool = False,
    ):
        super().__init__(
            temperature, learnable_temperature, max_logit_scale, reduction, normalize, backend, workspace_limit,
            distributed, record,
        )  # fmt: skip
        checks.one_of("negatives", negatives, get_args(Negatives))
        if key_temperature is not None:
            if not isinstance(key_temperature, IndividualTemperature):
                kind = type(key_temperature).__name__
                raise TypeError(f"key_temperature must be an IndividualTemperature, got {kind}")
            if negatives == "views":
                raise ValueError("key_temperature is that of the second of two towers: it needs negatives='keys'")
        self.key_temperature = key_temperature
        self.samples = checks.whole("samples", samples, 1)
        self.gamma, self.rho = _gamma(gamma), checks.not_negative("rho", rho)
        self.negatives: Negatives = negatives
        shape = (samples,) if negatives == "views" else (2, samples)
        self.register_buffer("log_u", torch.empty(shape, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget all samples; a learnable temperature starts again from where it began."""
        super().reset_parameters()
        self.log_u.fill_(-torch.inf)

    def forward(self, query: Tensor, positive_key: Tensor, index: Tensor) -> Tensor:
        """Return the loss of two views of a batch, or of two towers' rows, (N, D) each, of the samples index (N,)."""
        return _loss(self, query, positive_key, index, distributed=self.distributed)


@together
def _loss(
    module: GlobalContrastiveLoss, query: Tensor, positive_key: Tensor, index: Tensor, *, distributed: DistributedLike
) -> Tensor:
    """Return the loss of a batch, and in training mode let the module's state follow it."""
    options = call_options(module.backend, module.workspace_limit, module.reduction, distributed)
    gamma, rho = _gamma(module.gamma), checks.not_negative("rho", module.rho)
    index = checks.places("index", index, module.samples, module.log_u.device, "the state of the loss")
    if options.call is not None:
        mode = "training" if module.training else "evaluation"
        options.call.noted += f" {module.negatives} {module.samples}, gamma {gamma}, rho {rho}, {mode};"
    problem, context = _problem(module, query, positive_key, index, options)
    with context:
        rows, columns = contrast.statistics(problem, options, full=_stepped(module) != [None, None])
    with without_autocast(query.device.type):
        if columns is None:
            found = [estimate(problem, rows, module.log_u[index].repeat(2), gamma, rho, relative=False)]
        else:
            parts = [(problem, rows), (problem.swapped(), columns)]
            found = [
                estimate(part, side, old[index], gamma, rho, relative=True)
                for (part, side), old in zip(parts, module.log_u, strict=True)
            ]
        if module.training and not contrast.is_explaining():
            _follow(module, index, found, options)
        return reduced_rows(torch.stack([each.losses for each in found]).mean(0), problem, options)


def _problem(
    module: GlobalContrastiveLoss, query: Tensor, positive_key: Tensor, index: Tensor, options: Options
) -> tuple[Problem, AbstractContextManager[Any]]:
    """Return the problem of a batch over all ranks, and the context of its products."""
    checks.embeddings("query", query, 2, "(N, D)")
    checks.on("query", query, index.device, "the state of the loss")
    if len(index) != len(query):
        raise ValueError(f"index must have {len(query)} rows as query has, got {len(index)}")
    views, held, keys = module.negatives == "views", module.held_temperature, module.key_temperature
    t = module.temperature if not isinstance(held, IndividualTemperature) else held(index.repeat(2) if views else index)
    t = gather.shared(options.call, t)
    if views:
        return across(of_views(query, positive_key, t, module.normalize), options)
    problem = of_keys(query, positive_key, None, t, "unpaired", symmetric=True, normalize=module.normalize)
    if keys is None:
        return across(problem, options)
    of_columns = temperature_of(gather.shared(options.call, keys(index)), positive_key, "key_temperature")
    problem, context = blocked(problem, options)  # two directions with scores of their own
    opposite = Later(lambda: replace(problem.swapped(), temperature=of_columns))
    return replace(problem, opposite=opposite), context


@torch.no_grad()
def _follow(module: GlobalContrastiveLoss, index: Tensor, found: Sequence[Estimate], options: Options) -> None:
    """Write the moving averages of a batch into the state, and step the tables of temperatures."""
    views = module.negatives == "views"
    # of the first view or tower and of the second, (N,) each
    logs = [x for each in found for x in each.log_u.chunk(1 + views)]
    slopes = [x for each in found for x in each.slope.chunk(1 + views)]
    if options.call is not None:
        counts = [count // (1 + views) for count in options.call.keys]
        index, *every = gather.gather(options.call, [index, *logs, *slopes], [counts] * 5)
        logs, slopes = every[:2], every[2:]
    state = [log_add(*logs) - math.log(2)] if views else logs
    for table, new in zip(module.log_u.view(-1, module.samples), state, strict=True):
        put_last(table, index, new)
    own, others = _stepped(module)
    if own is not None:
        own.step(index, slopes[0] if module.key_temperature is not None else torch.stack(slopes).mean(0))
    if others is not None:
        others.step(index, slopes[1])


def _stepped(module: GlobalContrastiveLoss) -> list[IndividualTemperature | None]:
    """Return the tables of temperatures, of queries and of keys, that a batch steps; None where there is none."""
    held = module.held_temperature, module.key_temperature
    return [x if isinstance(x, IndividualTemperature) and x.lr is not None else None for x in held]


def _gamma(value: Any) -> float:
    number = checks.fraction("gamma", value)
    if number == 0:
        raise ValueError("gamma must be more than 0, which would never see a batch")
    return number
