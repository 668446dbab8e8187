"""Gradient caching: a loss of a whole batch whose encoders hold the activations of a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import checks
from ..distributed import tell
from . import processes
from .chunks import Batch, Pick, called, picked
from .replay import Autocast, Differences, Random

Sync = Literal["mean", "none"]


def cached(
    criterion: Callable[..., Any],
    /,
    *towers: tuple[Callable[..., Any], Any],
    chunk_size: int | Sequence[int] = 64,
    pick: Pick | Sequence[Pick | None] | None = None,
    tokens: int | Sequence[int | None] | None = None,
    check: bool = True,
    progress: bool | str | None = None,
    sync: Sync = "mean",
    **criterion_arguments: Any,
) -> Any:
    """Return `criterion(*embeddings, **criterion_arguments)` with the encoders' memory bounded by that of a chunk.

    Every encoder runs twice over its inputs, a chunk of rows at a time: now without a graph, for the embeddings of the
    whole batch, and again in the backward, where each chunk receives the gradient of its embeddings. The gradients are
    those of `criterion(encode(model, inputs), ...)` over the same chunks, dropout included, at 4/3 of the time.

        cached(loss, (query_model, queries), (document_model, documents), pick="pooler_output").backward()

    Backward passes leave the gradients of models in their parameters' `.grad`. `torch.autograd.grad` with respect to
    parameters of a model does not reach them, and every call can be backpropagated once.

    Args:
        criterion: a loss of this package, or any function of embeddings. Its own parameters, and tensors among
            `criterion_arguments`, get their gradients as ever, and what it returns is returned as it is.
        towers: (model, inputs), one for each embedding that `criterion` takes. A model may be any callable and come
            twice. It is called as `model(**inputs)` for a mapping, `model(*inputs)` for a tuple or list, and otherwise
            `model(inputs)`. N is the first dimension of the first tensor, or where that is 1 of `attention_mask`;
            tensors with N rows are split, at any depth, and everything else is passed whole. A model of
            sentence-transformers takes its dictionary by position: `(model, (features,))`, or a lambda. Models without
            trainable parameters run once.
        chunk_size: rows of a chunk; a sequence has one number a tower, as for `pick` and `tokens`.
        pick: the embedding in a model's output: a key or attribute, an index, or a function of the output. None, and
            outputs that are tensors: the output itself.
        tokens: chunks by rows times their longest text, read from the inputs' `attention_mask` (N, L), in place of
            `chunk_size`. Padding that all rows of a chunk share is cut off, left and right, from tensors (N, L, ...).
        check: compare the embeddings of both passes. A GPU synchronises for that once, in the backward.
        progress: show a bar (tqdm) over the chunks of each pass; a string is its description.
        sync: "mean" averages the gradients of `DistributedDataParallel` models over their ranks, once and after all
            chunks, unless this call is in their `no_sync()`; FSDP2 (`fully_shard`) reduces once, with the last chunk.
            "none" leaves gradients unreduced. To be recognised a wrapped model must be given itself, or in a `partial`:
            not in another function, and not by a method of what it wraps.

    Raises:
        RuntimeError, in the backward: a chunk's embeddings differ between the passes by more than rounding, no
            embedding has a graph, a second backward, or `create_graph=True`. TypeError, ValueError: arguments, or
            outputs without an embedding.

    References: GradCache, Gao et al. 2021, arXiv:2101.06983.
    """
    try:
        found = _embedded(criterion, towers, chunk_size, pick, tokens, check, progress, sync)
    except Exception as error:  # on the other ranks the criterion waits for this one's embeddings
        tell(criterion_arguments.get("distributed", getattr(criterion, "distributed", False)), error)
        raise
    return criterion(*found, **criterion_arguments)


def _embedded(
    criterion: Any, towers: Sequence[Any], chunk_size: Any, pick: Any, tokens: Any, check: Any, progress: Any, sync: Any
) -> tuple[Tensor, ...]:
    """Return the embeddings of the towers of a call of `cached`, whose arguments are checked."""
    if not callable(criterion):
        raise TypeError(f"criterion must be a loss or a function of embeddings, got {type(criterion).__name__}")
    checks.flags(check=check)
    checks.one_of("sync", sync, get_args(Sync))
    if not isinstance(progress, (bool, str, type(None))):
        raise TypeError(f"progress must be True, False or a description, got {type(progress).__name__}")
    if not towers:
        raise ValueError("cached needs towers (model, inputs), one for each embedding of the criterion, got none")
    count = len(towers)
    rows, picks, budgets = (
        _one_a_tower(name, value, count)
        for name, value in (("chunk_size", chunk_size), ("pick", pick), ("tokens", tokens))
    )
    made = [_tower(i + 1, *each) for i, each in enumerate(zip(towers, rows, picks, budgets, strict=True))]
    return embeddings(made, check=check, progress=progress, sync=sync)


@dataclass
class Tower:
    """An encoder and its batch.

    Attributes:
        model: the encoder as it was given.
        embed: its embeddings of a chunk: a function of the encoder without its `DistributedDataParallel`, and a chunk.
        chunks: what it is given, chunk by chunk.
    """

    model: Callable[..., Any]
    embed: Callable[[Callable[..., Any], Any], Tensor]
    chunks: Sequence[Any]

    def __post_init__(self) -> None:
        self.inner = processes.without_replicas(self.model)
        module = processes.module_of(self.model)
        parameters = [] if module is None else list(module.parameters())
        trained = any(x.requires_grad for x in [*parameters, *processes.given(self.model)])
        self.frozen = module is not None and not trained
        self.dtypes = {x.dtype for x in parameters if x.is_floating_point()}

    def __call__(self, k: int) -> Tensor:
        """Return the embeddings of chunk k. Where other ranks have more chunks than this one, the first comes again."""
        return self.embed(self.inner, self.chunks[k if k < len(self.chunks) else 0])


def embeddings(
    towers: Sequence[Tower], *, check: bool = True, progress: bool | str | None = None, sync: Sync = "mean"
) -> tuple[Tensor, ...]:
    """Return the embeddings of every tower, whose backward replays the towers chunk by chunk; see `cached`."""
    recorded = torch.is_grad_enabled() and not all(tower.frozen for tower in towers)
    root = torch.empty(0, requires_grad=recorded)  # what makes the embeddings part of a graph
    return _Embeddings.apply(root, _Passes(towers, check, progress, sync, recorded))


class _Embeddings(torch.autograd.Function):
    """The embeddings of all towers, and in the backward the gradients of the towers' parameters."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, passes: _Passes) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.passes = passes
        found = passes.encode()
        ctx.mark_non_differentiable(*(x for x, tower in zip(found, passes.towers, strict=True) if tower.frozen))
        ctx.save_for_backward(*(found if passes.check else ()))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("cached is differentiable once: call backward without create_graph=True")
        passes: _Passes | None = ctx.passes
        if passes is None:
            raise RuntimeError(
                "this call of cached has had its backward, which frees the inputs of its towers also with "
                "retain_graph=True: add up the losses and call backward once"
            )
        ctx.passes = None
        passes.replay(gradients, ctx.saved_tensors)
        return None, None


