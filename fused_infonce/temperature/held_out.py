"""A loss's temperature that follows held-out pairs through a training."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..distributed import DistributedLike, of_module
from .fitting import BOUNDS, Fit, bounds_of, fit
from .scale import HasTemperature, assign, assignable


class Followed(NamedTuple):
    """One fit of a training: after how many steps, what it found, and the temperature from then on."""

    step: int
    fit: Fit
    temperature: float


OF_LOSS = ("normalize", "symmetric", "distributed")  # what a fit takes from the loss that it is for


class HeldOutTemperature:
    """A loss's temperature set every few steps to that which `fit` finds on held-out pairs.

        log t <- smoothing log t + (1 - smoothing) log t*

    A temperature that learns with the embeddings fits the pairs they are trained on, and ends too cold for others.
    Where a fit has no minimum, as of pairs that are all ranked first, the temperature stays, with a warning. Step
    before the first training step, which would otherwise be at a temperature that nobody has fitted.

    Args:
        loss: any loss of this package that holds a temperature; a number of it is assigned at each fit, or, where it
            holds a tensor of one element, that is filled, so that a compiled loss is not compiled anew.
        every: steps from one fit to the next; the first step fits. bounds: as of `fit`.
        smoothing: in [0, 1), how much of the old temperature is kept.
        options: further arguments of `fit`. `normalize`, `symmetric` and `distributed` are those of the loss where they
            are not given; with the last each process passes held-out pairs of its own, and all get one temperature.
            A mistake of one in a step is an error on all, as in a loss.

    Raises:
        TypeError: a loss without a temperature, types, an option that `fit` lacks. ValueError: values, a loss that
        learns its temperature, and one that is no softmax over keys, such as SigLIP's.

    Source: this library; docs/temperature.md says when to use it.

    Example:
        >>> follow = HeldOutTemperature(loss, every=100)
        >>> for batch in batches:
        ...     follow.step(lambda: (encoder(held_out_query), encoder(held_out_key)))
        ...     train(batch)
    """

    def __init__(
        self,
        loss: HasTemperature,
        every: int = 100,
        bounds: tuple[float, float] = BOUNDS,
        smoothing: float = 0.0,
        **options: Any,
    ):
        if checks.fraction("smoothing", smoothing) == 1:
            raise ValueError("smoothing must be less than 1, which would keep the temperature for ever")
        self.loss, self.every, self.bounds = assignable(loss), checks.whole("every", every, 1), bounds_of(bounds)
        if no_softmax := getattr(loss, "no_softmax", ""):
            raise ValueError(f"loss must be a softmax over keys, whose temperature a fit finds: {no_softmax}, is none")
        unknown = set(options) - (set(inspect.signature(fit).parameters) - {"query", "key", "bounds"})
        if unknown:
            raise TypeError(f"HeldOutTemperature takes its own arguments and those of fit, got {', '.join(unknown)}")
        self.smoothing, self.options = smoothing, options
        self.steps = 0  # that have been made
        self.fitted = False  # whether the temperature is that of a fit
        self.history: list[Followed] = []  # the fits, which `state_dict` leaves out

    @property
    def last(self) -> Fit | None:
        """What the last fit found."""
        return self.history[-1].fit if self.history else None

    @property
    def distributed(self) -> DistributedLike:
        """The processes whose held-out pairs are taken together."""
        return self.options.get("distributed", getattr(self.loss, "distributed", False))

    @of_module
    def step(self, query: Tensor | Callable[[], tuple[Tensor, Tensor]], key: Tensor | None = None) -> Fit | None:
        """Count a step; where a fit is due, make it and set the loss's temperature. Return the fit, or None.

        query, key: the embeddings (N, D) of held-out pairs; or in place of both a function of no arguments that returns
            them, which is called, without gradients, only where a fit is due.
        """
        if callable(query) == (key is not None):
            raise TypeError("step takes query and key, or one function of no arguments that returns both")
        found = None
        if self.steps % self.every == 0:
            found = self._follow(*(_made(query) if callable(query) else (query, key)))
        self.steps += 1  # a step that raised an error was none
        return found

    def _follow(self, query: Any, key: Any) -> Fit:
        """Make a fit and set the loss's temperature."""
        of_loss = {name: getattr(self.loss, name) for name in OF_LOSS if hasattr(self.loss, name)}
        found = fit(query, key, bounds=self.bounds, **(of_loss | self.options))
        if found.converged:
            new = found.temperature
            if self.fitted:  # the first fit replaces a start that nobody fitted
                new = _number(self.loss.temperature) ** self.smoothing * new ** (1 - self.smoothing)
            assign(self.loss, new)
            self.fitted = True
        else:
            warnings.warn(f"the temperature stays as it is: {found.reason}", stacklevel=4)  # the line of the step
        self.history.append(Followed(self.steps, found, _number(self.loss.temperature)))
        return found

    def plot(self, path: str | Path) -> None:
        """Draw the temperature through the training, the fits and the recall at 1; needs the extra "plot".

        Raises:
            ImportError: matplotlib is missing. ValueError: no fit yet, a name of another format.
        """
        from .plots import draw_history

        draw_history(path, self.history)

    def state_dict(self) -> dict[str, Any]:
        """Return what a training needs to go on: the steps made, the temperature, and whether a fit has found it."""
        t = self.loss.temperature
        t = t.detach().clone() if isinstance(t, Tensor) and t.numel() > 1 else t if t is None else float(t)
        return {"steps": self.steps, "temperature": t, "fitted": self.fitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken; the loss gets its temperature."""
        if set(state) != {"steps", "temperature", "fitted"}:
            raise ValueError(f"the state must hold steps, temperature and fitted, got {sorted(state)}")
        checks.flags(fitted=state["fitted"])
        steps, t = checks.whole("steps", state["steps"], 0), state["temperature"]
        if t is None or (isinstance(t, Tensor) and t.numel() > 1):
            self.loss.temperature = t
        else:
            assign(self.loss, checks.one_temperature("temperature", t))
        self.steps, self.fitted = steps, state["fitted"]


@torch.no_grad()
def _made(function: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the query and the key that a function of a step returns, checked to be two."""
    found = function()
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        kind = f"{len(found)} things" if isinstance(found, (tuple, list)) else type(found).__name__
        raise TypeError(f"the function of a step must return query and key, got {kind}")
    query, key = found
    return query, key


def _number(temperature: Any) -> float:
    """Return a temperature that is one number; NaN for one a row, and where a call is to give it."""
    one = temperature.numel() == 1 if isinstance(temperature, Tensor) else temperature is not None
    return float(temperature) if one else math.nan
