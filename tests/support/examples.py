"""The loss and the call of a docstring's example, so that tests of every loss need no table of a new one."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fused_infonce


def from_example(loss: type[nn.Module]) -> tuple[Callable[..., nn.Module], Callable[[], tuple[Any, ...]]]:
    """Return a function that makes the first loss of the example, given options, and one that makes its inputs."""
    made: list[tuple[Any, ...]] = []
    called: list[tuple[Any, ...]] = []

    class Recorder:
        def __init__(self, *args: Any, **kwargs: Any):
            made.append((args, kwargs))

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            called.append(inspect.signature(loss.forward).bind(None, *args, **kwargs).args[1:])
            return torch.zeros((), requires_grad=True)

    source = "".join(example.source for example in doctest.DocTestParser().get_examples(loss.__doc__ or ""))
    exec(source, {"torch": torch, "F": F} | vars(fused_infonce) | {loss.__name__: Recorder})
    (args, kwargs), inputs = made[0], called[0]

    def make(**options: Any) -> nn.Module:
        return loss(*args, **kwargs | options)

    def fresh() -> tuple[Any, ...]:
        return tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), inputs)

    return make, fresh
