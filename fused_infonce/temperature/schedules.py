"""A loss's temperature that follows a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import checks
from .scale import HasTemperature, assign, assignable


class TemperatureSchedule:
    """A loss's temperature set to a function of the step, as a scheduler sets a learning rate.

        t_k = schedule(k),    k = 0 when it is made, and one more at every `step`

    Args:
        loss: any loss of this package that holds a temperature; a number of it is assigned at each step, or, where it
            holds a tensor of one element, that is filled, so that a compiled loss is not compiled anew.
        schedule: a function of the number of steps made, an int, that returns a positive number.

    Raises:
        TypeError: a loss without a temperature, a schedule that cannot be called, or that returns no number.
        ValueError: a loss that learns its temperature; a temperature that is not positive and finite.

    Example:
        >>> schedule = TemperatureSchedule(loss, lambda step: max(0.02, 0.1 * 0.999**step))
        >>> for batch in batches:
        ...     train(batch)
        ...     schedule.step()
    """

    def __init__(self, loss: HasTemperature, schedule: Callable[[int], float]):
        if not callable(schedule):
            raise TypeError(f"schedule must be a function of the step, got {type(schedule).__name__}")
        self.loss, self.schedule = assignable(loss), schedule
        self._to(0)

    def step(self) -> float:
        """Count a step, and return the temperature that the loss now has."""
        return self._to(self.steps + 1)

    def _to(self, steps: int) -> float:
        """Set the temperature of this number of steps."""
        value = checks.positive_float("the temperature of a schedule", self.schedule(steps))
        assign(self.loss, value)
        self.steps = steps
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return what a training needs to go on: the number of steps made. The schedule itself is not in it."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken; the loss gets the temperature of that step."""
        if set(state) != {"steps"}:
            raise ValueError(f"the state must hold steps, got {sorted(state)}")
        self._to(checks.whole("steps", state["steps"], 0))


class CosineTemperature(TemperatureSchedule):
    """A loss's temperature that swings between two values along a cosine, from the higher one.

        t_k = low + (high - low) (1 + cos(2 pi k / period)) / 2

    A low temperature tells single samples apart, a high one groups of them; data with rare and frequent classes needs
    both.

    Args:
        loss: any loss of this package that holds a temperature, as of `TemperatureSchedule`.
        low: the lowest temperature, a positive number; the paper has 0.1.
        high: the highest, at the start, not below `low`; the paper has 1.
        period: steps from one highest temperature to the next, a positive number. The paper steps once an epoch, with a
            period of 400; the authors' code calls half of a period `t_max`.

    Raises:
        TypeError: a loss without a temperature, types. ValueError: values, and a loss that learns its temperature.

    References: Kukleva et al. 2023, arXiv:2303.13664; https://github.com/Annusha/temperature_schedules.

    Example:
        >>> schedule = CosineTemperature(loss, low=0.1, high=1.0, period=400)
        >>> for epoch in range(2000):
        ...     train_an_epoch()
        ...     schedule.step()
    """

    def __init__(self, loss: HasTemperature, low: float, high: float, period: float):
        low, high = checks.positive_float("low", low), checks.positive_float("high", high)
        if high < low:
            raise ValueError(f"high must not be below low, {low}, got {high}")
        period = checks.positive_float("period", period)
        self.low, self.high, self.period = low, high, period
        super().__init__(loss, self.at)

    def at(self, step: int) -> float:
        """Return the temperature of this number of steps."""
        return self.low + (self.high - self.low) * (1 + math.cos(2 * math.pi * step / self.period)) / 2
