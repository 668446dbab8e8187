"""The losses as functions; each lives in a file of `losses` with its module."""

from .losses.clip import clip_loss
from .losses.debiased import debiased_info_nce, debiased_nt_xent
from .losses.decoupled import decoupled_info_nce, decoupled_nt_xent, von_mises_fisher_weight
from .losses.distilled import distilled_info_nce, score_std
from .losses.dual_temperature import dual_temperature_info_nce
from .losses.grouped import grouped_info_nce
from .losses.guided import guided_info_nce
from .losses.info_nce import explain, info_nce
from .losses.moco import moco_loss
from .losses.model_aware import model_aware_info_nce, model_aware_nt_xent
from .losses.multiple_negatives import multiple_negatives
from .losses.nt_xent import nt_xent
from .losses.robust import robust_info_nce
from .losses.siglip import siglip_loss
from .losses.sup_con import sup_con

__all__ = [
    "clip_loss",
    "debiased_info_nce",
    "debiased_nt_xent",
    "decoupled_info_nce",
    "decoupled_nt_xent",
    "distilled_info_nce",
    "dual_temperature_info_nce",
    "explain",
    "grouped_info_nce",
    "guided_info_nce",
    "info_nce",
    "moco_loss",
    "model_aware_info_nce",
    "model_aware_nt_xent",
    "multiple_negatives",
    "nt_xent",
    "robust_info_nce",
    "score_std",
    "siglip_loss",
    "sup_con",
    "von_mises_fisher_weight",
]
