"""InfoNCE with the soft targets of a teacher, the scores of both in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import IGNORED, log_softmax, per_row, reduce, unit_rows


def distilled_info_nce(
    query: Tensor, key: Tensor, teacher_query: Tensor | None = None, teacher_key: Tensor | None = None,
    temperature: Any = 0.1, reduction: str = "mean", *, teacher_scores: Tensor | None = None,
    teacher_temperature: Any = None, normalize_teacher: bool = True, **options: Any,
) -> Tensor:  # fmt: skip
    """Return the loss of a teacher that is given by embeddings or by scores."""
    if teacher_temperature is None:
        teacher_temperature = temperature if teacher_scores is None else 1.0
    if isinstance(teacher_temperature, Tensor):
        teacher_temperature = teacher_temperature.detach()
    if teacher_scores is None:
        pair = (teacher_query.detach(), teacher_key.detach())
        a, b = map(unit_rows, pair) if normalize_teacher else pair
        teacher_scores = a @ b.T
    return of_similarities(
        query, key, teacher_scores.detach(), temperature, reduction, teacher_temperature=teacher_temperature, **options
    )


def of_similarities(
    query: Tensor, key: Tensor, z: Tensor, temperature: Any = 0.1, reduction: str = "mean", *,
    teacher_temperature: Any = 1.0, objective: str = "cross_entropy", alpha: float = 1.0,
    temperature_squared: bool = False, symmetric: bool = False, normalize: bool = True,
    target: Tensor | None = None, weight: Tensor | None = None, ignore_index: int = IGNORED,
) -> Tensor:  # fmt: skip
    """Return the loss of a teacher that is given by the (N, M) similarities z, before its temperature."""
    if normalize:
        query, key = unit_rows(query), unit_rows(key)
    n = len(query)
    t, u = (per_row(x, query, n)[:, None] for x in (temperature, teacher_temperature))
    y = torch.arange(n, device=query.device) if target is None else target
    valid = y != ignore_index
    rows = []
    for scores, similarity in ((query @ key.T, z), (key @ query.T, z.T))[: 2 if symmetric else 1]:
        logs, targets = log_softmax(scores / t), F.softmax(similarity / u, dim=1)
        soft = -(targets * logs).sum(1)
        if objective == "kl_div":
            soft = soft + torch.xlogy(targets, targets).sum(1)
        soft = soft * (t[:, 0].detach() ** 2 if temperature_squared else 1)
        hard = F.nll_loss(logs, y, reduction="none", ignore_index=ignore_index) if alpha < 1 else 0
        rows.append(alpha * soft + (1 - alpha) * hard)
    w = valid.to(query.dtype) * (1 if weight is None else weight)
    return reduce(torch.where(valid, w * sum(rows) / len(rows), 0), reduction, w.sum())
