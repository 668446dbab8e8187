"""The backend in PyTorch: chunks of rows, library products, any device."""

from .chunked import gradients, onepass, statistics

__all__ = ["gradients", "onepass", "statistics"]
