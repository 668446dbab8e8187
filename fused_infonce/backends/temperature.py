"""The temperature of a call: one for all rows, or one a row."""

from __future__ import annotations

from ctypes import c_float

import torch
from torch import Tensor


class Temperature:
    """The temperature of a call, made once where the user's argument is checked.

    given: (1,) for all rows or (N,) one a row, in the accumulator dtype, contiguous; None of a number, which is a
        tensor only where `values` asks for one
    lowest: the smallest of them, where reading it costs no synchronisation; else None
    """

    def __init__(
        self, given: Tensor | None, lowest: float | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):  # fmt: skip
        self.given, self.lowest, self.device = given, lowest, device
        self.dtype = dtype if given is None else given.dtype

    @property
    def values(self) -> Tensor:
        """Return what is given, or a tensor of the number, which is made once."""
        if self.given is None:
            self.given = torch.full((1,), self._number(), dtype=self.dtype, device=self.device)
        return self.given

    def _number(self) -> float:
        assert self.lowest is not None
        return self.lowest

    def is_shared(self) -> bool:
        """Return whether all rows have one temperature."""
        return self.given is None or self.given.shape[0] == 1

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
