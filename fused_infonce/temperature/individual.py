"""A table of temperatures, one a sample, that an optimizer learns or that iSogCLR's steps move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..backends.indexing import take_rows
from ..compose.moving_average import put_last
from .fitting import bounds_of


class IndividualTemperature(nn.Module):
    """One temperature a sample, looked up by the sample's index, as the temperature of any loss.

    It is learned in one of two ways. Without `lr` the table `values` is a parameter: look-ups are differentiable, give
    `parameters()` to an optimizer, and call `clamp_()` after its step. With `lr` it is a buffer that `step` moves as
    iSogCLR does, by a gradient g of each sample's own loss,

        m_i <- (1 - beta) m_i + beta g_i,    t_i <- clamp(t_i - lr m_i, low, high)

    which `GlobalContrastiveLoss` does by itself in training. Losses differ in what their temperatures find: that of
    `robust_info_nce` has a minimum in each, while InfoNCE lowers those of samples that are told apart to the bound.

    The table is called with the samples of a batch, or as the temperature of a loss, which calls it with nothing, after
    `select`. A batch of two views has its samples twice, `index.repeat(2)`.

    Args:
        samples: the number of samples, whose indices are 0 to samples - 1.
        temperature: the start of all, a positive number within the bounds.
        bounds: the lowest temperature and the highest. LibAUC has (0.05, 0.7) for two views and (0.005, 0.05) for
            images and texts.
        lr: the size of a step; None: there are none, and `values` is a parameter.
        beta: in (0, 1], the weight of the new gradient in its moving average.
        clip: a gradient beyond [-clip, clip] is moved there, as in the authors' code (3); None: none is, as in LibAUC.

    Raises:
        ValueError: values, indices out of range. TypeError: types.

    References: Qiu et al. 2023, arXiv:2305.11965; https://github.com/zhqiu/contrastive-learning-iSogCLR;
    https://github.com/Optimization-AI/LibAUC.

    Example:
        >>> table = IndividualTemperature(50_000, 0.1)
        >>> loss = RobustInfoNCELoss(temperature=table)
        >>> optimizer = torch.optim.Adam(table.parameters(), lr=1e-3)
        >>> for index, query, key in batches:
        ...     table.select(index)
        ...     loss(query, key).backward()
        ...     optimizer.step()
        ...     table.clamp_()
    """

    values: Tensor
    gradient: Tensor

    def __init__(
        self,
        samples: int,
        temperature: float = 0.1,
        *,
        bounds: tuple[float, float] = (0.05, 0.7),
        lr: float | None = None,
        beta: float = 0.9,
        clip: float | None = None,
    ):
        super().__init__()
        self.bounds = low, high = bounds_of(bounds)
        self.start = checks.positive_float("temperature", temperature)
        if not low <= self.start <= high:
            raise ValueError(f"temperature must be within the bounds, {low} to {high}, got {temperature}")
        self.lr = None if lr is None else checks.positive_float("lr", lr)
        self.beta = checks.fraction("beta", beta)
        if self.beta == 0:
            raise ValueError("beta must be more than 0, which would never see a gradient")
        self.clip = None if clip is None else checks.positive_float("clip", clip)
        self.selected: Tensor | None = None
        values = torch.empty(checks.whole("samples", samples, 1), dtype=torch.float32)
        if self.lr is None:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)
            self.register_buffer("gradient", torch.empty_like(values))  # the moving averages
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again from the temperature that the table was made with."""
        self.values.fill_(self.start)
        if self.lr is not None:
            self.gradient.zero_()

    def select(self, index: Tensor) -> None:
        """Say which samples the rows of the next calls are, (N,) integers, until others are selected."""
        self.selected = self._places(index)

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Return the temperatures (N,) of samples, (N,) integers; None: of those that were selected."""
        place = self.selected if index is None else self._places(index)
        if place is None:
            raise ValueError("index is missing: pass it, or call select(index) before the loss")
        return take_rows(self.values, place)

    @torch.no_grad()
    def step(self, index: Tensor, gradient: Tensor) -> None:
        """Move the temperatures of samples, (N,) integers, by the gradients (N,) of the loss of each.

        The gradient is that of a sample's own loss: of a mean over N rows, N times that of the mean. Of a sample that
        is in the batch twice the last counts, and one whose gradient is not finite stays as it is.
        """
        if self.lr is None:
            raise ValueError("a table is stepped with lr=...: without it give its parameters() to an optimizer")
        place = self._places(index)
        checks.per_row("gradient", gradient, place)
        new = gradient.to(self.values.dtype)
        new = new if self.clip is None else new.clamp(-self.clip, self.clip)
        average = torch.lerp(self.gradient[place], new, self.beta)
        average = torch.where(average.isfinite(), average, torch.nan)
        put_last(self.gradient, place, average)
        put_last(self.values, place, (self.values[place] - self.lr * average).clamp(*self.bounds))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Move all temperatures into the bounds. Call it after the optimizer's step: a clamp inside the look-up would
        stop the gradient at a bound."""
        self.values.clamp_(*self.bounds)

    def _places(self, index: Tensor) -> Tensor:
        return checks.places("index", index, len(self.values), self.values.device)

    def extra_repr(self) -> str:
        shown = f"{len(self.values)}, {self.start}, bounds={self.bounds}"
        return shown if self.lr is None else f"{shown}, lr={self.lr}, beta={self.beta}, clip={self.clip}"
