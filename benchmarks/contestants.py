"""Contestants of the benchmarks, each a loss of fresh inputs: ours, the libraries we replace, the floor of matmuls.

Every one computes the same loss at `TEMPERATURE`. A peer that is not installed, or not for this device, is left out.
open_clip and lightly are loaded without their packages' own imports (torchvision and more), which their losses do not
need.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Collection
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_infonce import info_nce, nt_xent, siglip_loss

from . import dense
from .cases import BIAS, COMPILED, DENSE, OURS, SCALE, TEMPERATURE, UNBIASED, Case
from .dense import labels, unit

FLOOR_ROWS = 1024

Loss = Callable[..., Tensor]


def bias_of(key: Tensor) -> Tensor:
    """One bias for all keys, which changes no loss, so that it is comparable with those without."""
    return torch.full((len(key),), 3.0, device=key.device)


OF_OURS: dict[str, Loss] = {
    "one": lambda q, k: info_nce(q, k, temperature=TEMPERATURE),
    "symmetric": lambda q, k: info_nce(q, k, temperature=TEMPERATURE, symmetric=True),
    "self": lambda a, b: nt_xent(a, b, TEMPERATURE),
    "rows": lambda q, k: info_nce(q, k, temperature=TEMPERATURE, reduction="none").mean(),
    "biased": lambda q, k: info_nce(q, k, temperature=TEMPERATURE, key_bias=bias_of(k)),
    "biased symmetric": lambda q, k: info_nce(q, k, temperature=TEMPERATURE, symmetric=True, key_bias=bias_of(k)),
    "sigmoid": lambda q, k: siglip_loss(q, k, SCALE, BIAS, normalize=True),
}


def losses(case: Case, device: torch.device, without: Collection[str] = ()) -> dict[str, Loss]:
    """The contestants of a case by name, ours first."""
    every = {OURS: OF_OURS[case.direction], **available(case.direction, device.type)}
    return {name: loss for name, loss in every.items() if name not in without}


def floor(case: Case) -> Callable[[Tensor, Tensor], None]:
    """The matmuls that no algorithm can do without, bare: scores, and with a backward the two gradients."""

    def run(query: Tensor, key: Tensor) -> None:
        query, key = query.detach(), key.detach()
        if case.direction == "self":
            query = key = torch.cat([query, key])
        rows = FLOOR_ROWS if query.device.type == "cpu" else max(FLOOR_ROWS, 2**28 // (2 * len(key)))
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        for start in range(0, len(query), rows):
            chunk = query[start : start + rows]
            scores = chunk @ key.T
            if case.mode == "fwd_bwd":
                torch.mm(scores, key, out=grad_query[start : start + rows])
                grad_key.addmm_(scores.T, chunk)

    return run


def info_nce_pytorch() -> Loss:
    """info-nce-pytorch's loss."""
    from info_nce import info_nce

    return lambda q, k: info_nce(q, k, temperature=TEMPERATURE)


def linear_cross_entropy() -> Loss:
    """PyTorch's chunked linear cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions()  # torch >= 2.13: chunked, gradients in the forward

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query, key)
        return F.linear_cross_entropy(query / TEMPERATURE, key, labels(query), options=options)

    return loss


def open_clip() -> Loss:
    """open_clip's loss, of unit rows."""
    clip = without_package("open_clip.loss").ClipLoss()
    return lambda q, k: clip(*unit(q, k), 1 / TEMPERATURE)


def open_clip_siglip() -> Loss:
    """open_clip's SigLIP loss, of unit rows."""
    siglip = without_package("open_clip.loss").SigLipLoss()
    return lambda q, k: siglip(*unit(q, k), SCALE, BIAS)


def lightly() -> Loss:
    """lightly's NT-Xent."""
    unused = types.ModuleType("lightly.models.utils")  # of its memory bank, which is off; it imports torchvision
    sys.modules.setdefault(unused.__name__, unused)
    for name in ("lightly.models.utils", "lightly.models.modules.memory_bank", "lightly.utils.dist"):
        without_package(name)
    return without_package("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=TEMPERATURE)


def memeff() -> Loss:
    """memeff's CLIP loss, with the true gradient."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=TEMPERATURE, stable=False)  # the true gradient, not a rescaled one


def liger() -> Loss:
    """liger-kernel's fused linear cross-entropy."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query, key)
        result = LigerFusedLinearCrossEntropyFunction.apply(query / TEMPERATURE, key, labels(query))
        return result[0] if isinstance(result, tuple) else result

    return loss


def cut_cross_entropy() -> Loss:
    """Apple's cut cross-entropy, in its exact mode."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query, key)
        return linear_cross_entropy(query / TEMPERATURE, key, labels(query), filter_eps=None)  # exact mode

    return loss


def inf_cl() -> Loss:
    """Inf-CL's tiled loss, for the widths that it takes."""
    from inf_cl import cal_flash_loss

    def loss(query: Tensor, key: Tensor) -> Tensor:
        d = query.shape[1]
        if d % 256 and d & (d - 1):
            raise ValueError(f"inf-cl needs D to be a power of two or a multiple of 256, got {d}")
        query, key = unit(query, key)
        return cal_flash_loss(query, key, scale=1 / TEMPERATURE, head_dim=min(256, d)).mean()

    return loss


def compiled(loss: Loss) -> Callable[[], Loss]:
    """A maker of the compiled loss."""
    return lambda: torch.compile(loss, dynamic=False)  # each size for itself


# direction -> name -> (devices, its maker)
PEERS: dict[str, dict[str, tuple[str, Callable[[], Loss]]]] = {
    "one": {
        DENSE: ("cpu cuda", lambda: dense.info_nce),
        COMPILED: ("cuda", compiled(dense.info_nce)),
        "info-nce-pytorch": ("cpu cuda", info_nce_pytorch),
        "F.linear_cross_entropy": ("cpu cuda", linear_cross_entropy),
        "liger-kernel": ("cuda", liger),
        "cut-cross-entropy": ("cuda", cut_cross_entropy),
        "inf-cl": ("cuda", inf_cl),
    },
    "rows": {DENSE: ("cpu cuda", lambda: dense.rows)},
    "symmetric": {
        DENSE: ("cpu cuda", lambda: dense.symmetric),
        COMPILED: ("cuda", compiled(dense.symmetric)),
        "open_clip": ("cpu cuda", open_clip),
        "memeff": ("cuda", memeff),
    },
    "self": {
        DENSE: ("cpu cuda", lambda: dense.nt_xent),
        COMPILED: ("cuda", compiled(dense.nt_xent)),
        "lightly": ("cpu cuda", lightly),
    },
    "biased": {DENSE: ("cpu cuda", lambda: dense.info_nce), UNBIASED: ("cpu cuda", lambda: OF_OURS["one"])},
    "biased symmetric": {
        DENSE: ("cpu cuda", lambda: dense.symmetric),
        UNBIASED: ("cpu cuda", lambda: OF_OURS["symmetric"]),
    },
    "sigmoid": {
        DENSE: ("cpu cuda", lambda: dense.siglip),
        COMPILED: ("cuda", compiled(dense.siglip)),
        "open_clip": ("cpu cuda", open_clip_siglip),
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
