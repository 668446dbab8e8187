"""One function per loss: validate, call the primitive, compose in O(N), reduce."""

from .clip import clip_loss
from .infonce import explain, info_nce
from .ntxent import nt_xent
from .supcon import sup_con

__all__ = ["clip_loss", "explain", "info_nce", "nt_xent", "sup_con"]
