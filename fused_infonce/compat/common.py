"""Helpers that several drop-ins share: the warning of a fallback, and the dtype of an original's loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from ..backends import user_level
from ..distributed import DistributedLike, options_of, together

Result = TypeVar("Result")
# Between a user's line and a drop-in there may be lines of the library that it stands in for.
LIBRARIES = ("FlagEmbedding", "info_nce", "lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers")


@cache
def say_once(what: str, why: str) -> None:
    """Warn at the user's line that a call runs the original's own code, once for each reason."""
    message = f"{what} runs the original's own code here, with its memory: {why}"
    warnings.warn(message, stacklevel=user_level(*LIBRARIES))


def said(why: Exception) -> str:
    """Return the part of an error's message that says what was expected, without what came."""
    return str(why).partition(", got")[0]


def fused_or(
    original: Callable[[], Result], what: str, fused: Callable[..., Result],
    then: Callable[[Result], Result] | None = None, distributed: DistributedLike = False,
) -> Result:  # fmt: skip
    """Return what `fused` returns; where it refuses the call, what the original does, or raise the original's error.

    The original's error shows that of `fused` as its context. then: applied to what `fused` returned; an error in it
    is not taken for a refusal. distributed: the processes whose rows make one batch, passed on to `fused`. What it
    refuses is then an error on all of them, because the original's own loss is not that of all their rows.
    """
    if options_of(distributed) is not None:

        def over_processes(*, distributed: DistributedLike) -> Result:
            return fused(distributed=distributed)

        result = together(over_processes)(distributed=distributed)
        return result if then is None else then(result)
    try:
        result = fused()
    except (TypeError, ValueError) as why:
        result = original()
        say_once(what, said(why))
        return result
    return result if then is None else then(result)


def loss_dtype(rows: Tensor, temperature: object = None) -> torch.dtype:
    """Return the dtype of `F.cross_entropy(rows @ y.T / temperature, target)`.

    It is the dtype of the rows (under autocast float32 unless they are float64), or that of a temperature tensor with
    dimensions where the temperature's is wider.
    """
    autocast = torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64
    dtype = torch.float32 if autocast else rows.dtype
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        return torch.promote_types(dtype, temperature.dtype)
    return dtype


def one_number(name: str, value: object) -> None:
    """Refuse a tensor of several elements, which the originals broadcast."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.dim() > 2):
        raise ValueError(f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")
