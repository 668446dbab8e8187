"""The GPU of tests/gpu; where there is none, CPU tensors stand in for it, few of them, and Triton's interpreter."""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

from .helpers import COMPILED

DEVICE = torch.device("cuda" if COMPILED else "cpu")


def size(there: int, here: int) -> int:
    """Return a number of rows or components: `there` on a GPU, `here` in the interpreter."""
    return there if COMPILED else here


def captured(step: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """Return a function that replays a step, captured as a graph, and what holds its results.

    Without a GPU the step is computed again in place of a replay.
    """
    if not COMPILED:
        results = step()

        def again() -> None:
            for old, new in zip(tree_leaves(results), tree_leaves(step()), strict=True):
                old.detach().copy_(new.detach())

        return again, results
    on_a_stream(lambda: (step(), step()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


def on_a_stream(step: Callable[[], object]) -> object:
    """Return what a step gives on a stream of its own, on which long products come first."""
    if not COMPILED:
        return step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        keep_busy()
        results = step()
    torch.cuda.current_stream().wait_stream(stream)
    return results


def keep_busy(products: int = 20) -> None:
    """Launch products that take some milliseconds of a GPU, so that what does not wait for them would come too soon."""
    x = torch.ones(size(4096, 1), size(4096, 1), device=DEVICE)
    for _ in range(products):
        x = x @ x.T / len(x)


def synchronize() -> None:
    """Wait for the GPU."""
    if COMPILED:
        torch.cuda.synchronize()


def forbid_waiting(forbidden: bool) -> None:
    """Let whatever waits for the GPU raise, or not."""
    if COMPILED:
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
