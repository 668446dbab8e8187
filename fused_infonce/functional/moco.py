"""MoCo's loss, against a queue of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import validation
from .infonce import explain, info_nce


def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """MoCo's loss: each query against its key and a queue of the keys of earlier batches, which are the negatives.

        loss_i = -log( exp(s_i) / (exp(s_i) + sum_j exp(s_ij)) )
        s_i = cos(q_i, k_i) / t,  s_ij = cos(q_i, queue_j) / t

    Key and queue get no gradient. The queue may be overwritten between this call and its backward: where the plan keeps
    the negatives for the backward, it keeps a copy of them.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        key: (N, D), row i the positive of query i; detached.
        queue: (D, K), a negative a column; used without a copy where `queue.T` is contiguous.
        temperature, reduction, backend, workspace_limit: as in `info_nce`.
        normalize: divide every query, key and column of the queue by max(norm, 1e-12).

    Returns: as `info_nce`.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: He et al. 2019, arXiv:1911.05722; https://github.com/facebookresearch/moco.
    """
    validation.embeddings("query", query, 2, "(N, D)")
    validation.embeddings("key", key, 2, "(N, D)")
    validation.embeddings("queue", queue, 2, "(D, K)")
    validation.same_kind({"query": query, "key": key, "queue": queue})
    if key.shape != query.shape:
        raise ValueError(f"key must have shape {tuple(query.shape)} as query has, got {tuple(key.shape)}")
    if queue.shape[0] != query.shape[1]:
        raise ValueError(f"queue must have {query.shape[1]} rows, the components of query, got {queue.shape[0]}")
    negatives = queue.detach().T
    options: dict[str, Any] = {
        "temperature": temperature, "reduction": reduction, "normalize": normalize, "backend": backend,
        "workspace_limit": workspace_limit,
    }  # fmt: skip
    validation.one_of("backend", backend, validation.BACKENDS)
    if _kept(query, key.detach(), negatives, temperature, options):
        negatives = negatives.clone()
    return info_nce(query, key.detach(), negatives, **options)


def _kept(query: Tensor, key: Tensor, negatives: Tensor, temperature: Any, options: dict[str, Any]) -> bool:
    """Whether a backward will read the negatives."""
    if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in (query, temperature)):
        return False
    return options["backend"] == "reference" or not explain(query, key, negatives, **options).one_pass
