"""MoCo's loss with its queue of negatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, contrast
from ..backends import BackendName, Reduction, plan_of
from ..backends.contract import KeySet, Problem
from ..compose.arguments import call_options, temperature_of
from ..compose.biases import biases_of
from ..compose.reduction import closed_form, reduced
from ..compose.rows import unit
from ..distributed import DistributedLike, gather, together
from ..temperature.scale import TemperatureLike
from .base import ContrastiveLoss, Plans


@together
def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor = 0.07,
    reduction: Reduction = "mean",
    *,
    key_bias: Tensor | None = None,
    negative_bias: Tensor | None = None,
    normalize: bool = True,
    backend: BackendName = "auto",
    workspace_limit: int | None = None,
    distributed: DistributedLike = False,
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
        temperature: t, a positive number, a one-element tensor (on the CPU too), or (N,) or (N, 1) per row; gradients
            flow to tensors.
        reduction: "mean", "sum" or "none" (one value per query).
        key_bias, negative_bias: (N,) and (K,), floating, in nats: added to the logits of the keys and of the columns of
            the queue; gradients flow to both. -inf leaves a column out, and no key.
        normalize: divide every query, key and column of the queue by max(norm, 1e-12) first.
        backend: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (dense).
        workspace_limit: bytes of scratch beyond inputs and gradients; default 64 MiB on a CPU, 1/128 of a GPU's memory.
        distributed: whose rows make one batch: False (this process's), True (those of the default process group), a
            `ProcessGroup`, a one-dimensional `DeviceMesh`, or a `Distributed` with further options.

    Returns:
        A 0-d loss, or (N,) for "none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes, devices, modes, values. TypeError: types, dtypes. RuntimeError: a backend that cannot run.

    References: He et al. 2019, arXiv:1911.05722; https://github.com/facebookresearch/moco.
    """
    checks.embeddings("query", query, 2, "(N, D)")
    checks.embeddings("key", key, 2, "(N, D)")
    checks.embeddings("queue", queue, 2, "(D, K)")
    checks.same_kind({"query": query, "key": key, "queue": queue})
    if key.shape != query.shape:
        raise ValueError(f"key must have shape {tuple(query.shape)} as query has, got {tuple(key.shape)}")
    if queue.shape[0] != query.shape[1]:
        raise ValueError(
            f"queue must have {query.shape[1]} rows, the components of query, got {queue.shape[0]}: "
            f"it is the queue of a MoCoLoss(dim={queue.shape[0]}), and these embeddings need dim={query.shape[1]}"
        )
    checked = call_options(backend, workspace_limit, reduction, distributed)
    temperature = gather.shared(checked.call, temperature)
    negative_bias = gather.alike(checked.call, negative_bias)
    biases = biases_of(key_bias, negative_bias, True, query, key, queue.T, None, in_batch=False)
    negatives = KeySet(queue.detach().T, bias=biases.negative)
    problem = Problem(
        KeySet(query), (KeySet(key.detach()), negatives), temperature_of(temperature, query), offset=biases.offset,
        in_batch=False, normalize=normalize, bias_bound=biases.bound,
    )  # fmt: skip
    plan = plan_of(problem, checked, reduced=closed_form(problem, checked, None))
    if plan.gradients and not plan.one_pass and not contrast.is_explaining():  # a backward may follow an overwriting
        problem = replace(problem, keys=(problem.keys[0], negatives._replace(rows=negatives.rows.clone())))
    return reduced(problem, checked, "infonce", alike=[1])


