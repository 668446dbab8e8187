"""Contrastive losses for PyTorch without the logits matrix: Triton kernels on a GPU, the same algorithm elsewhere."""

from .functional import clip_loss, explain, grouped_info_nce, guided_info_nce, info_nce, moco_loss, nt_xent, sup_con
from .losses import FusedInfoNCELoss, NTXentLoss, SupConLoss
from .matryoshka import MatryoshkaLoss
from .retrieval import ClipLoss, GroupedInfoNCELoss, GuidedInfoNCELoss, MoCoLoss

__all__ = [
    "ClipLoss",
    "FusedInfoNCELoss",
    "GroupedInfoNCELoss",
    "GuidedInfoNCELoss",
    "MatryoshkaLoss",
    "MoCoLoss",
    "NTXentLoss",
    "SupConLoss",
    "clip_loss",
    "explain",
    "grouped_info_nce",
    "guided_info_nce",
    "info_nce",
    "moco_loss",
    "nt_xent",
    "sup_con",
]
__version__ = "0.1.0"
