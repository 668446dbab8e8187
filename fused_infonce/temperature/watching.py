"""What a trainer's callback does with a temperature: set it at every step, and say what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .held_out import HeldOutTemperature
from .scale import held_by
from .schedules import TemperatureSchedule

Pairs = Callable[[Any], tuple[Tensor, Tensor]]


class Watch:
    """The temperature of a loss through a training, set before every step of the optimizer where something sets it.

    Args:
        source: a loss whose temperature is only told; or a `HeldOutTemperature` or a `TemperatureSchedule`, such as
            `CosineTemperature`, which sets that of its loss.
        pairs: for a `HeldOutTemperature`, a function of the model that returns embeddings of held-out pairs, (N, D)
            each. It is called where a fit is due, without gradients, and with the model in evaluation mode.
        name: of the temperature in the logs, and the folder of the other figures.

    Raises:
        TypeError: a source that is none of these, types. ValueError: `pairs` without a `HeldOutTemperature`, or none
        with one.
    """

    def __init__(self, source: Any, pairs: Pairs | None = None, name: str = "temperature"):
        self.stepper = source if isinstance(source, (HeldOutTemperature, TemperatureSchedule)) else None
        self.loss = held_by(source if self.stepper is None else self.stepper.loss)
        checks.text("name", name)
        if pairs is not None and not callable(pairs):
            raise TypeError(f"pairs must be a function of the model, got {type(pairs).__name__}")
        if (pairs is not None) != isinstance(source, HeldOutTemperature):
            raise ValueError("pairs are for a HeldOutTemperature, which needs them")
        self.pairs, self.name = pairs, name
        self.seen = -1  # the last step of the optimizer that the temperature was set for

    def at(self, step: int, model: nn.Module) -> None:
        """Set the temperature for a step of the optimizer, from 0; once for all batches that are accumulated in it."""
        if step == self.seen:
            return
        if isinstance(self.stepper, HeldOutTemperature):
            with evaluating(model):
                self.stepper.step(lambda: self._encoded(model))
        elif self.stepper is not None and self.seen >= 0:  # a schedule has set the first one itself
            self.stepper.step()
        self.seen = step

    def _encoded(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        assert self.pairs is not None
        return self.pairs(model)

    def figures(self) -> dict[str, Tensor]:
        """Return what there is to log, 0-d each: reading none of it, nothing waits for a GPU.

        The temperature, the mean of several; `scale`, its inverse. Where held-out pairs were fitted, `fitted`, `stderr`
        and `recall_at_1` of the last fit. Where the loss was made with record=True and has been called,
        `effective_negatives`, the median over the rows that count and have negatives.
        """
        t = torch.as_tensor(self.loss.temperature).detach().float()
        found = {"": t.mean(), "/scale": (1 / t).mean()}
        fit = self.stepper.last if isinstance(self.stepper, HeldOutTemperature) else None
        if fit is not None:
            told = {"fitted": fit.temperature, "stderr": fit.stderr, "recall_at_1": fit.recall.pessimistic}
            found |= {f"/{name}": torch.tensor(value) for name, value in told.items()}
        recorded = getattr(self.loss, "recorded", None)
        if recorded is not None:
            found["/effective_negatives"] = recorded.effective_negatives().float().nanmedian()
        return {self.name + name: value for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a training needs to go on."""
        return {"seen": self.seen, "stepper": None if self.stepper is None else self.stepper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.seen = state["seen"]
        if self.stepper is not None:
            self.stepper.load_state_dict(state["stepper"])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every part of it back into its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
