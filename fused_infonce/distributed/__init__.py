"""Other processes: how a call reaches the rows of all ranks, and how a mistake on one becomes an error on all."""

from . import gather
from .call import Call, Distributed, DistributedLike, of_module, options_of, tell, together

__all__ = ["Call", "Distributed", "DistributedLike", "gather", "of_module", "options_of", "tell", "together"]
