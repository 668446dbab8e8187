"""The libraries we replace, each as a loss of (query, key) at `TEMPERATURE`: the same value as ours.

A peer that is not installed, or not for this device, is left out. open_clip and lightly are loaded without running
their packages' own imports (torchvision and more), which their losses do not need.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.05

Loss = Callable[[Tensor, Tensor], Tensor]


def unit(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(query, dim=-1), F.normalize(key, dim=-1)


def labels(query: Tensor) -> Tensor:
    return torch.arange(len(query), device=query.device)


def dense(query: Tensor, key: Tensor) -> Tensor:
    """As people write it: normalise, one matmul, cross-entropy on the logits."""
    query, key = unit(query, key)
    return F.cross_entropy(query @ key.T / TEMPERATURE, labels(query))


def dense_rows(query: Tensor, key: Tensor) -> Tensor:
    query, key = unit(query, key)
    return F.cross_entropy(query @ key.T / TEMPERATURE, labels(query), reduction="none").mean()


def dense_symmetric(query: Tensor, key: Tensor) -> Tensor:
    query, key = unit(query, key)
    logits = query @ key.T / TEMPERATURE
    return (F.cross_entropy(logits, labels(query)) + F.cross_entropy(logits.T, labels(query))) / 2


def dense_self(view_a: Tensor, view_b: Tensor) -> Tensor:
    rows = F.normalize(torch.cat([view_a, view_b]), dim=-1)
    logits = (rows @ rows.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, labels(rows).roll(len(view_a)))


def info_nce_pytorch() -> Loss:
    from info_nce import info_nce

    return lambda q, k: info_nce(q, k, temperature=TEMPERATURE)


def linear_cross_entropy() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # torch >= 2.13: chunked, gradients in the forward

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query, key)
        return F.linear_cross_entropy(query / TEMPERATURE, key, labels(query), options=options)

    return loss


def open_clip() -> Loss:
    clip = without_package("open_clip.loss").ClipLoss()
    return lambda q, k: clip(*unit(q, k), 1 / TEMPERATURE)


def lightly() -> Loss:
    unused = types.ModuleType("lightly.models.utils")  # of its memory bank, which is off; it imports torchvision
    sys.modules.setdefault(unused.__name__, unused)
    for name in ("lightly.models.utils", "lightly.models.modules.memory_bank", "lightly.utils.dist"):
        without_package(name)
    return without_package("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=TEMPERATURE)


def memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=TEMPERATURE, stable=False)  # the true gradient, not a rescaled one


def liger() -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query, key)
        result = LigerFusedLinearCrossEntropyFunction.apply(query / TEMPERATURE, key, labels(query))
        return result[0] if isinstance(result, tuple) else result

    return loss


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query, key)
        return linear_cross_entropy(query / TEMPERATURE, key, labels(query), filter_eps=None)  # exact mode

    return loss


def inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(query: Tensor, key: Tensor) -> Tensor:
        d = query.shape[1]
        if d % 256 and d & (d - 1):
            raise ValueError(f"inf-cl needs D to be a power of two or a multiple of 256, got {d}")
        query, key = unit(query, key)
        return cal_flash_loss(query, key, scale=1 / TEMPERATURE, head_dim=min(256, d)).mean()

    return loss


def compiled(loss: Loss) -> Callable[[], Loss]:
    return lambda: torch.compile(loss, dynamic=False)  # each size for itself


# direction -> name -> (devices, what makes it)
PEERS: dict[str, dict[str, tuple[str, Callable[[], Loss]]]] = {
    "one": {
        "dense": ("cpu cuda", lambda: dense),
        "dense compiled": ("cuda", compiled(dense)),
        "info-nce-pytorch": ("cpu cuda", info_nce_pytorch),
        "F.linear_cross_entropy": ("cpu cuda", linear_cross_entropy),
        "liger-kernel": ("cuda", liger),
        "cut-cross-entropy": ("cuda", cut_cross_entropy),
        "inf-cl": ("cuda", inf_cl),
    },
    "rows": {"dense": ("cpu cuda", lambda: dense_rows)},
    "symmetric": {
        "dense": ("cpu cuda", lambda: dense_symmetric),
        "dense compiled": ("cuda", compiled(dense_symmetric)),
        "open_clip": ("cpu cuda", open_clip),
        "memeff": ("cuda", memeff),
    },
    "self": {
        "dense": ("cpu cuda", lambda: dense_self),
        "dense compiled": ("cuda", compiled(dense_self)),
        "lightly": ("cpu cuda", lightly),
    },
}


@cache
def available(direction: str, device: str) -> dict[str, Loss]:
    """The peers of a direction that are for this device and installed; the others are named with the reason."""
    found = {}
    for name, (devices, make) in PEERS[direction].items():
        if device not in devices.split():
            continue
        try:
            found[name] = make()
        except Exception as error:  # whatever importing a peer raises
            print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return found


def without_package(name: str) -> types.ModuleType:
    """A module of a package, with its parents replaced by empty ones that run no imports of their own."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            spec = importlib.util.find_spec(parent)
            if spec is None or spec.submodule_search_locations is None:
                raise ImportError(f"no package {parent}")
            module = types.ModuleType(parent)
            module.__path__ = list(spec.submodule_search_locations)
            sys.modules[parent] = module
            if depth > 1:
                setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
    module = importlib.import_module(name)
    setattr(sys.modules[".".join(parts[:-1])], parts[-1], module)
    return module
