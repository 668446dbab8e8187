"""Matryoshka representation learning: a loss of whole embeddings and of their prefixes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed import of_module
from ..losses.base import Explained
from ..losses.global_contrastive import GlobalContrastiveLoss
from ..losses.moco import MoCoLoss

# Arguments of this package's losses that are not embeddings, or not those of the model in training.
KEPT = frozenset({
    "temperature", "teacher_temperature", "logit_scale", "logit_bias", "tau_plus", "weight", "positive_weight", "mask",
    "key_bias", "negative_bias", "image_bias", "text_bias", "teacher_scores", "teacher_query", "teacher_key",
    "guide_query", "guide_key", "guide_negatives",
})  # fmt: skip


class MatryoshkaLoss(Explained):
    """A loss at several lengths of the embeddings, so that their first components alone are embeddings too.

        loss = sum_k w_k l(x[..., :d_k])

    where x are all embeddings that l takes. They are the floating tensors of two dimensions or more, also in lists,
    tuples and dictionaries, whose last dimensions must all be one D, but for those in arguments named

        temperature, teacher_temperature, logit_scale, logit_bias, tau_plus, weight, positive_weight, mask,
        teacher_scores, teacher_query, teacher_key, guide_query, guide_key, guide_negatives

    and in `keep`, which l gets as they are, as it gets everything else. An argument has the name that l's signature
    gives it, also where it is passed by position. `SupConLoss` flattens features of more than three dimensions: here
    they must be flat.

    A prefix is a view of its embeddings, and this module copies none. A prefix of a unit vector is not a unit vector,
    so that l must normalise: `ClipLoss` and `SigLipLoss` want `normalize=True` here.

    Args:
        loss: l, a module, whose parameters are then this one's too, or a function; it returns a tensor of any shape.
            Not `MoCoLoss`: its queue takes each batch once, and whole. For MoCo's loss let l be
            `lambda query, key, negatives: moco_loss(query, key, negatives.T)`, call it with `moco.queue.T`, and then
            `moco.enqueue(key)`. Nor `GlobalContrastiveLoss`, whose estimates are of embeddings of one length.
        dims: the d_k, none above D. They are used from the largest to the smallest. With D among them the whole
            embeddings are trained too.
        weights: the w_k, one for each of `dims`; None: all 1.
        n_dims_per_step: how many of `dims`, drawn anew for each call from torch's default generator, make up a loss;
            -1, or as many as there are: all. Losses over several processes need one seed in all of them.
        keep: names of more arguments that are not embeddings.

    Raises:
        ValueError: no dims, dims below 1 or above D, embeddings of different lengths, or none among the arguments;
            weights that are negative, not finite or not as many. TypeError: types.

    References: Kusupati et al. 2022, arXiv:2205.13147; sentence-transformers' `MatryoshkaLoss`.

    Example:
        >>> loss = MatryoshkaLoss(FusedInfoNCELoss(temperature=0.05), dims=[128, 64, 32])
        >>> query, key = torch.randn(16, 128, requires_grad=True), torch.randn(16, 128)
        >>> loss(query, key).backward()
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        n_dims_per_step: int = -1,
        *,
        keep: Sequence[str] = (),
    ):
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss must be a module or a function, got {type(loss).__name__}")
        if isinstance(loss, nn.Module) and any(isinstance(module, MoCoLoss) for module in loss.modules()):
            raise TypeError("loss must not be a MoCoLoss, whose queue holds whole keys: see MatryoshkaLoss")
        if isinstance(loss, nn.Module) and any(isinstance(module, GlobalContrastiveLoss) for module in loss.modules()):
            raise TypeError("loss must not be a GlobalContrastiveLoss, whose estimates are of embeddings of one length")
        if isinstance(keep, str) or not isinstance(keep, Sequence):
            raise TypeError(f"keep must be a sequence of names, got {type(keep).__name__}")
        pairs = sorted(zip(_dims(dims), _weights(weights, dims), strict=True), key=lambda pair: -pair[0])
        self.loss = loss
        self.dims = tuple(dim for dim, _ in pairs)
        self.weights = tuple(weight for _, weight in pairs)
        self.n_dims_per_step = checks.whole("n_dims_per_step", n_dims_per_step, -1)
        if n_dims_per_step == 0:
            raise ValueError("n_dims_per_step must be 1 or more, or -1 for all, got 0")
        self.kept = KEPT | set(keep)
        self.names = _positional_names(loss)

    @property
    def distributed(self) -> Any:
        """The option of the loss whose rows are cut."""
        return getattr(self.loss, "distributed", False)

    @of_module
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the weighted sum of `loss` over the prefixes; the arguments are those of `loss`."""
        lengths: list[int] = []
        self._each(lambda x: lengths.append(x.shape[-1]), args, kwargs)
        self._check(lengths)
        total: Tensor | None = None
        for k in self._chosen():
            # A prefix is taken from the prefix before, so that its gradient is added at that shorter length.
            args, kwargs = self._each(partial(_prefix, dim=self.dims[k]), args, kwargs)
            value = self.loss(*args, **kwargs)
            if not isinstance(value, Tensor):
                raise TypeError(f"loss must return a tensor, got {type(value).__name__}")
            value = self.weights[k] * value
            total = value if total is None else total + value
        assert total is not None
        return total

    def _check(self, lengths: Sequence[int]) -> None:
        if not lengths:
            raise ValueError("no argument of the loss is an embedding: floating, of shape (..., D), and not kept")
        if len(set(lengths)) > 1:
            raise ValueError(
                f"embeddings must have one number of components, got {sorted(set(lengths))}: "
                "name in `keep` the arguments that are no embeddings"
            )
        if self.dims[0] > lengths[0]:
            raise ValueError(f"dims must be up to {lengths[0]}, the components of the embeddings, got {self.dims[0]}")

    def _chosen(self) -> Sequence[int]:
        count = len(self.dims)
        if not 0 < self.n_dims_per_step < count:
            return range(count)
        return sorted(torch.randperm(count)[: self.n_dims_per_step].tolist())

    def _each(self, function: Callable[[Tensor], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments with every embedding x replaced by `function(x)`."""

        def within(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value) if value.dim() > 1 and value.is_floating_point() else value
            if isinstance(value, dict):
                return {name: x if name in self.kept else within(x) for name, x in value.items()}
            if isinstance(value, (list, tuple)):
                items = [within(x) for x in value]
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            return value

        kept = [i < len(self.names) and self.names[i] in self.kept for i in range(len(args))]
        return [arg if keep else within(arg) for arg, keep in zip(args, kept, strict=True)], within(kwargs)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, weights={self.weights}, n_dims_per_step={self.n_dims_per_step}"


def _prefix(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else x[..., :dim]


def _positional_names(loss: Callable[..., Tensor]) -> tuple[str, ...]:
    """Return the names of the arguments that may be passed by position; none where no signature can be read."""
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _dims(dims: Any) -> list[int]:
    if isinstance(dims, str) or not isinstance(dims, Sequence):
        raise TypeError(f"dims must be a sequence of integers, got {type(dims).__name__}")
    if not dims:
        raise ValueError("dims must hold one number or more, got none")
    return [checks.whole(f"dims[{i}]", dim, 1) for i, dim in enumerate(dims)]


def _weights(weights: Any, dims: Sequence[int]) -> list[float]:
    if weights is None:
        return [1.0] * len(dims)
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence of numbers or None, got {type(weights).__name__}")
    if len(weights) != len(dims):
        raise ValueError(f"weights must be {len(dims)} as dims are, got {len(weights)}")
    return [checks.not_negative(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
