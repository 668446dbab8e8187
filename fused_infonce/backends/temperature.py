"""The temperature of a call: one for all rows, or one a row."""

from __future__ import annotations

from ctypes import c_float

import torch
from torch import Tensor


class Temperature:
    """The temperature of a call, made once where the user's argument is checked.

    given: () or (1,) for all rows, or (N,) one a row, in the accumulator dtype, contiguous; None of a number
    lowest: the smallest of them, where reading it costs no synchronisation; else None
    raw: whether `given` is as the user gave it, () perhaps, or not positive where `lowest` is not known. It gives way
        to `values` where these are asked for
    """

    def __init__(
        self, given: Tensor | None, lowest: float | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | None = None, raw: bool = False,
    ):  # fmt: skip
        self.given, self.lowest, self.device, self.raw = given, lowest, device, raw
        self.dtype = dtype if given is None else given.dtype

    @property
    def values(self) -> Tensor:
        """Return what is given as (1,) or (N,), NaN where it is not positive; or a tensor of the number, made once."""
        if self.given is None:
            self.given = torch.full((1,), self._number(), dtype=self.dtype, device=self.device)
        if not self.raw:
            return self.given
        made = self.given if self.given.dim() == 1 else self.given.reshape(1)
        if self.lowest is None:
            made = made.add(made.detach().log(), alpha=0)  # 0 log(t) is NaN where t is not positive and finite
        if torch.is_grad_enabled() or not self.given.requires_grad:  # else it lacks the graph that others need
            self.given, self.raw = made, False
        return made

    def as_given(self) -> Tensor:
        """Return what is given, for a reader of any shape that makes NaN of a bad one itself; or as `values`."""
        return self.values if self.given is None else self.given

    def _number(self) -> float:
        assert self.lowest is not None
        return self.lowest

    def is_shared(self) -> bool:
        """Return whether all rows have one temperature."""
        return self.given is None or self.given.numel() == 1

    @property
    def inverse(self) -> float:
        """Return 1 / t of a shared temperature, read from the tensor, or of the number that a tensor would hold."""
        if self.given is not None:
            return 1 / self.given.item()
        number = self._number()
        return 1 / (number if self.dtype == torch.float64 else c_float(number).value)

    def cooler(self, strength: float) -> Temperature:
        """Return the temperature t / (1 + strength t): its inverse is larger by `strength`."""
        lowest = None if self.lowest is None else self.lowest / (1 + strength * self.lowest)
        return Temperature(self.values / (1 + strength * self.values.detach()), lowest)
