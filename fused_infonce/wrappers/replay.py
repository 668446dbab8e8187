"""How a forward pass is made again: with the random numbers and the autocast that it had, and checked to be equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..backends.precision import accumulator


class Random:
    """The states of PyTorch's generators now: the CPU's, and that of every device of an accelerator in use."""

    def __init__(self) -> None:
        there = torch.accelerator.current_accelerator()
        device: Any = None if there is None else torch.get_device_module(there)
        in_use = device is not None and getattr(device, "is_initialized", lambda: True)()
        self.kind = there.type if there is not None and in_use else None
        self.cpu = torch.get_rng_state()
        self.states = [device.get_rng_state(i) for i in range(device.device_count())] if in_use else []

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Draw from these states inside, and leave the generators as they were."""
        kind = self.kind or "cuda"  # which without states is not asked; torch 2.9 wants a name
        with torch.random.fork_rng(range(len(self.states)), device_type=kind):
            torch.set_rng_state(self.cpu)
            for i, state in enumerate(self.states):
                torch.get_device_module(self.kind).set_rng_state(state, i)
            yield


class Autocast:
    """The state of autocast now, on the CPU and the accelerator."""

    def __init__(self) -> None:
        there = torch.accelerator.current_accelerator()
        kinds = ("cpu",) if there is None else ("cpu", there.type)
        cache = torch.is_autocast_cache_enabled()
        self.kinds = {
            kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache)
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        }

    @contextmanager
    def again(self) -> Iterator[None]:
        """Bring the state back, without the casts of weights that an autocast around this may have kept.

        In torch 2.9 and 2.10 those made without a graph are used with one too, and the weights get no gradient.
        """
        with ExitStack() as stack:
            for kind, options in self.kinds.items():
                stack.enter_context(torch.autocast(kind, *options))
            torch.clear_autocast_cache()
            yield

    def dtypes(self, kind: str) -> list[torch.dtype]:
        """Return the dtype of products on a device, in a list that is empty where autocast is off."""
        dtype, enabled, _ = self.kinds.get(kind, (torch.float32, False, True))
        return [dtype] if enabled else []


class Differences:
    """The relative differences between the embeddings of two passes, in the Frobenius norm of a chunk.

    Rounding may differ, for without a graph PyTorch takes other kernels for some layers: by up to 1.7 eps after 24 of
    its transformer layers on a CPU. Dropout from another generator, or other weights, change the first digits. So two
    thirds of the digits of the dtype that the model computes in must agree, eps^(2/3): 2.4e-5 in float32, 1e-2 in
    float16 and TF32, 4e-2 in bfloat16.
    """

    def __init__(self, autocast: Autocast) -> None:
        self.autocast = autocast
        self.found: list[tuple[str, float, Tensor]] = []

    def add(
        self, place: tuple[int, int, Sequence[int]], now: Tensor, before: Tensor, weights: Iterable[torch.dtype]
    ) -> None:
        """Take the embeddings of a chunk; nothing is read from a GPU yet.

        Args:
            place: the tower, its chunk, and the rows of each of its chunks.
            weights: the dtypes of the tower's parameters.
        """
        tower, k, sizes = place
        start = sum(sizes[:k])
        where = f"tower {tower + 1}, chunk {k + 1} (rows {start} to {start + sizes[k] - 1})"
        if now.shape != before.shape:
            raise RuntimeError(_said(where, f"its embeddings are {tuple(now.shape)} and were {tuple(before.shape)}"))
        dtypes = [now.dtype, *weights, *self.autocast.dtypes(now.device.type)]
        if now.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
            dtypes.append(torch.float16)  # as many digits as TF32
        bound = max(torch.finfo(dtype).eps for dtype in dtypes) ** (2 / 3)
        wide = accumulator(now.dtype)
        error, norm = (torch.linalg.vector_norm(x, dtype=wide) for x in (now - before, before))
        tiny = torch.finfo(wide).tiny
        # A chunk that was NaN says nothing; one that is NaN now has a difference of NaN.
        self.found.append((where, bound, torch.where(norm.isfinite(), error / norm.clamp(min=tiny), 0.0)))

    def check(self) -> None:
        """Raise RuntimeError for the first chunk that differs by more than rounding; it synchronises."""
        if not self.found:
            return
        device = self.found[0][2].device
        errors = torch.stack([error.to(device, torch.float64) for *_, error in self.found])
        for (where, bound, _), error in zip(self.found, errors.tolist(), strict=True):
            if not error <= bound:
                raise RuntimeError(
                    _said(where, f"its embeddings differ by {error:.1e} of their norm, more than {bound:.1e}")
                )


def _said(where: str, what: str) -> str:
    return (
        f"{where} was not the same in the backward as in the forward: {what}. Did a parameter, a buffer or an input "
        "change in between, or does the model draw from a generator that is not PyTorch's own? check=False ignores it"
    )
