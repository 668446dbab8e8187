"""The launches that the launchers would make for a call, recorded instead of run, without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from fused_infonce.backends.contract import KeySet, Problem, Temperature, Upstream
from fused_infonce.backends.ladder import Ladder
from fused_infonce.backends.plan import Plan
from fused_infonce.backends.precision import accumulator
from fused_infonce.backends.triton import backend, dense, sigmoid, tiles
from fused_infonce.backends.triton.profile import profile

PROCESSORS = 132  # of an H100 or an H200, which the numbers of programs are for


@dataclass(frozen=True)
class Case:
    target: str
    dtype: str
    d: int
    # "plain": one direction; "columns": both; "general": targets, ids, own negatives; "guided": a guide;
    # "indexed": ids, and own negatives by their places in a table, whose gradient is the last and the widest;
    # "views": rows of two views against one another;
    # "raw ...": rows that are not normalised;
    # "bounded ...": plain, columns and views where every exponential fits and no mean is needed, but with "mean";
    # "few ...": so few rows that tiles on a diagonal have no launches of their own;
    # "biased ...": where keys, and with columns queries, have biases; "learned ...": of which one pass makes gradients;
    # "columns margin": columns where positives have a margin;
    # "sigmoids", "forward sigmoids": a loss of sigmoids with gradients and without;
    # "profile", "profile of general": a ladder of 17 temperatures
    variant: str
    kernels: tuple[str, ...] = ()  # names; empty: all
    tma: bool | None = None  # whether tiles are loaded through tensor descriptors; None: as the table has it
    apart: bool = False  # whether warps of their own load them, where a kernel can
    widest: bool = False  # whether of each kernel the launch with the most arguments alone is compiled


class Launch(NamedTuple):
    """A launch of a kernel that was recorded."""

    kernel: triton.JITFunction
    arguments: dict[str, Any]
    grid: tuple[int, ...]


@contextlib.contextmanager
def recorded(target: str, tma: bool | None = None, apart: bool = False) -> Iterator[list[Launch]]:
    """Record the launches of kernels as on a device of this kind with 132 processors, and run none."""
    found: list[Launch] = []
    table = tiles.tile

    def tile(*key: Any) -> tiles.Tile:
        return table(*key)._replace(apart=True, tma=False) if apart else table(*key)

    def record(self: triton.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(Launch(self, kwargs, grid))

    with (
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch.object(tiles, "architecture", return_value=target),
        mock.patch.object(tiles, "processors", return_value=PROCESSORS),
        mock.patch.object(tiles, "FORCE_TMA", tma),
        mock.patch.object(tiles, "tile", tile),
        mock.patch.dict(dense.KINDS, clear=True),
    ):
        yield found


def launches(case: Case) -> list[Launch]:
    """Return the launches that the launchers make for a problem of this kind, recorded instead of run."""
    # On the meta device PyTorch's products, which are between the kernels, take no time either.
    with recorded(case.target, case.tma, case.apart) as found, torch.device("meta"):
        launch(case)
    return found


def launch(case: Case) -> None:
    """Call the launchers for a problem of this kind."""
    dtype = torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    # of rows with tensor cores enough for tiles on a diagonal to have launches of their own
    few = case.dtype in ("float32", "float64") or "few" in case.variant
    n, d, acc = 512 if few else 4096, case.d, accumulator(dtype)
    x, ids = torch.zeros(n, d, dtype=dtype), torch.zeros(n, dtype=torch.int64)
    general, indexed = "general" in case.variant, case.variant == "indexed"
    learned, bounded = "learned" in case.variant, "bounded" in case.variant
    names, guide = (ids if general or indexed else None), (x if case.variant == "guided" else None)
    biased = learned or "biased" in case.variant
    biases = [torch.zeros(shape, dtype=acc) if biased else None for shape in ((n,), (n, 16))]
    keys = [KeySet(x.clone(), names, guide, bias=biases[0])]
    places = torch.zeros(n, 16, dtype=torch.int64)
    if indexed:
        keys.append(KeySet(x.clone(), ids, indices=places))
    elif general:
        keys.append(KeySet(torch.zeros(n, 16, d, dtype=dtype), places, bias=biases[1]))
    problem = Problem(
        KeySet(x, names, guide, bias=biases[0]), tuple(keys), Temperature(torch.ones(1, dtype=acc)),
        ids if general else None,
        ceiling=None if guide is None else torch.zeros(n, dtype=acc), columns="columns" in case.variant,
        normalize="raw" not in case.variant,
        offset=torch.zeros(2, n, dtype=acc) if "margin" in case.variant else None,
    )  # fmt: skip
    if "views" in case.variant:
        problem = replace(problem, keys=(problem.query,), target=ids, self_similar=True, two_views=True)
    u = torch.zeros(n, dtype=acc)
    if "sigmoids" in case.variant:
        wanted = ["forward" not in case.variant] * 4
        sigmoid.sigmoids(problem, Plan("onepass", n, n, 1 << 28, 0, ""), u[:1], 1 / n, wanted)
        return
    if "profile" in case.variant:
        profile(problem, Plan("forward", n, n, 1 << 28, 0, ""), Ladder.over(1 / 256, 1.0))
        return
    of_rows = [dtype, None if indexed else dtype, *[dtype] * (len(keys) - 1)]
    streams = d <= tiles.STREAMING_MAX_D[dtype] and case.variant != "guided"
    for name in ("streaming", "workspace") if streams else ("workspace",):
        mean = not bounded or "mean" in case.variant
        plan = Plan(name, n, n, 1 << 28, 0, "", bounded=bounded, mean=mean)
        statistics = backend.statistics(problem, plan)
        upstream = Upstream(u, u, u if problem.columns else None)
        backend.gradients(problem, plan, statistics, upstream, [*of_rows, *[acc] * len(problem.biases)])
    if not problem.self_similar and (bounded or problem.biases or not problem.columns):
        plan = Plan("onepass", n, n, 1 << 28, 0, "")
        wanted = [*(want is not None for want in of_rows), *[learned] * len(problem.biases), not bounded]
        made = backend.onepass(problem, plan, "infonce", u, wanted)
        backend.finished(problem, plan, made.inputs, made.kept, u.sum(), of_rows)
    if problem.one_to_one and not general and not problem.biases:
        plan = Plan("dense", n, n, 1 << 28, 0, "", bounded=bounded)
        backend.onepass(problem, plan, "infonce", 1 / n, [True, True, not bounded])
