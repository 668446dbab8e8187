"""Time and peak memory of one forward and backward of the loss, fused and dense, as the batch grows.

Other load on the machine must not decide which is faster: the contestants take turns within every round, a round's two
times are compared with each other, the middle half of the rounds is reported beside their median, and where other
programs used the processor meanwhile, no conclusion is drawn.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fused_infonce import FusedInfoNCELoss

Result = TypeVar("Result")
Loss = Callable[[Tensor, Tensor], Tensor]

CONTESTANTS = ("fused", "dense")
WARM_UP_ROWS = 64
TIMING_SECONDS, MAX_SECONDS = 2.5, 10.0
FEWEST_ROUNDS, MIN_ROUNDS, MAX_ROUNDS = 3, 7, 50
QUIET = 0.1  # share of the processor that other programs may use before times are not believed
WORTH_IT = 0.05  # of a training step
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """Time and memory of one contestant at one size; a spread holds the quartiles over the rounds."""

    contestant: str
    batch: int
    dim: int
    rounds: int
    milliseconds: float
    spread: tuple[float, float]
    speedup: float  # the dense loss's time divided by this one's, median over the rounds
    speedup_spread: tuple[float, float]
    others: float | None  # share of the processor that other programs used meanwhile; None where the system is silent
    peak_mib: float | None  # beyond the inputs, gradients included; None where the system does not tell
    loss: float


def dense_info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """InfoNCE as everyone writes it, and as info-nce-pytorch computes it."""
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def make_loss(contestant: str, temperature: float) -> Loss:
    """Makes the loss function of a contestant."""
    if contestant == "fused":
        return FusedInfoNCELoss(temperature=temperature)
    return lambda query, key: dense_info_nce(query, key, temperature)


def measure_costs(batches: list[int], dim: int, temperature: float, device: torch.device) -> list[Cost]:
    """Measures both contestants at every size. They must agree: a wrong result is not timed."""
    costs = []
    with tqdm(batches, desc="time and memory", unit="size", disable=None, file=sys.stderr) as bar:
        for batch in bar:
            timing = partial(_interleaved_times, batch, dim, temperature, device)
            (losses, times), others = with_other_load(timing)
            if abs(losses["fused"] - losses["dense"]) > 1e-4 * max(1.0, abs(losses["dense"])):
                raise RuntimeError(f"the losses differ at batch {batch}: {losses}")
            for contestant in CONTESTANTS:
                arguments = (contestant, batch, dim, temperature, str(device))
                peak = peak_memory(*arguments) if device.type == "cuda" else _in_fresh_process(*arguments)
                costs.append(_cost(contestant, batch, dim, times, others, peak, losses[contestant]))
    return costs


def _cost(
    contestant: str,
    batch: int,
    dim: int,
    times: dict[str, list[float]],
    others: float | None,
    peak: float | None,
    loss: float,
) -> Cost:
    own = times[contestant]
    low, median, high = quartiles([1e3 * seconds for seconds in own])
    slowest, speedup, fastest = quartiles([dense / mine for dense, mine in zip(times["dense"], own, strict=True)])
    return Cost(contestant, batch, dim, len(own), median, (low, high), speedup, (slowest, fastest), others, peak, loss)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return low, median, high


def disturbed(loads: Iterable[float | None]) -> float | None:
    """Finds the largest share of the processor that other programs used, where that spoils the times, else None."""
    largest = max((load for load in loads if load is not None), default=0.0)
    return largest if largest > QUIET else None


def with_other_load(work: Callable[[], Result]) -> tuple[Result, float | None]:
    """Runs `work`, and measures the share of the processor that other programs used meanwhile."""
    before, began = _other_seconds(), time.perf_counter()
    result = work()
    seconds, after = time.perf_counter() - began, _other_seconds()
    if before is None or after is None:
        return result, None
    return result, max(0.0, after - before) / (seconds * (os.cpu_count() or 1))


def faster_from(costs: list[Cost]) -> int | None:
    """Finds the smallest timed batch from which on three rounds in four, at every size, found the fused loss faster."""
    found = None
    for cost in sorted((one for one in costs if one.contestant == "fused"), key=lambda one: -one.batch):
        if cost.speedup_spread[0] <= 1:
            break
        found = cost.batch
    return found


def step_savings(costs: list[Cost], batch: int, step_milliseconds: float) -> dict[int, float] | None:
    """Estimates the share of a dense training step that the fused loss saves at every timed batch.

    A step at `batch` with the fused loss took `step_milliseconds`; what is not the loss is taken to grow with the
    batch. None where the loss was not timed at `batch`.
    """
    of_fused = {one.batch: one for one in costs if one.contestant == "fused"}
    if batch not in of_fused:
        return None
    rest = max(0.0, step_milliseconds - of_fused[batch].milliseconds) / batch
    savings = {}
    for size, one in sorted(of_fused.items()):
        dense = one.speedup * one.milliseconds  # both from the same rounds, unlike the two medians
        savings[size] = (dense - one.milliseconds) / (rest * size + dense)
    return savings


def peak_memory(contestant: str, batch: int, dim: int, temperature: float, device_name: str) -> float | None:
    """Measures the MiB that one forward and backward adds at its peak.

    On a CPU it must run in a fresh process, because the peak of a process only grows.
    """
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
    """Makes queries and noisy copies of them as keys."""
    rng = torch.Generator().manual_seed(rows)
    query = torch.randn(rows, dim, generator=rng)
    key = query + 3.0 * torch.randn(rows, dim, generator=rng)
    return query.to(device).requires_grad_(), key.to(device).requires_grad_()


def forward_backward(loss: Loss, query: Tensor, key: Tensor) -> float:
    """Runs the loss forward and backward and returns its value."""
    query.grad = key.grad = None
    value = loss(query, key)
    value.backward()
    return value.item()  # and so waits for the forward


def _interleaved_times(
    batch: int, dim: int, temperature: float, device: torch.device, seconds: float = TIMING_SECONDS
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Losses, and the seconds of every round. Whoever was second in one round is first in the next."""
    query, key = random_pairs(batch, dim, device)
    losses = {name: forward_backward(make_loss(name, temperature), query, key) for name in CONTESTANTS}
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    begun = time.perf_counter()
    for done in range(MAX_ROUNDS):
        elapsed = time.perf_counter() - begun
        if (done >= MIN_ROUNDS and elapsed > seconds) or (done >= FEWEST_ROUNDS and elapsed > MAX_SECONDS):
            break
        for name in CONTESTANTS if done % 2 == 0 else CONTESTANTS[::-1]:
            loss = make_loss(name, temperature)
            _synchronize(device)
            started = time.perf_counter()
            forward_backward(loss, query, key)
            _synchronize(device)
            times[name].append(time.perf_counter() - started)
    return losses, times


def _in_fresh_process(contestant: str, batch: int, dim: int, temperature: float, device_name: str) -> float | None:
    methods = multiprocessing.get_all_start_methods()
    # The server imports torch once and forks from there, before any of its threads exist.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_memory, contestant, batch, dim, temperature, device_name).result()


def _other_seconds() -> float | None:
    """Processor seconds that everything but this process has used, or None where the system does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _waiting, *interrupts = map(int, file.readline().split()[1:9])
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(interrupts)) / ticks - time.process_time()


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
