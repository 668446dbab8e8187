"""Contrastive losses for PyTorch without the logits matrix: Triton kernels on a GPU, the same algorithm elsewhere."""

from .functional import explain, info_nce
from .losses import FusedInfoNCELoss

__all__ = ["FusedInfoNCELoss", "explain", "info_nce"]
__version__ = "0.1.0"
