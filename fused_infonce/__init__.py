"""Contrastive losses for PyTorch without the logits matrix: Triton kernels on a GPU, the same algorithm elsewhere."""

from .functional import info_nce
from .losses import FusedInfoNCELoss

__all__ = ["FusedInfoNCELoss", "info_nce"]
__version__ = "0.1.0"
