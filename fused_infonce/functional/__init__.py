"""One function per loss: validate, call the primitive, compose in O(N), reduce."""

from .clip import clip_loss
from .debiased import debiased_info_nce, debiased_nt_xent
from .decoupled import decoupled_info_nce, decoupled_nt_xent, von_mises_fisher_weight
from .distillation import distilled_info_nce
from .grouped import grouped_info_nce
from .guided import guided_info_nce
from .infonce import explain, info_nce
from .moco import moco_loss
from .ntxent import nt_xent
from .ranking import multiple_negatives
from .supcon import sup_con

__all__ = [
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
