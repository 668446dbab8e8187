"""Dense forms of every loss, as people write them: one matmul for the logits, then cross-entropy on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import BIAS, SCALE, TEMPERATURE


def unit(*rows: Tensor) -> tuple[Tensor, ...]:
    """Rows divided by their norms."""
    return tuple(F.normalize(x, dim=-1) for x in rows)


def labels(query: Tensor) -> Tensor:
    """The index of each row, which is that of its positive."""
    return torch.arange(len(query), device=query.device)


def info_nce(query: Tensor, key: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """InfoNCE of pairs."""
    query, key = unit(query, key)
    return F.cross_entropy(query @ key.T / temperature, labels(query))


def rows(query: Tensor, key: Tensor) -> Tensor:
    """InfoNCE of pairs, reduced by the caller."""
    query, key = unit(query, key)
    return F.cross_entropy(query @ key.T / TEMPERATURE, labels(query), reduction="none").mean()


def symmetric(query: Tensor, key: Tensor) -> Tensor:
    """InfoNCE in both directions."""
    query, key = unit(query, key)
    logits = query @ key.T / TEMPERATURE
    return (F.cross_entropy(logits, labels(query)) + F.cross_entropy(logits.T, labels(query))) / 2


def clip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss of unit rows, as open_clip writes it: two matmuls."""
    target = labels(images)
    return (F.cross_entropy(scale * images @ texts.T, target) + F.cross_entropy(scale * texts @ images.T, target)) / 2


def siglip(images: Tensor, texts: Tensor, scale: float | Tensor = SCALE, bias: float | Tensor = BIAS) -> Tensor:
    """SigLIP's loss."""
    images, texts = unit(images, texts)
    signs = 2 * torch.eye(len(images), dtype=images.dtype, device=images.device) - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)


def nt_xent(view_a: Tensor, view_b: Tensor) -> Tensor:
    """SimCLR's loss of two views."""
    (x,) = unit(torch.cat([view_a, view_b]))
    logits = (x @ x.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, labels(x).roll(len(view_a)))


def sup_con(features: Tensor, classes: Tensor) -> Tensor:
    """Supervised contrastive loss of (N, V, D) views, every view an anchor, at t = t_base."""
    (x,) = unit(torch.cat(features.unbind(1)))
    classes = classes.repeat(features.shape[1])
    logits = (x @ x.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    positive = (classes[:, None] == classes).fill_diagonal_(False)
    log_p = torch.log_softmax(logits, dim=1).masked_fill(~positive, 0)
    return -(log_p.sum(1) / positive.sum(1)).mean()


def moco(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """MoCo's loss against a (D, K) queue of unit columns; the key gets no gradient."""
    query, key = unit(query, key.detach())
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros_like(labels(query)))


def grouped(query: Tensor, passages: Tensor, group_size: int) -> Tensor:
    """InfoNCE over all passages, of which every query has a group: its positive, then hard negatives."""
    query, passages = unit(query, passages)
    return F.cross_entropy(query @ passages.T / TEMPERATURE, labels(query) * group_size)


def multiple_negatives(query: Tensor, documents: Sequence[Tensor]) -> Tensor:
    """InfoNCE over the positives and hard negatives of all queries."""
    return grouped(query, torch.cat(list(documents)), 1)


def guided(query: Tensor, key: Tensor) -> Tensor:
    """InfoNCE over the keys that are no more similar to the query than its positive is."""
    query, key = unit(query, key)
    cosine = query @ key.T
    guide = cosine.detach()
    logits = (cosine / TEMPERATURE).masked_fill(guide > guide.diagonal()[:, None], -torch.inf)
    return F.cross_entropy(logits, labels(query))


def of_views(view_a: Tensor, view_b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(2 N,) logits of the positives, and (2 N, 2 N) of the rows of other samples, elsewhere -inf."""
    n = len(view_a)
    (x,) = unit(torch.cat([view_a, view_b]))
    logits = x @ x.T / temperature
    sample = torch.arange(2 * n, device=x.device) % n
    positive = logits.diagonal(n)
    return torch.cat([positive, positive]), logits.masked_fill(sample[:, None] == sample, -torch.inf)


def decoupled(view_a: Tensor, view_b: Tensor) -> Tensor:
    """Decoupled contrastive loss of two views: the positive is not in the denominator."""
    positive, negatives = of_views(view_a, view_b, TEMPERATURE)
    return (negatives.logsumexp(1) - positive).mean()


def debiased(view_a: Tensor, view_b: Tensor, temperature: float, tau_plus: float) -> Tensor:
    """Debiased contrastive loss of two views, as its authors write it, without logarithms."""
    n = 2 * len(view_a) - 2
    positive, negatives = (x.exp() for x in of_views(view_a, view_b, temperature))
    estimate = (negatives.sum(1) - n * tau_plus * positive) / (1 - tau_plus)
    return -(positive / (positive + estimate.clamp(min=n * math.exp(-1 / temperature)))).log().mean()


def robust(query: Tensor, key: Tensor, rho: float) -> Tensor:
    """The robust loss of iSogCLR: the temperature times the logarithm of the mean exponential lead."""
    query, key = unit(query, key)
    logits = query @ key.T / TEMPERATURE
    lead = (logits - logits.diagonal()[:, None]).fill_diagonal_(-torch.inf)
    return TEMPERATURE * (lead.logsumexp(1) - math.log(len(query) - 1) + rho).mean()


def model_aware(view_a: Tensor, view_b: Tensor, alpha: float) -> Tensor:
    """MACL of two views, as lightly writes it, at a temperature by the alignment of the pairs."""
    x, y = unit(view_a, view_b)
    t = TEMPERATURE * (1 + alpha * (x * y).sum(1).mean().item())
    positive, negatives = of_views(view_a, view_b, t)
    log_p = torch.log_softmax(torch.cat([positive[:, None], negatives], dim=1), dim=1)[:, 0]
    return -(log_p / (1 - log_p.exp()).detach()).mean()


def dual_temperature(query: Tensor, key: Tensor, inter: float) -> Tensor:
    """InfoNCE with dual temperature, as its authors write it, on two softmaxes."""
    query, key = unit(query, key)
    cosine, mine = query @ key.T, labels(query)
    within, between = (torch.log_softmax(cosine / t, dim=1)[mine, mine] for t in (TEMPERATURE, inter))
    return -(((1 - between.exp()) / (1 - within.exp())).detach() * within).mean()


def distilled(query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    """InfoNCE with the softmax of a teacher's similarities as its targets, at the same temperature."""
    query, key, teacher_query, teacher_key = unit(query, key, teacher_query, teacher_key)
    target = torch.softmax(teacher_query @ teacher_key.T / TEMPERATURE, dim=1)
    return F.cross_entropy(query @ key.T / TEMPERATURE, target)


def matryoshka(query: Tensor, key: Tensor, dims: Sequence[int]) -> Tensor:
    """The sum of InfoNCE over the leading components of the rows, for several numbers of them."""
    return torch.stack([info_nce(query[:, :dim], key[:, :dim]) for dim in dims]).sum()


# direction of a case -> the dense form
DIRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one": info_nce,
    "rows": rows,
    "symmetric": symmetric,
    "self": nt_xent,
    "sigmoid": siglip,
}
