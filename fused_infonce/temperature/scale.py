"""The temperature that a loss holds: a number, a tensor, a callable, or learnable as CLIP's logit scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks

TemperatureLike = float | Tensor | Callable[[], float | Tensor]
NAME = "temperature"


class HasTemperature(nn.Module):
    """A module whose `temperature` may be any of these, and be assigned another at any time:

        a number                     0.05
        a tensor                     of one element or one per row; an `nn.Parameter` is saved as "temperature"
        a callable of no arguments   evaluated at every forward: `lambda: torch.exp(-model.logit_scale)`, or a module,
                                     whose parameters are then this one's too
        learnable                    the parameter `logit_scale = log(1 / temperature)`, (1,) float32, as CLIP holds it

    Args:
        temperature: one of the above; the starting point where it is learnable.
        learnable: hold `logit_scale`. Give `loss.parameters()` to the optimizer, without weight decay, which would pull
            the temperature towards 1.
        max_logit_scale: the largest `1 / temperature` that `clamp_logit_scale_()` leaves (CLIP: 100).

    Raises:
        TypeError: a temperature of another type. ValueError: one that is not positive, or that is a tensor computed
        from others, whose graph is gone after the first backward; a Parameter or callable that is to be learnable too;
        max_logit_scale without learnable.

    Reference: Radford et al. 2021, arXiv:2103.00020 (section 2.5).
    """

    logit_scale: nn.Parameter | None
    max_logit_scale: float | None

    def __init__(self, temperature: TemperatureLike, learnable: bool, max_logit_scale: float | None):
        super().__init__()
        if max_logit_scale is not None:
            checks.positive_float("max_logit_scale", max_logit_scale)
            if not learnable:
                raise ValueError("max_logit_scale bounds a learnable temperature: pass learnable_temperature=True")
        if learnable and (isinstance(temperature, nn.Parameter) or callable(temperature)):
            raise ValueError(
                "learnable_temperature=True holds a parameter of its own: pass the number to start from, or the "
                f"{'callable' if callable(temperature) else 'Parameter'} without learnable_temperature"
            )
        if isinstance(temperature, Tensor) and temperature.grad_fn is not None:
            raise ValueError(
                "temperature must not be computed from other tensors, whose graph is gone after the first backward: "
                "pass learnable_temperature=True, or a callable such as lambda: torch.exp(-logit_scale)"
            )
        self.max_logit_scale = max_logit_scale
        self.logit_scale = nn.Parameter(torch.zeros(1)) if learnable else None
        self.temperature = temperature

    def __setattr__(self, name: str, value: Any) -> None:
        if name == NAME and not hasattr(self._modules.get("parametrizations"), NAME):
            self._hold(value)
        else:
            super().__setattr__(name, value)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: what was assigned, what the callable says, or `exp(-logit_scale)`. Assignable."""
        if self.logit_scale is not None:
            return torch.exp(-self.logit_scale)
        held = self.held_temperature
        return held if isinstance(held, (float, int, Tensor)) else held()

    @temperature.setter
    def temperature(self, value: TemperatureLike) -> None:
        """Hold another temperature, by way of `__setattr__`, which sees Parameters before a property would."""

    @property
    def held_temperature(self) -> TemperatureLike:
        """The temperature as it was assigned, a callable not called."""
        for held in (self._parameters, self._modules):
            if NAME in held:
                return held[NAME]  # type: ignore[return-value]
        return self._temperature

    def _hold(self, value: Any) -> None:
        if self.logit_scale is not None:
            scalar = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            with torch.no_grad():
                self.logit_scale.fill_(-math.log(checks.positive_float(NAME, scalar)))
            return
        if isinstance(value, Tensor):
            if value.dtype not in checks.FLOATS:
                raise TypeError(f"temperature must be a number or a floating tensor, got {value.dtype}")
            good = (value > 0) & value.isfinite()
            if checks.values_are_free(value) and not good.all():
                raise ValueError(f"temperature must be positive and finite, got {value[~good].flatten()[0].item()}")
        elif not callable(value):
            checks.positive_float(NAME, value)
        self._parameters.pop(NAME, None)  # a Parameter or module of the user's gives way to what is assigned
        self._modules.pop(NAME, None)
        self._temperature: TemperatureLike = value if not isinstance(value, (nn.Parameter, nn.Module)) else math.nan
        if isinstance(value, nn.Parameter):
            self._parameters[NAME] = value
        elif isinstance(value, nn.Module):
            self._modules[NAME] = value

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep `1 / temperature` at or under `max_logit_scale`. Call it after the optimizer's step: a clamp inside the
        forward would stop the gradient at the bound."""
        if self.logit_scale is None or self.max_logit_scale is None:
            raise RuntimeError("clamp_logit_scale_ needs learnable_temperature=True and a max_logit_scale")
        self.logit_scale.clamp_(max=math.log(self.max_logit_scale))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, also from version 0.1, where `logit_scale` was 0-d and a Parameter had the name "_temperature"."""
        scale = state_dict.get(prefix + "logit_scale")
        if isinstance(scale, Tensor) and scale.dim() == 0:
            state_dict[prefix + "logit_scale"] = scale.reshape(1)
        if prefix + "_temperature" in state_dict:
            state_dict[prefix + NAME] = state_dict.pop(prefix + "_temperature")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def shown_temperature(self) -> dict[str, Any]:
        """Return what a representation shows of the temperature."""
        if self.logit_scale is None:
            return {NAME: self.held_temperature}
        learnable = {NAME: float(f"{torch.exp(-self.logit_scale.detach()).item():.6g}"), "learnable_temperature": True}
        return learnable if self.max_logit_scale is None else learnable | {"max_logit_scale": self.max_logit_scale}
