"""Every exported loss beside its dense form, as cases for a contest: fp32, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_infonce as ours

from . import dense
from .cases import BIAS, DENSE, OURS, SCALE, TEMPERATURE

SIZES = (64, 256, 1024)
WIDTH = 128
QUEUE = 4096  # keys of MoCo
GROUP = 4  # passages a query
CLASS = 8  # samples a class of SupCon
DIMS = (128, 64, 32)  # of Matryoshka
TAU_PLUS = 0.1
RHO = 0.3

Loss = Callable[..., Tensor]
Inputs = Callable[[int, torch.Generator], tuple[Tensor, ...]]


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal rows that require a gradient."""
    return torch.randn(*shape, generator=generator).requires_grad_()


def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Queries and keys, or two views."""
    return normal(n, WIDTH, generator=generator), normal(n, WIDTH, generator=generator)


def alike(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Pairs of a cosine near 0.45: what a guide compares with it is rarely within the rounding of it."""
    query, noise = torch.randn(2, n, WIDTH, generator=generator)
    return query.requires_grad_(), (query.detach() + 2 * noise).requires_grad_()


def scaled(learned: bool, rows_of_unit: bool) -> Inputs:
    """CLIP's pairs and its logit scale."""

    def make(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = [x.detach() for x in pairs(n, generator)]
        if rows_of_unit:
            rows = [F.normalize(x, dim=-1) for x in rows]
        scale = torch.tensor(1 / TEMPERATURE, requires_grad=learned)
        return *(x.requires_grad_() for x in rows), scale

    return make


def scaled_and_shifted(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """SigLIP's pairs, its learned scale and bias."""
    return *pairs(n, generator), *(torch.tensor(x, requires_grad=True) for x in (SCALE, BIAS))


def views(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Two views of samples, stacked, and their classes."""
    return normal(n, 2, WIDTH, generator=generator), torch.arange(n) // CLASS


def groups(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Queries and groups of passages."""
    return normal(n, WIDTH, generator=generator), normal(n * GROUP, WIDTH, generator=generator)


def triplets(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Queries, positives and hard negatives."""
    return *pairs(n, generator), normal(n, WIDTH, generator=generator)


def taught(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Queries and keys, and a teacher's."""
    return *pairs(n, generator), *(x.detach() for x in pairs(n, generator))


def clip(normalize: bool = False) -> tuple[Loss, Loss]:
    """ClipLoss and its dense form, which normalises first where the loss does."""

    def normalized(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return dense.clip(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), scale)

    return ours.ClipLoss(normalize=normalize), normalized if normalize else dense.clip


def moco() -> tuple[Loss, Loss]:
    """MoCoLoss and its dense form, on the queue of the former, which stays as it is."""
    loss = ours.MoCoLoss(WIDTH, queue_size=QUEUE, temperature=TEMPERATURE)
    return lambda q, k: loss(q, k, enqueue=False), lambda q, k: dense.moco(q, k, loss.queue)


def multiple_negatives() -> tuple[Loss, Loss]:
    """MultipleNegativesLoss and its dense form, of a positive and a hard negative each."""
    loss = ours.MultipleNegativesLoss(TEMPERATURE)
    return lambda q, *documents: loss(q, documents), lambda q, *documents: dense.multiple_negatives(q, documents)


def matryoshka() -> tuple[Loss, Loss]:
    """MatryoshkaLoss around InfoNCE, and its dense form."""
    loss = ours.MatryoshkaLoss(ours.FusedInfoNCELoss(TEMPERATURE), dims=list(DIMS))
    return loss, lambda q, k: dense.matryoshka(q, k, DIMS)


@dataclass(frozen=True)
class Entry:
    """An exported loss: a maker of it and its dense form, and its inputs."""

    direction: str  # as in Case
    make: Callable[[], tuple[Loss, Loss]]  # ours, dense
    inputs: Inputs = pairs
    columns: Callable[[int], int] = field(default=lambda n: n)  # of the score matrix, by the number of queries


LOSSES: dict[str, Entry] = {
    "FusedInfoNCELoss": Entry("one", lambda: (ours.FusedInfoNCELoss(TEMPERATURE), dense.info_nce)),
    "FusedInfoNCELoss(symmetric=True)": Entry(
        "symmetric", lambda: (ours.FusedInfoNCELoss(TEMPERATURE, symmetric=True), dense.symmetric)
    ),
    "ClipLoss": Entry("symmetric", clip, scaled(learned=False, rows_of_unit=True)),
    "ClipLoss, learned scale": Entry("symmetric", clip, scaled(learned=True, rows_of_unit=True)),
    "ClipLoss(normalize=True)": Entry(
        "symmetric", lambda: clip(normalize=True), scaled(learned=False, rows_of_unit=False)
    ),
    "SigLipLoss": Entry("sigmoid", lambda: (ours.SigLipLoss(normalize=True), dense.siglip), scaled_and_shifted),
    "NTXentLoss": Entry("self", lambda: (ours.NTXentLoss(TEMPERATURE), dense.nt_xent)),
    "SupConLoss": Entry(
        "self", lambda: (ours.SupConLoss(TEMPERATURE, base_temperature=TEMPERATURE), dense.sup_con), views
    ),
    "MoCoLoss": Entry("one", moco, columns=lambda n: 1 + QUEUE),
    "GroupedInfoNCELoss": Entry(
        "one",
        lambda: (
            ours.GroupedInfoNCELoss(GROUP, temperature=TEMPERATURE),
            lambda q, p: dense.grouped(q, p, GROUP),
        ),
        groups,
        lambda n: n * GROUP,
    ),
    "MultipleNegativesLoss": Entry("one", multiple_negatives, triplets, lambda n: 2 * n),
    "GuidedInfoNCELoss": Entry("one", lambda: (ours.GuidedInfoNCELoss(TEMPERATURE), dense.guided), alike),
    "DCLLoss": Entry("self", lambda: (ours.DCLLoss(TEMPERATURE), dense.decoupled)),
    "DebiasedLoss": Entry(
        "self",
        lambda: (
            ours.DebiasedLoss(0.5, tau_plus=TAU_PLUS),
            lambda a, b: dense.debiased(a, b, 0.5, TAU_PLUS),
        ),
    ),
    "RobustInfoNCELoss": Entry(
        "one", lambda: (ours.RobustInfoNCELoss(TEMPERATURE, rho=RHO), lambda q, k: dense.robust(q, k, RHO))
    ),
    "MACLLoss": Entry(
        "self", lambda: (ours.MACLLoss(TEMPERATURE, alpha=0.5), lambda a, b: dense.model_aware(a, b, 0.5))
    ),
    "DualTemperatureLoss": Entry(
        "one",
        lambda: (
            ours.DualTemperatureLoss(TEMPERATURE, inter_temperature=1.0),
            lambda q, k: dense.dual_temperature(q, k, 1.0),
        ),
    ),
    "DistillationLoss": Entry("one", lambda: (ours.DistillationLoss(TEMPERATURE), dense.distilled), taught),
    "MatryoshkaLoss": Entry("one", matryoshka),
}


@dataclass(frozen=True)
class LossCase:
    """An exported loss at one size; see `contest.Compared`."""

    loss: str
    n: int
    d: int = WIDTH
    dtype: str = "float32"
    mode: str = "fwd_bwd"

    @property
    def direction(self) -> str:
        """The direction of the scores, as in `cases.Case`."""
        return LOSSES[self.loss].direction

    @property
    def m(self) -> int:
        """The number of keys that a query is compared with; of two views that of samples."""
        return LOSSES[self.loss].columns(self.n)

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """Fresh inputs on a device; those with a gradient require it there."""
        made = LOSSES[self.loss].inputs(self.n, torch.Generator().manual_seed(seed))
        return tuple(x.detach().to(device).requires_grad_(x.requires_grad) for x in made)

    def contestants(self) -> dict[str, Loss]:
        """Ours and the dense form."""
        return dict(zip((OURS, DENSE), LOSSES[self.loss].make(), strict=True))

    def __str__(self) -> str:
        return f"{self.loss}-{self.n}x{self.m}x{self.d}"


def cases() -> list[LossCase]:
    """Every loss at every size."""
    return [LossCase(loss, n) for n in SIZES for loss in LOSSES]
