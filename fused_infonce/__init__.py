"""Contrastive losses for PyTorch without the logits matrix: Triton kernels on a GPU, the same algorithm elsewhere."""

from .functional import (
    clip_loss,
    debiased_info_nce,
    debiased_nt_xent,
    decoupled_info_nce,
    decoupled_nt_xent,
    distilled_info_nce,
    explain,
    grouped_info_nce,
    guided_info_nce,
    info_nce,
    moco_loss,
    multiple_negatives,
    nt_xent,
    sup_con,
    von_mises_fisher_weight,
)
from .losses import FusedInfoNCELoss, NTXentLoss, SupConLoss
from .matryoshka import MatryoshkaLoss
from .ranking import MultipleNegativesLoss
from .retrieval import ClipLoss, GroupedInfoNCELoss, GuidedInfoNCELoss, MoCoLoss
from .variants import DCLLoss, DebiasedLoss, DistillationLoss

__all__ = [
    "ClipLoss",
    "DCLLoss",
    "DebiasedLoss",
    "DistillationLoss",
    "FusedInfoNCELoss",
    "GroupedInfoNCELoss",
    "GuidedInfoNCELoss",
    "MatryoshkaLoss",
    "MoCoLoss",
    "MultipleNegativesLoss",
    "NTXentLoss",
    "SupConLoss",
    "clip_loss",
    "debiased_info_nce",
    "debiased_nt_xent",
    "decoupled_info_nce",
    "decoupled_nt_xent",
    "distilled_info_nce",
    "explain",
    "grouped_info_nce",
    "guided_info_nce",
    "info_nce",
    "moco_loss",
    "multiple_negatives",
    "nt_xent",
    "sup_con",
    "von_mises_fisher_weight",
]
__version__ = "0.1.0"
