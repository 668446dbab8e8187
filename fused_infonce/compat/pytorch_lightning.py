"""A callback of `pytorch_lightning` that sets the temperature of a loss and logs it."""

from __future__ import annotations

from pytorch_lightning import Callback

from .lightning_hooks import TemperatureHooks

__all__ = ["TemperatureCallback"]


class TemperatureCallback(TemperatureHooks, Callback):
    __doc__ = TemperatureHooks.__doc__
