"""The profile in chunked PyTorch: library products, and squares of exponentials in blocks that a cache holds."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import LOG2E, Problem, Profile
from ..ladder import Counts, Ladder, Sums, added, merge, profile_of, rounding
from ..plan import Plan
from .work import Chunk, Tile, Work, finite

CPU_COLUMNS = 2048  # of a tile: wide enough for a library product
CPU_SCORES = 2**15  # of a block, a thread: their exponentials on every rung lie in a second cache
FAR = 1e15  # stands for -x of what is left out: its exponential is 0, and 0 times its square is 0
SMALL = 1e-18  # a smaller exponential is 0 before it is squared: its square would be slow to compute with, or lost
EXTRA = 8  # blocks of scores beside those of the rungs: x, its powers, what is compared


def profile(problem: Problem, plan: Plan, ladder: Ladder) -> Profile:
    on_cpu = problem.query.rows.device.type == "cpu"
    room = max(1, plan.limit // (2 * problem.acc_dtype.itemsize * (ladder.rungs + 1 + EXTRA)))
    most = min(room, CPU_SCORES * torch.get_num_threads()) if on_cpu else room
    cols = min(plan.cols, room, CPU_COLUMNS if on_cpu else room)
    rows = min(plan.rows, max(1, plan.limit // (4 * problem.acc_dtype.itemsize * cols)))
    plan = replace(plan, name="forward", rows=rows, cols=cols, full=True)
    work = Work(problem, plan, [None] * (len(problem.inputs) + len(problem.biases)))
    inverse = ladder.inverse(problem.temperature.values)
    blocks = _Blocks(ladder, most, work)
    found = [_of_chunk(work, chunk, blocks, inverse) for chunk in work.chunks()]
    if not found:
        return profile_of(None, None, inverse.new_empty(0), inverse)
    return Profile(*(torch.cat(parts, -1) for parts in zip(*found, strict=True)))


def _of_chunk(work: Work, chunk: Chunk, blocks: _Blocks, inverse: Tensor) -> Profile:
    """Return the profile of a chunk of rows."""
    _, keys, _ = work.target_keys(chunk)
    pos = work.positives(chunk) / chunk.inv_t
    lengths = torch.linalg.vector_norm(chunk.queries.unit, dim=-1) * torch.linalg.vector_norm(keys, dim=-1)
    apart = rounding(work.acc, keys.shape[1]) * lengths
    high = (pos + apart).nan_to_num_(torch.finfo(pos.dtype).min)  # under all but what is left out, -inf
    sums, counts = None, None
    for tile in work.tiles(chunk):
        tile_sums, tile_counts = blocks.of_tile(tile, pos - apart, high)
        sums, counts = merge(sums, tile_sums, inverse), added(counts, tile_counts)
    return profile_of(sums, counts, pos, inverse)


class _Views(NamedTuple):
    """The buffers of a pass in the shape (R, T) of a block of scores."""

    x: Tensor
    square: Tensor
    powers: Tensor  # (R, 3, T): 1, x, x^2
    steps: list[Tensor]  # (2, R, T) each: exponentials on rungs 2 s and 2 s + 1
    halves: list[Tensor]  # the two of the first step
    rungs: Tensor  # (R, T, K)


class _Blocks:
    """The buffers of a pass, and what it makes of a tile, a few rows at a time."""

    def __init__(self, ladder: Ladder, most: int, work: Work):
        self.ladder, self.most, self.work = ladder, most, work
        (self.scores,) = work.buffers(1)
        widest = max((cols.stop - cols.start for _, cols in work.columns), default=1)  # one row of it fits at least
        size, steps = max(most, widest), (ladder.rungs + 1) // 2
        self.powers = torch.ones((3, size), dtype=work.acc, device=work.device)
        self.exponentials = torch.empty((steps, 2, size), dtype=work.acc, device=work.device)
        self.views: dict[torch.Size, _Views] = {}  # to make them costs as long as to compute with them
        # of unit rows no x is below -2, so that on warm rungs no exponential is small
        warm = math.log(1 / SMALL) / (2 * ladder.first) if work.problem.normalize else 0.0
        self.warm_steps = math.floor(math.log2(warm)) if warm >= 1 else 0

    def of_tile(self, tile: Tile, low: Tensor, high: Tensor) -> tuple[Sums, Counts]:
        """Return the sums of the tile's rows, and how many scores are above `high`, and between `low` and it."""
        chunk = tile.chunk
        scores = tile.keys.scores(chunk.queries.unit, 1.0, chunk.rows, tile.cols, tile.shaped(self.scores))
        lost = None
        if not self.work.problem.normalize:  # unit rows cannot give -inf
            tile.exclude(scores, 0.0)
            lost = (scores == -math.inf).any(1)
        tile.exclude(scores, -math.inf)
        scores = self.work.logits(scores, tile, 1, scores)
        m = scores.amax(1)
        base = finite(m)[:, None]
        moments = scores.new_empty((len(scores), 3, self.ladder.rungs))
        under, below = torch.empty_like(m), torch.empty_like(m)
        step = max(1, self.most // max(scores.shape[1], 1))
        blocks = zip(*(part.split(step) for part in (scores, base, low[:, None], high[:, None])), strict=True)
        results = zip(*(part.split(step) for part in (moments, under, below)), strict=True)
        for (block, top, near, far), (sums, up_to, less) in zip(blocks, results, strict=True):
            view = self._shaped(block.shape)
            torch.sum(torch.le(block, far, out=view.x), 1, out=up_to)
            torch.sum(torch.lt(block, near, out=view.x), 1, out=less)
            self._exponentials(torch.sub(block, top, out=view.x).clamp_min_(-FAR), view)
            torch.bmm(view.powers, view.rungs, out=sums)
        if lost is not None:
            m = m.masked_fill_(lost, math.nan)
        counts = Counts((scores.shape[1] - under).long(), (under - below).long())
        return Sums(m, moments.permute(1, 2, 0)), counts

    def _exponentials(self, x: Tensor, view: _Views) -> None:
        """Write the exponentials of x on every rung, and its square."""
        torch.mul(x, x, out=view.square)
        for half, out in enumerate(view.halves):
            torch.mul(x, self.ladder.first * 2 ** (half / 2) * LOG2E, out=out).exp2_()
        for step, (e, squared) in enumerate(pairwise(view.steps), 1):
            if step > self.warm_steps:
                F.threshold(e, SMALL, 0.0, inplace=True)
            torch.mul(e, e, out=squared)

    def _shaped(self, shape: torch.Size) -> _Views:
        if shape not in self.views:
            powers, e = (
                x[..., : shape.numel()].view(*x.shape[:-1], *shape) for x in (self.powers, self.exponentials)
            )  # fmt: skip
            rungs = e.flatten(0, 1)[: self.ladder.rungs].permute(1, 2, 0)
            self.views[shape] = _Views(
                powers[1], powers[2], powers.transpose(0, 1), list(e), list(e[0]), rungs
            )  # fmt: skip
        return self.views[shape]
