"""Contrastive losses for PyTorch without the logits matrix: Triton kernels on a GPU, the same algorithm elsewhere."""

from .functional import explain, info_nce, nt_xent
from .losses import FusedInfoNCELoss, NTXentLoss

__all__ = ["FusedInfoNCELoss", "NTXentLoss", "explain", "info_nce", "nt_xent"]
__version__ = "0.1.0"
