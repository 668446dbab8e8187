"""What an encoder is given, a chunk of its rows at a time, and the embedding in what it returns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pick = str | int | Callable[[Any], Tensor]
MASK = "attention_mask"


class Chunk(NamedTuple):
    """The place of a chunk in a batch: its rows, and those columns of its tokens that are not padding in every row."""

    rows: slice
    columns: slice


class Batch(Sequence[Any]):
    """The inputs of an encoder in chunks of consecutive rows.

    A chunk is made of views, and anew whenever it is asked for: a model may write into the dictionary that it is given,
    and what it leaves there must not stay in memory.

    Args:
        name: what errors call the inputs.
        inputs: tensors, alone or in mappings, tuples, lists and dataclasses. N is the first dimension of the first
            tensor that has one, or where that is 1 of `attention_mask`. Tensors of N rows are split; everything else is
            in every chunk whole.
        chunk_size: rows of a chunk.
        tokens: rows times columns of a chunk in place of `chunk_size`; a row longer than that is a chunk of its own.
            Tensors that have the shape (N, L) of `attention_mask` first are cut to the columns that hold a token.

    Raises:
        ValueError: no tensor has rows, the first has one row and others have more, one requires a gradient, or `tokens`
        without an `attention_mask` (N, L).
    """

    def __init__(self, name: str, inputs: Any, chunk_size: int, tokens: int | None):
        found = list(tensors(inputs))
        mask, sizes = _named(inputs, MASK), [len(x) for x in found if x.dim() > 0]
        if not sizes:
            raise ValueError(f"{name} must hold a tensor whose first dimension is the rows, got {described(inputs)}")
        marked = isinstance(mask, Tensor) and mask.dim() > 0
        count = len(mask) if marked and sizes[0] == 1 else sizes[0]
        if not marked and count == 1 < max(sizes):
            raise ValueError(f"{name} must begin with a tensor that has all rows, got {described(inputs)}")
        if any(x.requires_grad for x in found):
            raise ValueError(f"{name} must not require gradients, which the parameters alone get: detach them")
        self.inputs, self.rows = inputs, count
        self.mask_shape: tuple[int, ...] | None = None
        if tokens is None:
            starts = range(0, max(count, 1), chunk_size)
            self.chunks = [Chunk(slice(start, min(start + chunk_size, count)), slice(None)) for start in starts]
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != count:
            came = described(mask) if mask is not None else described(inputs)
            raise ValueError(f"tokens needs an {MASK} of shape ({count}, L) in {name}, got {came}")
        self.mask_shape = tuple(mask.shape)
        self.chunks = _within(mask, tokens)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: Any) -> Any:
        chunk = self.chunks[index]

        def part(x: Tensor) -> Tensor:
            if x.dim() == 0 or len(x) != self.rows:
                return x
            return x[chunk.rows, chunk.columns] if x.shape[:2] == self.mask_shape else x[chunk.rows]

        return mapped(self.inputs, part)


def _within(mask: Tensor, tokens: int) -> list[Chunk]:
    """Return chunks of at most `tokens` rows times columns; reading the mask's rows synchronises once on a GPU."""
    count, length = mask.shape
    place = torch.arange(length, device=mask.device)
    seen = mask != 0
    # an extra column, so that rows of no columns have a least and a most
    ends = torch.nn.functional.pad(torch.where(seen, place + 1, 0), (1, 0)).amax(1)
    starts = torch.nn.functional.pad(torch.where(seen, place, length), (1, 0), value=length).amin(1)
    chunks: list[Chunk] = []
    first, left, right = 0, length, 0
    for row, (start, end) in enumerate(torch.stack([starts, ends], 1).tolist()):
        wider = min(left, start), max(right, end)
        if row > first and (row + 1 - first) * max(wider[1] - wider[0], 1) > tokens:
            chunks.append(_chunk(first, row, left, right))
            first, wider = row, (start, end)
        left, right = wider
    return [*chunks, _chunk(first, count, left, right)]


def _chunk(first: int, last: int, left: int, right: int) -> Chunk:
    """Return a chunk; of rows that hold no token at all it keeps the first column, since models want one."""
    return Chunk(slice(first, last), slice(left, right) if left < right else slice(0, 1))


def mapped(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return inputs with `function(x)` in place of every tensor x, in new containers: mappings become dictionaries."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: mapped(x, function) for name, x in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        items = [mapped(x, function) for x in inputs]
        return type(inputs)(*items) if hasattr(inputs, "_fields") else type(inputs)(items)
    if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        result = copy.copy(inputs)
        for name, x in _items(inputs):
            object.__setattr__(result, name, mapped(x, function))  # also where the dataclass is frozen
        return result
    return inputs


def tensors(inputs: Any) -> Iterator[Tensor]:
    """Yield the tensors of inputs, those of a container in its order."""
    if isinstance(inputs, Tensor):
        yield inputs
    for _, x in _items(inputs):
        yield from tensors(x)


def _items(inputs: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (name, value) of what a container holds; nothing where it is none."""
    if isinstance(inputs, Mapping):
        yield from inputs.items()
    elif isinstance(inputs, (list, tuple)):
        yield from enumerate(inputs)
    elif dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        yield from ((field.name, getattr(inputs, field.name)) for field in dataclasses.fields(inputs))


def _named(inputs: Any, name: str) -> Any:
    """Return the first value of that name, at any depth, or None."""
    for key, value in _items(inputs):
        found = value if key == name else _named(value, name)
        if found is not None:
            return found
    return None


def called(model: Callable[..., Any], inputs: Any) -> Any:
    """Return a model's output for inputs, given by name where they are a mapping, by position in a tuple or list."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (list, tuple)) else model(inputs)


def picked(output: Any, pick: Pick | None, where: str) -> Tensor:
    """Return the embedding in an output; `where` is what errors call the model."""
    if callable(pick):
        embedding = pick(output)
    elif pick is None or isinstance(output, Tensor):
        embedding = output
    else:
        try:
            by_name = isinstance(pick, str) and not isinstance(output, Mapping)
            embedding = getattr(output, str(pick)) if by_name else output[pick]
        except (KeyError, IndexError, AttributeError, TypeError):
            raise TypeError(f"{where} returned no {pick!r}, which pick names: got {described(output)}") from None
    if not isinstance(embedding, Tensor):
        chosen = "what pick chooses" if pick is not None else "without pick, the output"
        raise TypeError(f"{where}: {chosen} must be a tensor of embeddings, got {described(embedding)}")
    if embedding.dim() == 0 or not embedding.is_floating_point():
        raise TypeError(f"{where}: embeddings must be floating, (rows, ...), got {described(embedding)}")
    return embedding


def described(value: Any) -> str:
    """Return what a value is in words, with the names and shapes of what it holds."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    items = [f"{name}: {described(x)}" for name, x in _items(value)]
    return f"{type(value).__name__} of {{{', '.join(items)}}}" if items else type(value).__name__
