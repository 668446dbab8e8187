"""The facts of a device that plans rest on: they stay as they are, and are asked for once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .plan import CPU_LIMIT, MEMORY_SHARE, OTHER_LIMIT, PROCESSORS


class Facts(NamedTuple):
    """What plans take from a device: its processors, and the bytes of workspace of a call that does not say."""

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
    if device.type != "cuda":
        return Facts(PROCESSORS, CPU_LIMIT if device.type == "cpu" else OTHER_LIMIT)
    found = torch.cuda.get_device_properties(device)
    return Facts(found.multi_processor_count, found.total_memory // MEMORY_SHARE)
