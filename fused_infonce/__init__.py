"""Contrastive losses for PyTorch without the logits matrix: Triton kernels on a GPU, the same algorithm elsewhere."""

from .backends.contract import RowStatistics, Statistics
from .compose.statistics import statistics
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
from .losses.clip import ClipLoss
from .losses.debiased import DebiasedLoss
from .losses.decoupled import DCLLoss
from .losses.distilled import DistillationLoss
from .losses.grouped import GroupedInfoNCELoss
from .losses.guided import GuidedInfoNCELoss
from .losses.info_nce import FusedInfoNCELoss
from .losses.moco import MoCoLoss
from .losses.multiple_negatives import MultipleNegativesLoss
from .losses.nt_xent import NTXentLoss
from .losses.sup_con import SupConLoss
from .wrappers.matryoshka import MatryoshkaLoss

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
    "RowStatistics",
    "Statistics",
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
    "statistics",
    "sup_con",
    "von_mises_fisher_weight",
]
__version__ = "0.2.0"
