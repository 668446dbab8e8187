"""The facts of a device that plans rest on: they stay as they are, and are asked for once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .plan import CPU_LIMIT, MEMORY_SHARE, OTHER_LIMIT, PROCESSORS, limit_of_environment


class Facts(NamedTuple):
    """What plans take from a device: type, processors, and the bytes of workspace of a call that does not say."""

    type: str
    processors: int
    limit: int


_FACTS: dict[torch.device, Facts] = {}


def facts(device: torch.device) -> Facts:
    """Return the facts of a device; those of an assumed GPU where it is none."""
    if device not in _FACTS:
        _FACTS[device] = _facts(device)
    return _FACTS[device]


facts._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `unavailable` of `registry` is


def _facts(device: torch.device) -> Facts:
    limit = limit_of_environment()
    if device.type != "cuda":
        own = CPU_LIMIT if device.type == "cpu" else OTHER_LIMIT
        return Facts(device.type, PROCESSORS, limit or own)
    found = torch.cuda.get_device_properties(device)
    return Facts(device.type, found.multi_processor_count, limit or found.total_memory // MEMORY_SHARE)
