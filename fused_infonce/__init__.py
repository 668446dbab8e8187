"""Contrastive losses for PyTorch without the logits matrix: Triton kernels on a GPU, the same algorithm elsewhere."""

from . import functional
from .backends.contract import RowStatistics, Statistics
from .compose.statistics import statistics
from .distributed import Distributed
from .functional import *  # noqa: F403  # its __all__
from .losses.clip import ClipLoss
from .losses.debiased import DebiasedLoss
from .losses.decoupled import DCLLoss
from .losses.distilled import DistillationLoss
from .losses.dual_temperature import DualTemperatureLoss
from .losses.global_contrastive import GlobalContrastiveLoss
from .losses.grouped import GroupedInfoNCELoss
from .losses.guided import GuidedInfoNCELoss
from .losses.info_nce import FusedInfoNCELoss
from .losses.moco import MoCoLoss
from .losses.model_aware import MACLLoss
from .losses.multiple_negatives import MultipleNegativesLoss
from .losses.nt_xent import NTXentLoss
from .losses.robust import RobustInfoNCELoss
from .losses.siglip import SigLipLoss
from .losses.sup_con import SupConLoss
from .wrappers.cached import cached
from .wrappers.matryoshka import MatryoshkaLoss

__all__ = [
    "ClipLoss",
    "DCLLoss",
    "DebiasedLoss",
    "DistillationLoss",
    "Distributed",
    "DualTemperatureLoss",
    "FusedInfoNCELoss",
    "GlobalContrastiveLoss",
    "GroupedInfoNCELoss",
    "GuidedInfoNCELoss",
    "MACLLoss",
    "MatryoshkaLoss",
    "MoCoLoss",
    "MultipleNegativesLoss",
    "NTXentLoss",
    "RobustInfoNCELoss",
    "RowStatistics",
    "SigLipLoss",
    "Statistics",
    "SupConLoss",
    "cached",
    "statistics",
]
__all__ += functional.__all__
__version__ = "0.2.0"
