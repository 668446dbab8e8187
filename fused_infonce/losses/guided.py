"""InfoNCE without suspected false negatives: those that a guide finds more similar to the query than its positive."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import checks, contrast
from ..backends import BackendName, Options, Reduction
from ..backends.contract import KeySet, Problem
from ..backends.indexing import slices
from ..backends.precision import accumulator, all_wide, cast, product_dtype, statistics_dtype, without_autocast
from ..backends.recording import record_together
from ..backends.row_losses import infonce
from ..compose.across import across, unique
from ..compose.arguments import NEGATIVE_MODES, NegativeMode, all_ids, call_options, key_embeddings, temperature_of
from ..compose.reduction import reduced, reduced_mean
from ..compose.rows import dots, log_add, unit
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss

MarginStrategy = Literal["absolute", "relative"]
MARGINS: tuple[MarginStrategy, ...] = get_args(MarginStrategy)
Guides = tuple[Tensor, Tensor, Tensor | None]  # of queries, keys and the negatives that may be left out


@together
def guided_info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.01,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
    *,
    guide_query: Tensor | None = None,
    guide_key: Tensor | None = None,
    guide_negatives: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    margin: float = 0.0,
    margin_strategy: MarginStrategy = "absolute",
    spare_negatives: bool = False,
    contrast_queries: bool = False,
    contrast_keys: bool = False,
    offset: int = 0,
    normalize: bool = True,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
) -> Tensor:
    """InfoNCE over the negatives that a guide does not take for positives.

        loss_i = -log( exp(s_i,y) / (exp(s_i,y) + sum_j exp(s_ij)) ),    s_ij = cos(q_i, k_j) / t_i,  y = offset + i

    over the negatives j with g_ij <= c_i, where g are the cosines of the guide's embeddings and

        "absolute"   c_i = g_i,y + margin                "relative"   c_i = g_i,y + margin |g_i,y|

    The guide's N x M scores are never held either. Cosines that equal c_i but for their rounding are kept: a duplicate
    of the positive is not left out at a margin of 0, only at a negative one, or by its id.

    Args:
        query: (N, D), float16, bfloat16, float32 or float64.
        positive_key: (M, D), row `offset + i` the positive of query i; M > N where they were gathered from other
            processes.
        negative_keys, negative_mode: explicit negatives besides the in-batch ones: (M', D), "unpaired", shared by all
            queries, or (N, H, D), "paired", each query's own.
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per query; gradients
            flow to tensors.
        reduction: "mean", "sum" or "none" (one value per query).
        guide_query, guide_key, guide_negatives: (N, D'), (M, D') and, as `negative_keys` but for its last dimension,
            embeddings of the same texts from a guide model, all of one D' and dtype; float64 exactly if `query` is.
            They get no gradient; a NaN among them leaves nothing out. On a GPU 16 bits are far faster than 32. None:
            the embeddings themselves are the guide, as they are now and as the products see them; needs `normalize`.
        key_ids, negative_ids: (M,) and, as `negative_keys` without its last dimension, integer ids. A negative with the
            id of the row's positive is left out, with `contrast_queries` also a query whose positive has it.
        margin: a number; below 0 negatives are left out that are somewhat less similar than the positive.
        margin_strategy: "absolute" or "relative".
        spare_negatives: `negative_keys` are never left out.
        contrast_queries: the other queries are negatives of a query too, where the guide lets them.
        contrast_keys: cos(k_y, k_j) / t_i, of the positive with other keys j, are logits of negatives too, where
            g(k_y, k_j) <= c_i.
        offset: the row of the first query's positive.
        normalize: divide every row by max(norm, 1e-12) first. The guide's rows always are.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: GISTEmbed (Solatorio 2024, arXiv:2402.16829), which has `contrast_queries` and `contrast_keys`; with its
    own embeddings as the guide and a margin of 0.1, Qwen3-Embedding (Zhang et al. 2025, arXiv:2506.05176).
    """
    checks.one_of("margin_strategy", margin_strategy, MARGINS)
    checks.one_of("negative_mode", negative_mode, NEGATIVE_MODES)
    options = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(options.call, temperature)
    key_embeddings(query, positive_key, negative_keys, negative_mode, targets=True)
    n, m = len(query), len(positive_key)
    if checks.whole("offset", offset, 0) + n > m:
        raise ValueError(f"positive_key must have {offset + n} rows or more, offset={offset} and {n} queries, got {m}")
    margin = checks.finite("margin", margin)
    _, key_ids, negative_ids = all_ids(
        None, key_ids, negative_ids, query, positive_key, negative_keys, keys_are_negatives=True
    )
    guides = _guides(
        query, positive_key, negative_keys, guide_query, guide_key, guide_negatives, normalize, spare_negatives
    )
    if options.call is not None and guide_query is None:
        options.call.own_guide = True
        options.call.noted += " a guide of the rows themselves;"
    t, dtype = temperature_of(temperature, query), statistics_dtype(query)
    own = slice(offset, offset + n)
    ceiling = _ceiling(guides[0], guides[1][own], margin, margin_strategy, dtype)
    context: AbstractContextManager[Any] = nullcontext()
    if contrast_queries or contrast_keys:  # rows that take part twice have their 16-bit gradients added in float32
        tensors = [query, positive_key, *([] if negative_keys is None else [negative_keys])]
        (query, positive_key, *rest), context = all_wide(tensors)
        negative_keys = rest[0] if rest else None
    index = torch.arange(offset, offset + n, device=query.device)
    row_ids = unique(index, options) if key_ids is None else key_ids[index]
    keys = [KeySet(positive_key, key_ids, guides[1])]
    if contrast_queries:
        keys.append(KeySet(query, row_ids, guides[0]))
    if negative_keys is not None:
        limit = options.limit(query.device)
        keys.append(_negatives(negative_keys, negative_ids, guides, ceiling, row_ids, limit))
    problem = Problem(
        KeySet(query, row_ids, guides[0]), tuple(keys), t, index, ceiling=ceiling, normalize=normalize
    )  # fmt: skip
    with context:
        if not contrast_keys:
            return reduced(problem, options, "infonce")
        ids = unique(torch.arange(m, device=query.device), options) if key_ids is None else key_ids
        others = Problem(
            KeySet(positive_key[own], row_ids, guides[1][own]), (KeySet(positive_key, ids, guides[1]),), t,
            torch.full_like(index, -1), ceiling=ceiling, normalize=normalize,
        )  # fmt: skip
        return reduced_mean(_joined(problem, others, options), options)


def _joined(problem: Problem, others: Problem, options: Options) -> Tensor:
    """Return the (N,) losses of a problem whose rows have the negatives of `others` too."""
    problem, products = across(problem, options)
    with products:
        rows = contrast.statistics(problem, options).rows
    others, products = across(others, options)
    with products:
        neg = contrast.statistics(others, options).rows.neg
    record_together()
    return infonce(log_add(rows.neg, neg) - rows.pos)


def _negatives(
    rows: Tensor, ids: Tensor | None, guides: Guides, ceiling: Tensor, row_ids: Tensor, limit: int
) -> KeySet:
    """Return explicit negatives; paired ones that the guide leaves out get the ids of their queries."""
    if rows.dim() == 2 or guides[2] is None:
        return KeySet(rows, ids, guides[2])
    rejected = _rejected(guides[0], guides[2], ceiling, limit)
    other = (row_ids ^ 1)[:, None].expand_as(rejected) if ids is None else ids
    return KeySet(rows, torch.where(rejected, row_ids[:, None], other))


@torch.no_grad()
def _rejected(query: Tensor, negatives: Tensor, ceiling: Tensor, limit: int) -> Tensor:
    """Return a mask (N, H) of the queries' own negatives that the guide leaves out, made within `limit` bytes."""
    n, h, d = negatives.shape
    rejected = torch.zeros((n, h), dtype=torch.bool, device=query.device)
    if contrast.is_explaining():
        return rejected
    step = limit // max(6 * h * d * ceiling.element_size(), 1)  # for a copy, squares, unit rows
    with without_autocast(query.device.type):
        for rows in slices(n, step):
            x, y = unit(query[rows], True, ceiling.dtype), unit(negatives[rows], True, ceiling.dtype)
            rejected[rows] = torch.bmm(y, x[:, :, None])[..., 0] > ceiling[rows, None]
    return rejected


@torch.no_grad()
def _ceiling(query: Tensor, key: Tensor, margin: float, strategy: str, dtype: torch.dtype) -> Tensor:
    """Return the (N,) cosines above which a negative is left out.

    They are raised by what the rounding of a cosine and of itself, added in another order, may differ by.
    """
    with without_autocast(query.device.type):
        positive = dots(unit(query, True, dtype), unit(key, True, dtype))
    allowed = margin * positive.abs() if strategy == "relative" else margin
    tf32 = dtype == torch.float32 and query.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    eps = 2.0**-13 if tf32 else torch.finfo(dtype).eps
    return (positive + allowed + eps * max(8, query.shape[1] // 64)).contiguous()


def _guides(
    query: Tensor, key: Tensor, negatives: Tensor | None, guide_query: Any, guide_key: Any, guide_negatives: Any,
    normalize: bool, spare: bool,
) -> Guides:  # fmt: skip
    """Return the guide's embeddings of queries, keys and the negatives that it may leave out, checked and detached."""
    if guide_negatives is not None and (negatives is None or spare):
        why = "spare_negatives=True" if spare else "no negative_keys were given"
        raise ValueError(f"guide_negatives have no effect: {why}")
    if guide_query is None and guide_key is None and guide_negatives is None:
        if not normalize:
            raise ValueError("a margin is of cosines: without normalize pass guide_query and guide_key")
        dtype = product_dtype(query)
        rows = [cast(x.detach(), dtype)[0] for x in (query, key)]
        return rows[0], rows[1], None if negatives is None or spare else cast(negatives.detach(), dtype)[0]
    wanted = {"guide_query": (guide_query, query), "guide_key": (guide_key, key)}
    if negatives is not None and not spare:
        wanted["guide_negatives"] = (guide_negatives, negatives)
    rows = []
    for name, (guide, like) in wanted.items():
        if guide is None:
            raise ValueError(f"a guide needs {', '.join(wanted)}: {name} is missing")
        checks.embeddings(name, guide, like.dim(), "(N, H, D')" if like.dim() == 3 else "(N, D')")
        if guide.shape[:-1] != like.shape[:-1]:
            raise ValueError(
                f"{name} must have shape {tuple(like.shape[:-1])} but for its last dimension, got {tuple(guide.shape)}"
            )
        if guide.shape[-1] != guide_query.shape[-1]:
            raise ValueError(
                f"{name} must have {guide_query.shape[-1]} components as guide_query has, got {guide.shape[-1]}"
            )
        checks.on(name, guide, query.device)
        if guide.dtype != guide_query.dtype or accumulator(guide.dtype) != accumulator(query.dtype):
            raise TypeError(
                f"{name} must be of one dtype with guide_query, and float64 exactly if query is, got {guide.dtype} "
                f"with {guide_query.dtype} and {query.dtype}"
            )
        rows.append(guide.detach())
    return rows[0], rows[1], rows[2] if len(rows) == 3 else None


class GuidedInfoNCELoss(ContrastiveLoss):
    """InfoNCE without the negatives that a guide takes for positives, as a module.

    The function `guided_info_nce` has the formula. Without a guide's embeddings the embeddings are their own guide.

    Args:
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per query).
        negative_mode: "unpaired" (explicit negatives are shared by all queries) or "paired" (each query has its own).
        margin: how much more similar than the positive a negative may be, by the guide's cosines, to be kept.
        margin_strategy: "absolute" (a difference of cosines) or "relative" (a share of the positive's cosine).
        spare_negatives: never leave out explicit negatives.
        contrast_queries: the other queries are negatives of a query too, where the guide lets them.
        contrast_keys: similarities of a positive to other keys are logits of negatives too, where the guide lets them.
        normalize: divide every row by its norm first, so that scores are cosines.
        learnable_temperature: hold the (1,) parameter `logit_scale = log(1 / temperature)`, as CLIP does. Give
            `loss.parameters()` to the optimizer, without weight decay.
        max_logit_scale: the largest `1 / temperature` that `clamp_logit_scale_()` leaves (CLIP: 100); None: no bound.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch memory; None: 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.
        record: keep what the rows of the last call were made of in `recorded`: the positives' logits, and the
            logsumexps and mean logits of the negatives.

    Example:
        >>> loss = GuidedInfoNCELoss(temperature=0.02, margin=0.1)  # the embeddings are their own guide
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss(query, key).backward()
    """

    own = ("negative_mode", "margin", "margin_strategy", "spare_negatives", "contrast_queries", "contrast_keys")

    def __init__(
        self,
        temperature: TemperatureLike = 0.01,
        *,
        reduction: Reduction = "mean",
        negative_mode: NegativeMode = "unpaired",
        margin: float = 0.0,
        margin_strategy: MarginStrategy = "absolute",
        spare_negatives: bool = False,
        contrast_queries: bool = False,
        contrast_keys: bool = False,
        normalize: bool = True,
        learnable_temperature: bool = False,
        max_logit_scale: float | None = None,
        backend: BackendName = "auto",
        workspace_limit: int | None = None,
        distributed: DistributedLike = False,
        record: bool = False,
    ):
        super().__init__(
            temperature, learnable_temperature, max_logit_scale, reduction, normalize, backend, workspace_limit,
            distributed, record,
        )  # fmt: skip
        checks.one_of("negative_mode", negative_mode, NEGATIVE_MODES)
        checks.one_of("margin_strategy", margin_strategy, MARGINS)
        checks.flags(spare_negatives=spare_negatives, contrast_queries=contrast_queries, contrast_keys=contrast_keys)
        self.negative_mode = negative_mode
        self.margin = checks.finite("margin", margin)
        self.margin_strategy = margin_strategy
        self.spare_negatives = spare_negatives
        self.contrast_queries = contrast_queries
        self.contrast_keys = contrast_keys

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        guide_query: Tensor | None = None,
        guide_key: Tensor | None = None,
        guide_negatives: Tensor | None = None,
        key_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Return the loss of queries and keys, given a guide's embeddings of them; see `guided_info_nce` for shapes."""
        return guided_info_nce(
            query, positive_key, negative_keys, self.temperature, guide_query=guide_query, guide_key=guide_key,
            guide_negatives=guide_negatives, key_ids=key_ids, negative_ids=negative_ids, offset=offset, **self.options,
        )  # fmt: skip
