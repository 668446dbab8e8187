"""Time and peak memory of one forward and backward of the loss, fused and dense, as the batch grows."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fused_infonce import FusedInfoNCELoss

Loss = Callable[[Tensor, Tensor], Tensor]

CONTESTANTS = ("fused", "dense")
WARM_UP_ROWS = 64
TIMING_SECONDS = 1.6
MIN_ROUNDS, MAX_ROUNDS = 3, 50
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    contestant: str
    batch: int
    dim: int
    milliseconds: float
    peak_mib: float | None  # beyond the inputs, gradients included; None where the system does not tell
    loss: float


def dense_info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """What everyone writes, and what info-nce-pytorch computes."""
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def make_loss(contestant: str, temperature: float) -> Loss:
    if contestant == "fused":
        return FusedInfoNCELoss(temperature=temperature)
    return lambda query, key: dense_info_nce(query, key, temperature)


def measure_costs(batches: list[int], dim: int, temperature: float, device: torch.device) -> list[Cost]:
    """Both contestants at every size. They must agree: a wrong result is not timed."""
    costs = []
    with tqdm(batches, desc="time and memory", unit="size", disable=None, file=sys.stderr) as bar:
        for batch in bar:
            losses, times = _interleaved_times(batch, dim, temperature, device)
            if abs(losses["fused"] - losses["dense"]) > 1e-4 * max(1.0, abs(losses["dense"])):
                raise RuntimeError(f"the losses differ at batch {batch}: {losses}")
            for contestant in CONTESTANTS:
                arguments = (contestant, batch, dim, temperature, str(device))
                peak = peak_memory(*arguments) if device.type == "cuda" else _in_fresh_process(*arguments)
                costs.append(Cost(contestant, batch, dim, times[contestant], peak, losses[contestant]))
    return costs


def peak_memory(contestant: str, batch: int, dim: int, temperature: float, device_name: str) -> float | None:
    """MiB that one forward and backward adds at its peak. On a CPU, for a fresh process: there the peak only grows."""
    device = torch.device(device_name)
    loss = make_loss(contestant, temperature)
    forward_backward(loss, *random_pairs(WARM_UP_ROWS, dim, device))
    query, key = random_pairs(batch, dim, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        before = _process_peak_bytes()
    forward_backward(loss, query, key)
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_peak_bytes()
    return None if before is None or after is None else (after - before) / MIB


def random_pairs(rows: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    query = torch.randn(rows, dim, generator=rng)
    key = query + 3.0 * torch.randn(rows, dim, generator=rng)
    return query.to(device).requires_grad_(), key.to(device).requires_grad_()


def forward_backward(loss: Loss, query: Tensor, key: Tensor) -> float:
    query.grad = key.grad = None
    value = loss(query, key)
    value.backward()
    return value.item()  # and so waits for the forward


def _interleaved_times(
    batch: int, dim: int, temperature: float, device: torch.device, seconds: float = TIMING_SECONDS
) -> tuple[dict[str, float], dict[str, float]]:
    """Losses and median milliseconds. The contestants take turns, so that other load on the machine meets both."""
    query, key = random_pairs(batch, dim, device)
    losses = {name: forward_backward(make_loss(name, temperature), query, key) for name in CONTESTANTS}
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    begun = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - begun > seconds:
            break
        for name, of_name in times.items():
            loss = make_loss(name, temperature)
            _synchronize(device)
            started = time.perf_counter()
            forward_backward(loss, query, key)
            _synchronize(device)
            of_name.append(time.perf_counter() - started)
    return losses, {name: 1e3 * statistics.median(of_name) for name, of_name in times.items()}


def _in_fresh_process(contestant: str, batch: int, dim: int, temperature: float, device_name: str) -> float | None:
    methods = multiprocessing.get_all_start_methods()
    # The server imports torch once and forks from there, before any of its threads exist.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_memory, contestant, batch, dim, temperature, device_name).result()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _process_peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