class MoCoLoss(ContrastiveLoss):
    """MoCo's loss as a module that holds the queue of negatives.

    The function `moco_loss` has the formula. The buffers are those of MoCo and part of the state dict: `queue` (dim,
    queue_size) float32, a negative a column, random unit vectors at first, and `queue_ptr` (1,) int64, the column that
    is overwritten next. A column is contiguous in memory, so that the queue is used without a copy. The queue must have
    the embeddings' dtype (use `.to`) except under autocast. It gets no gradient, and the key is detached, as MoCo does.

    A batch need not divide the queue, as MoCo asserts: it wraps around, and of one larger than the queue the last
    `queue_size` keys stay. With `distributed` the keys of all ranks enter, in rank order, and the queue, whose first
    values are then drawn from a fixed seed, is the same on all of them. Without it each process enqueues what it is
    given.

    Args:
        dim: D, the components of an embedding.
        queue_size: K, the keys that the queue holds.
        temperature: t, a positive number, a tensor of one element or of one value per row, or a callable of no
            arguments, evaluated at every call. It may be assigned anew.
        reduction: "mean", "sum" or "none" (one value per query).
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
        >>> loss = MoCoLoss(128, queue_size=4096)
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss(query, key).backward()
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        dim: int,
        *,
        queue_size: int = 65536,
        temperature: TemperatureLike = 0.07,
        reduction: Reduction = "mean",
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
        checks.whole("dim", dim, 1)
        checks.whole("queue_size", queue_size, 1)
        self.register_buffer("queue", torch.empty(queue_size, dim, dtype=torch.float32).T)
        self.register_buffer("queue_ptr", torch.empty(1, dtype=torch.int64))
        self.reset_parameters()
        self.register_load_state_dict_post_hook(_columns_contiguous)

    def reset_parameters(self) -> None:
        """Start again: the queue from random unit vectors, a learnable temperature from where it began."""
        super().reset_parameters()
        rows = torch.empty_like(self.queue.T)
        if self.distributed is False:
            rows.normal_()
        else:  # the same on all ranks
            rows.copy_(torch.randn(rows.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu"))
        self.queue.copy_(F.normalize(rows).T)
        self.queue_ptr.zero_()

    def forward(
        self, query: Tensor, key: Tensor, *, enqueue: bool = True, key_bias: Tensor | None = None,
        negative_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the loss of (N, D) queries, each against its own key and the queue, and enqueue the keys.

        In training mode and with `enqueue` the keys take the place of the oldest in the queue; a backward that is still
        to come is not disturbed.
        """
        loss = moco_loss(
            query, key, self.queue, self.temperature, key_bias=key_bias, negative_bias=negative_bias, **self.options
        )
        if enqueue and self.training:
            self.enqueue(key)
        return loss

    def explain(self, *args: Any, **kwargs: Any) -> Plans:
        """Return how a call with these arguments would be computed, and leave the queue as it is."""
        return super().explain(*args, **kwargs | {"enqueue": False})

    @torch.no_grad()
    def enqueue(self, key: Tensor) -> None:
        """Overwrite the oldest columns of the queue with (B, D) keys, in place and without a synchronisation.

        With `normalize` keys are stored as unit vectors, without it as they come. With `distributed` every rank calls
        it with keys of its own, of which there may be none, and those of all enter.
        """
        key = _of_all(key, self.queue, distributed=self.distributed)
        size, count = self.queue.shape[1], len(key)
        kept = key[max(count - size, 0) :]
        if self.normalize:
            wide = torch.promote_types(key.dtype, torch.float32)  # squares of 16-bit components may exceed their range
            kept = unit(kept, True, wide)
        last = self.queue_ptr + count
        columns = (last + torch.arange(-len(kept), 0, device=key.device)) % size
        self.queue.T.index_copy_(0, columns, kept.to(self.queue.dtype))
        self.queue_ptr.copy_(last % size)

    def extra_repr(self) -> str:
        dim, size = self.queue.shape
        return f"{dim}, queue_size={size}, {super().extra_repr()}"


@together
def _of_all(key: Tensor, queue: Tensor, *, distributed: DistributedLike) -> Tensor:
    """Return keys that are to enter a queue, checked: with `distributed` those of all ranks."""
    checks.embeddings("key", key, 2, "(B, D)")
    dim = queue.shape[0]
    if key.shape[1] != dim:
        raise ValueError(f"key must have {dim} components, the dim of this loss, got {key.shape[1]}")
    checks.on("key", key, queue.device, "queue")
    call = call_options("auto", None, distributed=distributed).call
    if call is None:
        return key
    (counts,) = call.counts(f"(N, {dim}) keys of a queue, {key.dtype}", "", [len(key)])
    return gather.gather(call, [key.detach()], [counts])[0]


def _columns_contiguous(loss: nn.Module, _: Any) -> None:
    """Make the columns of a queue contiguous again after `load_state_dict(assign=True)`, which takes any layout."""
    if isinstance(loss, MoCoLoss) and not loss.queue.T.is_contiguous():
        loss.queue = loss.queue.T.contiguous().T
