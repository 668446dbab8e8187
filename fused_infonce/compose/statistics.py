"""The primitive for losses of one's own: statistics of queries against keys, differentiable."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import contrast
from ..backends import BackendName, Options
from ..backends.contract import LN2, RowStatistics, Statistics
from ..distributed import DistributedLike, block, gather, together
from .across import across, in_block, meet
from .arguments import NegativeMode, call_options, of_keys
from .rows import widened


@overload
def statistics(
    query: Tensor, key: Tensor, negative_keys: Tensor | None = None, temperature: float | Tensor = 0.1, *,
    columns: Literal[False] = False, negative_mode: NegativeMode = "unpaired", normalize: bool = True,
    in_batch_negatives: bool | None = None, ignore_index: int = -100, target: Tensor | None = None,
    query_ids: Tensor | None = None, key_ids: Tensor | None = None, negative_ids: Tensor | None = None,
    key_bias: Tensor | None = None, negative_bias: Tensor | None = None, positive_bias: bool = True,
    negative_index: Tensor | None = None, backend: BackendName = "auto", workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> RowStatistics: ...  # fmt: skip


@overload
def statistics(
    query: Tensor, key: Tensor, negative_keys: Tensor | None = None, temperature: float | Tensor = 0.1, *,
    columns: Literal[True], negative_mode: NegativeMode = "unpaired", normalize: bool = True,
    in_batch_negatives: bool | None = None, ignore_index: int = -100, target: Tensor | None = None,
    query_ids: Tensor | None = None, key_ids: Tensor | None = None, negative_ids: Tensor | None = None,
    key_bias: Tensor | None = None, negative_bias: Tensor | None = None, positive_bias: bool = True,
    negative_index: Tensor | None = None, backend: BackendName = "auto", workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Statistics: ...  # fmt: skip


@together
def statistics(
    query: Tensor,
    key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    columns: bool = False,
    negative_mode: NegativeMode = "unpaired",
    normalize: bool = True,
    in_batch_negatives: bool | None = None,
    ignore_index: int = -100,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    key_bias: Tensor | None = None,
    negative_bias: Tensor | None = None,
    positive_bias: bool = True,
    negative_index: Tensor | None = None,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> RowStatistics | Statistics:
    """Compute the statistics of which contrastive losses are made, to write a loss of your own without N x M logits.

        pos_i = s_i,y    neg_i = log sum_j exp(s_ij)    mean_i = sum_j p_ij s_ij    maximum_i = max_j s_ij
        s_ij = cos(q_i, k_j) / t_i,    p_ij = exp(s_ij - neg_i)

    over the negatives j of row i, which the positive y is not among. InfoNCE is `softplus(neg - pos)`, the decoupled
    loss `neg - pos`, and `exp(neg - mean)` the effective number of negatives. With biases s_ij has that of key j,
    except in the mean, which is that of the logits without: sum_j p_ij (s_ij - c_j), on which the temperature acts.

    Args:
        columns: return `Statistics(rows, columns)`, where `columns` are the statistics of the keys against the queries,
            from the same products; column j has the temperature and the positive of row j, without a bias. Needs N = M
            and no `target`.
        The other arguments are those of `info_nce`.

    Returns:
        `RowStatistics(pos, neg, mean, maximum, scale)`, (N,) each: float64 for float64 inputs, else float32. Gradients
        flow through `pos` and `neg` to the embeddings and the temperature, once; the others have none. `scale` is
        `1 / sum_j exp(s_ij - maximum_i)`, with which a probability is `exp(s_ij - maximum_i) scale_i` to the last
        digit. A row that `target` ignores has pos 0; one without negatives has neg and maximum -inf, mean and scale 0.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.
    """
    options = call_options(backend, workspace_limit, distributed=distributed)
    temperature = gather.shared(options.call, temperature)
    problem = of_keys(
        query, key, negative_keys, temperature, negative_mode, symmetric=columns, normalize=normalize,
        in_batch_negatives=in_batch_negatives, ignore_index=ignore_index, target=target, query_ids=query_ids,
        key_ids=key_ids, negative_ids=negative_ids, key_bias=key_bias, negative_bias=negative_bias,
        positive_bias=positive_bias, negative_index=negative_index, names=("key", "columns", "negative_keys"),
    )  # fmt: skip
    met = None if options.call is None else meet(problem, options)
    if met is not None and block.fits(problem, options):
        found = in_block(problem, options, met, full=True)
    else:
        problem, context = widened(problem) if problem.apart and met is None else across(problem, options, met=met)
        with context:
            found = contrast.statistics(problem, options, full=True)
    rows = _natural(found.rows, options)
    return rows if found.columns is None else Statistics(rows, _natural(found.columns, options))


def _natural(rows: RowStatistics, options: Options) -> RowStatistics:
    """Return statistics whose maximum is a logit; backends hold it in base 2, and 0 where there are no negatives."""
    neg = rows.neg.detach()
    if options.call is not None:
        rows = rows._replace(pos=gather.rows(options.call, rows.pos), neg=gather.rows(options.call, rows.neg))
    lost = neg.isnan() | (neg == -torch.inf)  # a kernel's maximum passes over NaN
    return rows._replace(maximum=torch.where(lost, neg, rows.maximum * LN2))
