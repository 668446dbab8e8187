"""One function per loss: validate, call the primitive, compose in O(N), reduce."""

from .clip import clip_loss
from .grouped import grouped_info_nce
from .guided import guided_info_nce
from .infonce import explain, info_nce
from .moco import moco_loss
from .ntxent import nt_xent
from .supcon import sup_con

__all__ = ["clip_loss", "explain", "grouped_info_nce", "guided_info_nce", "info_nce", "moco_loss", "nt_xent", "sup_con"]
