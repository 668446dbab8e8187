"""The backend in PyTorch: chunks of rows, library products, any device."""

from torch import Tensor

from ..contract import Problem
from ..plan import Plan
from .chunked import gradients, onepass, statistics
from .profile import profile
from .sigmoid import sigmoids

__all__ = [
    "differentiable",
    "gradients",
    "kept_sizes",
    "onepass",
    "profile",
    "sigmoids",
    "statistics",
    "takes_unit_rows",
    "unavailable",
]

takes_unit_rows = True
differentiable = False


def unavailable(tensor: Tensor) -> str:
    return ""


def kept_sizes(problem: Problem, plan: Plan) -> list[int]:
    return []  # `onepass` returns the gradients themselves
