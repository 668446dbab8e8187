"""InfoNCE, the drop-in of info-nce-pytorch, and what plan a call of it has."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import contrast, reference, validation
from ..plan import Plan
from .compose import reduced
from .problems import of_keys


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    symmetric: bool = False,
    normalize: bool = True,
    in_batch_negatives: bool | None = None,
    ignore_index: int = -100,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> Tensor:
    """InfoNCE between queries and keys, without the N x M logits.

        loss_i = -log( exp(s_i,y) / (exp(s_i,y) + sum_j exp(s_ij)) ),    s_ij = cos(q_i, k_j) / t_i

    over the negatives j of row i. The first six arguments are those of `info_nce` of info-nce-pytorch 0.1.4, with its
    order, defaults and values.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        positive_key: (N, D), row i the positive of query i; with `target`, (M, D).
        negative_keys: explicit negatives, (M', D) if `negative_mode` is "unpaired", (N, H, D) if "paired". None: the
            other rows of `positive_key` are the negatives.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per row; gradients
            flow to tensors. Values of tensors are checked on a CPU; on a GPU a bad one gives NaN.
        reduction: "mean", "sum" or "none" (one value per query).
        negative_mode: "unpaired" (negatives shared by all queries) or "paired" (each query its own).
        symmetric: the mean of this loss and of that of the keys against the queries, as CLIP has it. Needs N = M and no
            `target`. Explicit negatives enter the query direction only; column j has the temperature of row j.
        normalize: divide every row by max(norm, 1e-12), as `torch.nn.functional.normalize`; else s_ij = q_i.k_j / t_i.
        in_batch_negatives: whether the other rows of `positive_key` are negatives too. None: only if there are no
            `negative_keys`.
        ignore_index: rows with this target count neither in the loss nor in the mean.
        target: (N,) integer indices of each query's positive in `positive_key`. None: row i.
        query_ids, key_ids, negative_ids: (N,), (M,) and, as `negative_keys` without its last dimension, integer ids.
            `key_ids` alone: a negative with the id of the row's positive is left out (a duplicate document). With
            `query_ids`: every negative with the id of its query is left out (labels). The positive is always kept.
        weight: (N,) what each row counts for, not negative: "none" gives w_i loss_i, "sum" their sum, "mean" that over
            the sum of w, as in `torch.nn.functional.cross_entropy`. With `symmetric` of key i too.
        label_smoothing: eps, in [0, 1]: the label is (1 - eps) + eps / K at the positive and eps / K at the others of
            the K columns that are not left out, as in `torch.nn.functional.cross_entropy`.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 256 MiB elsewhere.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32. With no rows, or all ignored, "mean"
        is NaN and "sum" 0, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: van den Oord et al. 2018, arXiv:1807.03748; https://github.com/RElbers/info-nce-pytorch.
    """
    problem, options = of_keys(
        query, positive_key, negative_keys, temperature, reduction, negative_mode, symmetric=symmetric,
        normalize=normalize, in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target,
        query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids, backend=backend,
        workspace_limit=workspace_limit,
    )  # fmt: skip
    if weight is not None:
        weight = validation.row_weight(weight, problem.temperature, query)
    if label_smoothing != 0:
        label_smoothing = validation.fraction("label_smoothing", label_smoothing)
    if backend == "reference":
        return reference.info_nce(
            query, positive_key, negative_keys, problem.temperature, reduction, negative_mode, symmetric=symmetric,
            normalize=normalize, in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target,
            query_ids=query_ids, key_ids=key_ids, negative_ids=negative_ids, weight=weight,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    return reduced(problem, options, reduction, symmetric, weight, label_smoothing)


def explain(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    symmetric: bool = False,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Plan:
    """How `info_nce` would compute this very call, and why: a `Plan`, which prints as a sentence. Computes nothing.

    Takes what `info_nce` takes, and raises what it raises. Whether inputs require gradients matters.
    """
    if options.get("backend") == "reference":
        raise ValueError("backend='reference' has no plan: it holds the dense matrices")
    problem, settings = of_keys(
        query, positive_key, negative_keys, temperature, reduction, negative_mode, symmetric=symmetric, **options
    )
    validation.row_weight(weight, problem.temperature, query)
    validation.fraction("label_smoothing", label_smoothing)
    at_once = reduction != "none" and problem.columns == symmetric and not (weight is not None and weight.requires_grad)
    weighted = weight is not None or problem.target is not None
    return contrast.make_plan(problem, settings, reduced=at_once, weighted=weighted)