class _Passes:
    """The two passes of one call: `encode` in its forward, and `replay` in its backward.

    Args:
        recorded: whether there will be a backward.
    """

    def __init__(
        self, towers: Sequence[Tower], check: bool, progress: bool | str | None, sync: Sync, recorded: bool
    ):  # fmt: skip
        self.towers, self.progress, self.sync, self.recorded = towers, progress, sync, recorded
        self.check = check and recorded
        self.replicas = processes.replicas([tower.model for tower in towers]) if recorded else []
        # As in their own forward: what an outer no_sync() says now decides about the backward.
        self.averaged = [x for x in self.replicas if sync == "mean" and x.require_backward_grad_sync]
        self.autocast = Autocast()
        self.counts = [processes.agreed(tower.model, len(tower.chunks)) for tower in towers]
        self.sizes: list[list[int]] = [[] for _ in towers]  # rows of the embeddings of each chunk
        self.random: list[list[Random]] = [[] for _ in towers]  # before each chunk

    def encode(self) -> list[Tensor]:
        """Return the embeddings of every tower, without a graph."""
        parts: list[list[Tensor]] = [[] for _ in self.towers]
        with processes.unsynced(self.replicas):
            for i, k in self._shown("embeddings", range(len(self.towers))):
                tower, random = self.towers[i], Random()
                if k >= len(tower.chunks):
                    with random.fork():
                        tower(k)  # for the ranks that have more chunks, with whose forward it communicates
                    continue
                parts[i].append(tower(k).clone())  # it may be a view of an output many times as large
                self.sizes[i].append(len(parts[i][k]))
                self.random[i].append(random)
        if self.recorded:
            for model in self.replicas:
                processes.disarm(model, model in self.averaged)
        torch.clear_autocast_cache()  # of casts of weights without a graph: see Autocast.again
        return [torch.cat(own) for own in parts]

    def replay(self, gradients: Sequence[Tensor | None], found: Sequence[Tensor]) -> None:
        """Run every chunk again with a graph, and backpropagate its part of the gradients into the parameters."""
        parts = [() if x is None else x.split(sizes) for x, sizes in zip(gradients, self.sizes, strict=True)]
        before = [x.split(sizes) for x, sizes in zip(found, self.sizes, strict=False)]  # none without check
        used = [i for i, x in enumerate(gradients) if x is not None]  # those of frozen towers are None
        failure: Exception | None = None
        try:
            self._replay_all(used, parts, before)
        except Exception as error:
            if not self.averaged:
                raise
            failure = error  # raised where the other ranks hear of it
        if self.averaged:
            processes.average_later(self.averaged, failure)

    def _replay_all(
        self, used: Sequence[int], parts: Sequence[Sequence[Tensor]], before: Sequence[Sequence[Tensor]]
    ) -> None:
        differences, trained = Differences(self.autocast), False
        models = [self.towers[i].model for i in used for _ in range(self.counts[i])]
        with processes.unsynced(self.replicas), processes.held_back(models) as reduce:
            for n, (i, k) in enumerate(self._shown("gradients", used)):
                own = k < len(parts[i])
                with self.random[i][k if own else 0].fork(), self.autocast.again(), torch.enable_grad():
                    embedding = self.towers[i](k)
                if own and self.check:
                    place = i, k, self.sizes[i]
                    differences.add(place, embedding.detach(), before[i][k], self.towers[i].dtypes)
                if self.sync == "mean":
                    reduce(n)
                if embedding.requires_grad:
                    trained = True
                    embedding.backward(parts[i][k] if own else torch.zeros_like(embedding))
        differences.check()
        if self.check and used and not trained:
            raise RuntimeError(
                "the embeddings of no tower depend on a parameter that requires a gradient: does a model run under "
                "torch.no_grad()? Give a frozen model itself, not a function of it. check=False ignores it"
            )

    def _shown(self, what: str, towers: Sequence[int]) -> Iterable[tuple[int, int]]:
        """Return (tower, chunk) of every chunk of some towers, with a bar where one is wanted."""
        every = [(i, k) for i in towers for k in range(self.counts[i])]
        if not self.progress:
            return every
        try:
            from tqdm import tqdm
        except ImportError as why:
            raise ImportError("progress needs tqdm: pip install tqdm, or leave progress out") from why
        bar: Iterable[tuple[int, int]] = tqdm(every, what if self.progress is True else f"{self.progress}: {what}")
        return bar


def _one_a_tower(name: str, value: Any, count: int) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one for all towers, or one for each of {count}, got {len(value)}")
    return value


def _tower(number: int, tower: Any, chunk_size: Any, pick: Any, tokens: Any) -> Tower:
    """Return a tower of a user's arguments, with errors that call it by its number."""
    name = f"tower {number}"
    if not isinstance(tower, (tuple, list)) or len(tower) != 2 or not callable(tower[0]):
        raise TypeError(f"{name} must be a pair (model, inputs) with a callable model, got {type(tower).__name__}")
    if isinstance(pick, bool) or not (pick is None or isinstance(pick, (str, int)) or callable(pick)):
        raise TypeError(f"pick must be a name, an index, a function or None, got {type(pick).__name__}")
    checks.whole("chunk_size", chunk_size, 1)
    if tokens is not None:
        checks.whole("tokens", tokens, 1)
    model, inputs = tower
    batch = Batch(f"the inputs of {name}", inputs, chunk_size, tokens)
    return Tower(model, lambda inner, chunk: picked(called(inner, chunk), pick, name), batch)
