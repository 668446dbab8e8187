"""What the drop-ins share."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor


@cache
def say_once(what: str, why: str) -> None:
    """That a call runs the original's own code, once for each reason."""
    warnings.warn(f"{what} runs the original's own code here, with its memory: {why}", stacklevel=4)


def said(why: Exception) -> str:
    """What an error of ours expected, without what came."""
    return str(why).partition(", got")[0]


def loss_dtype(rows: Tensor, temperature: object = None) -> torch.dtype:
    """The dtype of `F.cross_entropy(rows @ y.T / temperature, target)`: that of the rows, under autocast float32 unless
    it is float64, and that of a temperature tensor with dimensions where it is wider."""
    autocast = torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64
    dtype = torch.float32 if autocast else rows.dtype
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        return torch.promote_types(dtype, temperature.dtype)
    return dtype


def one_number(name: str, value: object) -> None:
    """Refuses a tensor of several elements, which the originals broadcast."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.dim() > 2):
        raise ValueError(f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")
