"""The backend in Triton kernels."""

from .backend import gradients, onepass, statistics, unavailable

__all__ = ["gradients", "onepass", "statistics", "unavailable"]
