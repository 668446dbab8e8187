"""What the drop-ins share."""

from __future__ import annotations

import warnings
from functools import cache


@cache
def say_once(what: str, why: str) -> None:
    """That a call runs the original's own code, once for each reason."""
    warnings.warn(f"{what} runs the original's own code here, with its memory: {why}", stacklevel=4)
