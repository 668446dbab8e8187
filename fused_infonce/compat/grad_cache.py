"""`GradCache` of luyug/GradCache (March 2024) on the engine of `fused_infonce.cached`.

https://github.com/luyug/GradCache is not imported. Names, arguments, what is split and how models are called are the
original's, and so are gradients and the returned loss. A subclass may override `split_inputs`, `model_call`, `get_reps`
and `compute_loss`. Known differences:

- Under `DistributedDataParallel` gradients are reduced once a step, after all chunks, with or without
  `no_sync_except_last`, and ranks may have other numbers of chunks. In a model's `no_sync()` they are not reduced.
- The random numbers of every device are restored, and autocast as it was around the call.
- A chunk whose representations differ between the two passes raises RuntimeError; there its gradients are wrong.
- A model without trainable parameters runs once; there it raises an error.
- Inputs that require gradients raise ValueError, unless `split_input_fn` splits them.
- A pair (list, dictionary) of which one is empty is split; there it raises ValueError.
- The first pass copies representations: the outputs that they are views of do not stay in memory.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..wrappers.cached import Tower, embeddings
from ..wrappers.chunks import Batch

__all__ = ["GradCache"]


class GradCache:
    """A step that leaves in `.grad` the gradients of a loss of large batches, which models encode chunk by chunk.

    Args:
        models: the encoders; one may come twice.
        chunk_sizes: rows of a chunk, or a list of one number a model.
        loss_fn: a function of the representations of all models and of keyword arguments: any loss of this package.
        split_input_fn: a function of a model's input and its chunk size that returns a list of chunks.
        get_rep_fn: the representations in a model's output; None: the output itself.
        fp16: use autocast to float16 on CUDA, and `scaler`, for models and loss.
        scaler: a `GradScaler`, whose `step` and `update` are the caller's.

    Example:
        >>> cache = GradCache([query_encoder, document_encoder], 64, FusedInfoNCELoss(0.05))
        >>> loss = cache(queries, documents)
    """

    def __init__(
        self,
        models: Sequence[Callable[..., Any]],
        chunk_sizes: int | Sequence[int],
        loss_fn: Callable[..., Tensor],
        split_input_fn: Callable[[Any, int], Any] | None = None,
        get_rep_fn: Callable[..., Tensor] | None = None,
        fp16: bool = False,
        scaler: Any = None,
    ):
        if fp16 and scaler is None:
            raise AssertionError("fp16 needs a scaler, got None")
        self.models = models
        self.chunk_sizes = [chunk_sizes] * len(models) if isinstance(chunk_sizes, int) else chunk_sizes
        self.loss_fn = loss_fn
        self.split_input_fn = split_input_fn
        self.get_rep_fn = get_rep_fn
        self.fp16 = fp16
        self.scaler = scaler

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return `cache_step(*args, **kwargs)`."""
        return self.cache_step(*args, **kwargs)

    def cache_step(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Tensor:
        """Add the gradients of the loss of these inputs, one for each model, to `.grad`, and return it detached.

        Args:
            no_sync_except_last: with it every model must be a `DistributedDataParallel`, or AssertionError is raised.
            loss_kwargs: arguments of `loss_fn`.
        """
        if no_sync_except_last and not all(isinstance(x, DistributedDataParallel) for x in self.models):
            raise AssertionError("no_sync_except_last needs models that are all DistributedDataParallel")
        towers = [
            Tower(model, lambda inner, chunk: self.get_reps(self.model_call(inner, chunk)), self.split_inputs(x, size))
            for model, x, size in zip(self.models, model_inputs, self.chunk_sizes, strict=True)
        ]
        representations = embeddings(towers)
        with self._autocast():
            loss = self.compute_loss(*representations, **loss_kwargs)
        (self.scaler.scale(loss) if self.fp16 else loss).backward()
        return loss.detach()

    def split_inputs(self, model_input: Any, chunk_size: int) -> Sequence[Any]:
        """Return the chunks of a model's input, which is as `model_call` takes it and of tensors alone.

        Any other input is a NotImplementedError, as in the original: it is for `split_input_fn`, or a method of one's
        own, to split.
        """
        if self.split_input_fn is not None:
            return list(self.split_input_fn(model_input, chunk_size))
        parts = model_input if _is_args_and_kwargs(model_input) else [model_input]
        if not all(_is_of_tensors(x) for x in parts):
            raise NotImplementedError(
                f"split_input_fn is needed to split an input of type {type(model_input).__name__}"
            )
        return Batch("the model's inputs", model_input, chunk_size, None)

    def model_call(self, model: Callable[..., Any], model_input: Any) -> Any:
        """Return a model's output for a tensor, a list, a dictionary of arguments, or a pair (list, dictionary).

        Any other input is a NotImplementedError, as in the original: a subclass overrides this method to take it.
        """
        with self._autocast():
            if isinstance(model_input, Tensor):
                return model(model_input)
            if isinstance(model_input, list):
                return model(*model_input)
            if isinstance(model_input, (dict, UserDict)):
                return model(**model_input)
            if _is_args_and_kwargs(model_input):
                return model(*model_input[0], **model_input[1])
        raise NotImplementedError(f"model_call takes no input of type {type(model_input).__name__}")

    def get_reps(self, model_out: Any) -> Tensor:
        """Return the representations in a model's output."""
        return model_out if self.get_rep_fn is None else self.get_rep_fn(model_out)

    def compute_loss(self, *reps: Tensor, **loss_kwargs: Any) -> Tensor:
        """Return the loss of the representations of all models."""
        return self.loss_fn(*reps, **loss_kwargs)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda") if self.fp16 else nullcontext()


def _is_args_and_kwargs(x: Any) -> bool:
    return isinstance(x, tuple) and [type(part) for part in x] == [list, dict]


def _is_of_tensors(x: Any) -> bool:
    items = x.values() if isinstance(x, (dict, UserDict)) else x if isinstance(x, list) else [x]
    return all(isinstance(item, Tensor) for item in items)
