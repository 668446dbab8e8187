"""Gradient caching against the step that keeps every activation: time and memory of a forward and backward.

    python -m benchmarks.suites.cached                             a transformer of 6 layers on 256 texts of 64 tokens
    python -m benchmarks.suites.cached --record results/cached.csv the same, appended to a CSV file

In turn, on fresh inputs each round, medians of processor time, which other programs on the machine change least; first
the gradients of both must agree. By count of products the cached step takes 4/3 of the time: two forward passes and a
backward that is worth two, where there was one forward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.contest import peak_bytes
from fused_infonce import FusedInfoNCELoss, cached

FIELDS = (
    *("date", "commit", "device", "torch", "encoder", "texts", "tokens", "chunk_size", "contestant"),
    *("median_ms", "p20_ms", "p80_ms", "time_ratio", "peak_extra_mib"),
)
WHOLE, CACHED = "whole batch", "cached"
CPU = torch.device("cpu")


class Encoder(nn.Module):
    """A transformer with dropout whose embedding is the mean of its last states, on hidden states for tokens."""

    def __init__(self, layers: int, d: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, d // 64, 4 * d, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden).mean(1)


def step(encoder: Encoder, query: Tensor, key: Tensor, chunk_size: int | None) -> list[Tensor]:
    """One forward and backward; without a chunk size that of the whole batch."""
    encoder.zero_grad()
    loss = FusedInfoNCELoss(temperature=0.05)
    if chunk_size is None:
        value = loss(encoder(query), encoder(key))
    else:
        value = cached(loss, (encoder, query), (encoder, key), chunk_size=chunk_size)
    value.backward()
    return [x.grad for x in encoder.parameters() if x.grad is not None]


def play(options: argparse.Namespace) -> list[dict[str, object]]:
    """Time both contestants, and return a CSV row for each."""
    torch.manual_seed(0)
    encoder, chunk = Encoder(options.layers, options.d), options.chunk_size
    runs: dict[str, Callable[..., list[Tensor]]] = {
        WHOLE: partial(step, chunk_size=None), CACHED: partial(step, chunk_size=chunk),
    }  # fmt: skip

    def inputs() -> Tensor:
        return torch.randn(2, options.texts // 2, options.tokens, options.d)

    given, peaks, results = inputs(), {}, []
    encoder.eval()  # dropout draws other numbers for other chunks
    for name, run in runs.items():
        peaks[name], result = peak_bytes(partial(run, encoder, *given), CPU)
        results.append(torch.cat([x.flatten() for x in result]))
        del result
        encoder.zero_grad()
    error = ((results[1] - results[0]).norm() / results[0].norm()).item()
    if not error <= 1e-4:
        raise AssertionError(f"the gradients differ by {error:.1e}")
    encoder.train()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        given = inputs()
        for name, run in runs.items():
            start = time.process_time()
            run(encoder, *given)
            times[name].append(1e3 * (time.process_time() - start))
    about = {k: v for k, v in record.provenance(CPU).items() if k in FIELDS}
    base = np.median(times[WHOLE])
    return [
        {
            **about, "encoder": f"{options.layers} layers, d = {options.d}", "texts": options.texts,
            "tokens": options.tokens, "chunk_size": chunk if name == CACHED else "", "contestant": name,
            "median_ms": f"{np.median(t):.4g}", "p20_ms": f"{np.percentile(t, 20):.4g}",
            "p80_ms": f"{np.percentile(t, 80):.4g}", "time_ratio": f"{np.median(t) / base:.3f}",
            "peak_extra_mib": f"{peaks[name] / 2**20:.1f}",
        }
        for name, t in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="append the results to this CSV file, absolute or relative to benchmarks/")
    for name, default in {"layers": 6, "d": 384, "texts": 256, "tokens": 64, "chunk-size": 32, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rows = play(options)
    for row in rows:
        print(*(f"{row[name]!s:>24}" for name in ("contestant", "median_ms", "time_ratio", "peak_extra_mib")))
    if options.record:
        record.append(options.record, rows, FIELDS)


if __name__ == "__main__":
    main()
