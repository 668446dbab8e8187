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
        learnable                    the parameter `logit_scale = log(1 / temperature)`, (1,) float32, as CLIP holds it;
                                     a number or a tensor of one element may be assigned, from which it goes on

    Args:
        temperature: one of the above; the starting point where it is learnable.
        learnable: hold `logit_scale`. Give `loss.parameters()` to the optimizer, without weight decay, which would pull
            the temperature towards 1. Keep it in float32: `.bfloat16()` casts it as it does any parameter, and the
            optimizer's small steps are then rounded away.
        max_logit_scale: the largest `1 / temperature` that `clamp_logit_scale_()` leaves (CLIP: 100).

    Raises:
        TypeError: a temperature of another type. ValueError: one that is not positive and finite, or that is a tensor
        computed from others, whose graph is gone after the first backward; one that has a gradient or a callable of
        its own, and is to be learnable too; max_logit_scale without learnable, or below where it starts.

    Reference: Radford et al. 2021, arXiv:2103.00020 (section 2.5).
    """

    needs_temperature = True  # whether None is refused
    logit_scale: nn.Parameter | None
    max_logit_scale: float | None
    _temperature: TemperatureLike
    _start: float | Tensor  # of a learnable one

    def __init__(self, temperature: TemperatureLike | None, learnable: bool, max_logit_scale: float | None):
        super().__init__()
        if max_logit_scale is not None:
            checks.positive_float("max_logit_scale", max_logit_scale)
            if not learnable:
                raise ValueError("max_logit_scale bounds a learnable temperature: pass learnable_temperature=True")
        if not learnable and isinstance(temperature, Tensor) and temperature.grad_fn is not None:
            raise ValueError(
                "temperature must not be computed from other tensors, whose graph is gone after the first backward: "
                "pass learnable_temperature=True, or a callable such as lambda: torch.exp(-logit_scale)"
            )
        self.max_logit_scale = max_logit_scale
        self.logit_scale = nn.Parameter(torch.zeros(1, dtype=torch.float32)) if learnable else None
        self.temperature = temperature  # type: ignore[assignment]
        if max_logit_scale is None or (isinstance(temperature, Tensor) and not checks.values_are_free(temperature)):
            return
        if self._start * max_logit_scale < 1 - 1e-6:
            raise ValueError(
                f"max_logit_scale must be 1 / temperature or more, got {max_logit_scale} and {temperature}"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name != NAME:
            super().__setattr__(name, value)
            return
        learnable = self.logit_scale is not None
        if not callable(value) and (value is not None or self.needs_temperature or learnable):
            checks.number_or_tensor(NAME, value)
        if learnable:
            self._start_from(value)
        elif self._is_parametrized(NAME):
            if value is None or callable(value) or isinstance(value, nn.Parameter):
                raise ValueError(
                    "temperature is computed by torch.nn.utils.parametrize: assign a number or a tensor, or call "
                    "parametrize.remove_parametrizations(loss, 'temperature') first"
                )
            self._put(NAME, value)
        else:
            self._hold(value)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: what was assigned, what the callable says, or `exp(-logit_scale)`. Assignable."""
        if self.logit_scale is not None:
            return torch.exp(-self.logit_scale)
        held = self.__dict__.get("_temperature")  # the usual case, without a search
        held = self.held_temperature if held is None else held
        if not callable(held):
            return held
        try:
            return held()
        except AttributeError as error:  # of a property nn.Module would say that there is no such attribute
            raise RuntimeError(f"the callable that is the temperature raised AttributeError: {error}") from error

    @temperature.setter
    def temperature(self, value: TemperatureLike) -> None:
        """Hold another temperature, by way of `__setattr__`, which sees Parameters before a property would."""

    @property
    def held_temperature(self) -> TemperatureLike:
        """The temperature as it was assigned, a callable not called; a learnable one's value."""
        if self.logit_scale is not None:
            return self.temperature
        for held in (self._parameters, self._modules):
            if NAME in held:
                return held[NAME]  # type: ignore[return-value]
        return self.temperature if self._is_parametrized(NAME) else self._temperature

    def _is_parametrized(self, name: str) -> bool:
        """Return whether `torch.nn.utils.parametrize` computes this parameter from another."""
        parametrized = self._modules.get("parametrizations")
        return isinstance(parametrized, nn.ModuleDict) and name in parametrized

    def _start_from(self, value: Any) -> None:
        """Give `logit_scale` the value of this temperature."""
        if callable(value) or (isinstance(value, Tensor) and value.requires_grad):
            kind = "callable" if callable(value) else "Parameter" if isinstance(value, nn.Parameter) else "tensor"
            raise ValueError(
                f"learnable_temperature=True holds a parameter of its own, and would not train the {kind}: pass the "
                f"number to start from, or the {kind} without learnable_temperature"
            )
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TypeError(f"temperature must be one number where it is learnable, got shape {tuple(value.shape)}")
        self._start = value
        HasTemperature.reset_parameters(self)  # not that of a loss, which may hold more

    def reset_parameters(self) -> None:
        """Start `logit_scale` again from the temperature last assigned, as after `to_empty` from the meta device."""
        if self.logit_scale is not None:
            start = self._start
            self._put("logit_scale", -start.log().reshape(1) if isinstance(start, Tensor) else -math.log(start))

    def _hold(self, value: Any) -> None:
        """Put a temperature where a value of its kind is held."""
        # what was held gives way; in new dictionaries, since a shallow copy of a module shares them
        for kind, where in ((nn.Parameter, "_parameters"), (nn.Module, "_modules")):
            others = {name: x for name, x in self.__dict__[where].items() if name != NAME}
            self.__dict__[where] = others | ({NAME: value} if isinstance(value, kind) else {})
        if isinstance(value, (nn.Parameter, nn.Module)):
            self.__dict__.pop("_temperature", None)
        else:
            self._temperature = value

    @torch.no_grad()
    def _put(self, name: str, value: float | Tensor) -> None:
        """Give a parameter this value, through `right_inverse` where it is parametrized."""
        held = getattr(self, name)
        new = value.to(held) if isinstance(value, Tensor) else torch.full_like(held, value)
        if self._is_parametrized(name):
            super().__setattr__(name, new)
        else:
            held.copy_(new)

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep `1 / temperature` at or under `max_logit_scale`. Call it after the optimizer's step: a clamp inside the
        forward would stop the gradient at the bound."""
        if self.logit_scale is None or self.max_logit_scale is None:
            raise RuntimeError("clamp_logit_scale_ needs learnable_temperature=True and a max_logit_scale")
        self._put("logit_scale", self.logit_scale.clamp(max=math.log(self.max_logit_scale)))

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
        shown: dict[str, Any] = {"learnable_temperature": True}
        if type(self.logit_scale) in (Tensor, nn.Parameter) and not self.logit_scale.is_meta:  # its value is here
            shown = {NAME: float(f"{torch.exp(-self.logit_scale.detach()).item():.6g}")} | shown
        return shown if self.max_logit_scale is None else shown | {"max_logit_scale": self.max_logit_scale}


def held_by(loss: Any) -> Any:
    """Return a loss, checked to hold a temperature: one of this package, or a drop-in with such an attribute."""
    if not isinstance(loss, HasTemperature) and not hasattr(loss, NAME):
        raise TypeError(f"loss must be a loss of fused_infonce that holds a temperature, got {type(loss).__name__}")
    return loss


def assignable(loss: Any) -> Any:
    """Return a loss whose temperature may be assigned at every step: one that does not learn it."""
    if getattr(held_by(loss), "logit_scale", None) is not None:
        raise ValueError("loss learns its temperature: pass one made without learnable_temperature=True")
    held = loss.held_temperature if isinstance(loss, HasTemperature) else loss.temperature  # of a drop-in
    parametrized = isinstance(loss, HasTemperature) and loss._is_parametrized(NAME)
    if isinstance(held, nn.Parameter) or callable(held) or parametrized:
        kind = "a parametrized tensor" if parametrized else f"a {type(held).__name__}"
        raise ValueError(f"loss must hold a number or a tensor, in place of which others are assigned, got {kind}")
    return loss


@torch.no_grad()
def assign(loss: Any, value: float) -> None:
    """Give a loss this temperature: into the tensor of one element that it holds, if it does, else as a number.

    A compiled loss is compiled anew for another number, and not for what a tensor holds.
    """
    held = loss.held_temperature if isinstance(loss, HasTemperature) else loss.temperature  # of a drop-in
    if type(held) is Tensor and held.numel() == 1:
        held.fill_(value)
    else:
        loss.temperature = value
