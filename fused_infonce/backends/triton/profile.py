"""Launcher of kernels/profile.py: a profile from sums in slots, a slot for each part of the columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.profile import profile_kernel
from ..contract import LOG2E, Problem, Temperature
from ..indexing import same_ids
from ..ladder import Counts, Ladder, Profile, Sums, added, merge, profile_of, rounding, sums_of
from ..plan import Plan
from . import tiles
from .launch import Excluded, Side, cdiv, columns_per_program, dot_of, guide_arguments, pair_arguments, run, tile_of
from .paired import Paired
from .statistics import WAVES
from .work import Work, prepare

EMPTY = -(2.0**127)  # the maximum of no columns, as kernels have it
TF32 = 2.0**-10  # between two numbers next to 1 in the format of tensor cores


def profile(problem: Problem, plan: Plan, ladder: Ladder) -> Profile:
    one = Temperature(torch.ones_like(problem.temperature.values[:1]), 1.0)
    with torch.cuda.device_of(problem.query.rows):
        work, pos = prepare(replace(problem, temperature=one), plan, positives=True)
        assert pos is not None
        inverse = ladder.inverse(pos)
        apart = _rounding(work) * _lengths(work)
        low, high = pos - apart, pos + apart
        sums, counts = None, None
        for found, number in _parts(work, plan.limit, inverse, low, high):
            sums, counts = merge(sums, found, inverse), added(counts, number)
        return profile_of(sums, counts, pos, inverse)


def _parts(work: Work, limit: int, inverse: Tensor, low: Tensor, high: Tensor) -> Iterator[tuple[Sums, Counts]]:
    """Yield the sums and counts of the rows over parts of the columns of all sets."""
    for _, keys, excluded in work.segments:
        if len(work.query):
            yield from tile_sums(work.query, keys, excluded, limit, inverse, low, high)
    for own in work.paired.values():
        yield paired_sums(work.query, own, inverse, low, high)


def tile_sums(
    x: Side, y: Side, excluded: Excluded, limit: int, inverse: Tensor, low: Tensor, high: Tensor
) -> Iterator[tuple[Sums, Counts]]:
    """Yield the sums and counts of rows x over parts of y, as many parts as `limit` bytes have room for."""
    n, m, rungs = len(x), len(y), len(inverse)
    tile = tile_of("profile", x, y)
    blocks = cdiv(n, tile.block_m)
    most = max(1, limit // ((1 + 3 * rungs) * inverse.element_size() * n))
    split = columns_per_program(blocks, m, tile.block_n, x.rows.device, most, WAVES) // tile.block_n
    parts = cdiv(cdiv(m, tile.block_n), split)
    states = inverse.new_empty((parts, 1 + 3 * rungs, n))
    counts = torch.empty((parts, 2, n), dtype=torch.int32, device=inverse.device)
    sides = pair_arguments(tile, x, y)
    del sides["SX_ptr"], sides["SY_ptr"]
    run(
        profile_kernel, (blocks, parts),
        **sides, C_ptr=y.bias, BETA_ptr=inverse * LOG2E, LOW_ptr=low, HIGH_ptr=high, STATES_ptr=states,
        COUNTS_ptr=counts, size_x=n, size_y=m, split=split, RUNGS=rungs, LANES=tiles.power_of_two(rungs),
        **excluded.arguments(x, y), **guide_arguments(x, y),
    )  # fmt: skip
    for state, number in zip(states, counts.long(), strict=True):
        maximum, moments = state[0], state[1:].view(3, rungs, n)
        maximum = torch.where(maximum == EMPTY, -math.inf, maximum)
        yield Sums(torch.where(moments.isnan().any(0).any(0), math.nan, maximum), moments), Counts(*number)


def paired_sums(x: Side, keys: Paired, inverse: Tensor, low: Tensor, high: Tensor) -> tuple[Sums, Counts]:
    """Return the sums and counts of rows x over keys of their own, whose products (N, H) are in memory."""
    if keys.indices is not None:
        raise ValueError("keys by their places in a table have no kernel for sweeps: pass backend='torch'")
    d = keys.dots.view(len(x), keys.columns())
    if keys.inverse is not None:
        d = d * keys.inverse.view_as(d)
    if x.inverse is not None:
        d = d * x.inverse[:, None]
    out = torch.zeros_like(d, dtype=torch.bool)
    if x.ids is not None and keys.ids is not None:
        out |= same_ids(x.ids, keys.ids)
    if keys.bias is not None:
        out |= keys.bias != 0
    return sums_of(d, out, inverse, low, high)


def _rounding(work: Work) -> float:
    rows = work.query.rows
    exact = rounding(work.problem.acc_dtype, work.problem.query.rows.shape[1])
    return max(exact, TF32) if dot_of(rows) == "tf32" else exact


def _lengths(work: Work) -> Tensor | float:
    """Return the length of each query times that of its target, as the products see them."""
    problem = work.problem
    if problem.normalize:
        return 1.0
    norms = []
    for keys in problem.sets[:2]:
        norm = torch.linalg.vector_norm(keys.rows, dim=-1, dtype=problem.acc_dtype)
        norms.append(norm if keys.scale is None else norm * keys.scale)
    own, of_keys = norms
    if problem.target is None or not len(of_keys):
        return own * of_keys if len(of_keys) else own
    return own * of_keys[problem.target.clamp(0, len(of_keys) - 1)]
