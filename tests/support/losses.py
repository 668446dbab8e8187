"""Every exported loss, ready to be made: what is added to the package is here too."""

from __future__ import annotations

from functools import partial
from typing import Any

import fused_infonce
from fused_infonce.losses.base import ContrastiveLoss

NEEDED: dict[str, dict[str, Any]] = {
    "GlobalContrastiveLoss": {"samples": 5}, "GroupedInfoNCELoss": {"group_size": 2},
    "MoCoLoss": {"dim": 4, "queue_size": 3},
}  # fmt: skip
EXPORTED = {name: getattr(fused_infonce, name) for name in fused_infonce.__all__}
LOSSES = {
    name: partial(loss, **NEEDED.get(name, {}))
    for name, loss in EXPORTED.items()
    if isinstance(loss, type) and issubclass(loss, ContrastiveLoss)
}
