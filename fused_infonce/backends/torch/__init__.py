"""The backend in PyTorch: chunks of rows, library products, any device."""

from torch import Tensor

from .chunked import gradients, onepass, statistics

__all__ = ["differentiable", "gradients", "onepass", "statistics", "unavailable"]

differentiable = False


def unavailable(tensor: Tensor) -> str:
    return ""
