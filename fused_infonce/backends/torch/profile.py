"""The profile in chunked PyTorch: library products, and squares of exponentials in blocks that a cache holds."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import LOG2E, Problem
from ..ladder import Counts, Ladder, Profile, Sums, added, merge, profile_of, rounding
from ..plan import Plan
from .work import Chunk, Tile, Work

CPU_ROWS, CPU_COLUMNS = 512, 4096  # of a tile: a library product that a third cache holds
CPU_SCORES = 2**14  # of a block, a thread: their exponentials on every rung lie in a second cache
FAR = 1e18  # stands for -d of what is left out: its exponential is 0, and its square times 0 is 0
SMALL = 1e-9  # a smaller exponential is 0 where it is squared twice: that would be slow to compute with, or lost
EXTRA = 8  # blocks of scores beside those of the rungs: x, its powers, what is compared


def profile(problem: Problem, plan: Plan, ladder: Ladder) -> Profile:
    on_cpu = problem.query.rows.device.type == "cpu"
    room = max(1, plan.limit // (2 * problem.acc_dtype.itemsize * (ladder.rungs + 1 + EXTRA)))
    most = min(room, CPU_SCORES * torch.get_num_threads()) if on_cpu else room
    cols = min(room, CPU_COLUMNS if on_cpu else plan.cols)
    rows = min(CPU_ROWS if on_cpu else plan.rows, max(1, plan.limit // (4 * problem.acc_dtype.itemsize * cols)))
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
    high = (pos + apart).nan_to_num_(-FAR / 2)  # under all but what is left out, -FAR
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
    compared: list[Tensor]  # whether scores are at most an upper bound, and below a lower one
    summed: Tensor  # (R, T, 2 S + 2): the exponentials of all S steps, and what was compared


class _Blocks:
    """The buffers of a pass, and what it makes of a tile, a few rows at a time.

    Scores are times log2(e) and the first inverse temperature, which costs nothing in the product that makes them.
    """

    def __init__(self, ladder: Ladder, most: int, work: Work):
        self.ladder, self.most, self.work, self.scale = ladder, most, work, ladder.first * LOG2E
        (self.scores,) = work.buffers(1)
        widest = max((cols.stop - cols.start for _, cols in work.columns), default=1)  # one row of it fits at least
        size, self.steps = max(most, widest), (ladder.rungs + 1) // 2
        self.powers = torch.ones((3, size), dtype=work.acc, device=work.device)
        self.pairs = torch.empty((self.steps + 1, 2, size), dtype=work.acc, device=work.device)
        self.views: dict[torch.Size, _Views] = {}  # to make them costs as long as to compute with them
        # of unit rows no x is below -2, so that on warm rungs no exponential is small
        warm = math.log(1 / SMALL) / ladder.first if work.problem.normalize else 0.0
        self.warm_steps = math.floor(math.log2(warm)) if warm >= 1 else 0

    def of_tile(self, tile: Tile, low: Tensor, high: Tensor) -> tuple[Sums, Counts]:
        """Return the sums of the tile's rows, and how many scores are above `high`, and between `low` and it."""
        scores, lost = self._scores(tile)
        m = scores.amax(1)
        none = m == -FAR
        top = m.masked_fill(none, 0)[:, None]
        sums = scores.new_empty((len(scores), 3, 2 * self.steps + 2))
        step = max(1, self.most // max(scores.shape[1], 1))
        bounds = (low * self.scale)[:, None], (high * self.scale)[:, None]
        parts = zip(*(part.split(step) for part in (scores, top, *bounds, sums)), strict=True)
        for block, largest, near, far, out in parts:
            view = self._shaped(block.shape)
            torch.le(block, far, out=view.compared[0])
            torch.lt(block, near, out=view.compared[1])
            self._exponentials(torch.sub(block, largest, out=view.x), view)
            torch.bmm(view.powers, view.summed, out=out)
        under, below = sums[:, 0, -2:].T
        counts = Counts((scores.shape[1] - under).long(), (under - below).long())
        m = m.masked_fill_(none, -math.inf).div_(self.scale)
        moments = sums[..., : self.ladder.rungs].permute(1, 2, 0)
        units = moments.new_tensor([1, 1 / self.scale, 1 / self.scale**2])[:, None, None]
        return Sums(m if lost is None else m.masked_fill_(lost, math.nan), moments * units), counts

    def _scores(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Return the scores, -FAR where they do not count, and which rows have one of -inf that does."""
        chunk, lost = tile.chunk, None
        scores = tile.keys.scores(chunk.queries.unit, self.scale, chunk.rows, tile.cols, tile.shaped(self.scores))
        if not self.work.problem.normalize:  # unit rows cannot give -inf
            tile.exclude(scores, 0.0)
            lost = (scores == -math.inf).any(1)
        tile.exclude(scores, -FAR)
        if tile.keys.bias is not None:
            scores = self.work.logits(scores, tile, 1, scores).clamp_min_(-FAR)
        return scores, lost

    def _exponentials(self, x: Tensor, view: _Views) -> None:
        """Write the exponentials of x on every rung, and its square."""
        torch.mul(x, x, out=view.square)
        first, second = view.halves
        torch.exp2(x, out=first)
        torch.mul(x, math.sqrt(2), out=second).exp2_()
        for step, (e, squared) in enumerate(pairwise(view.steps), 1):
            if step > self.warm_steps and (step - self.warm_steps) % 2:
                e = torch.threshold(e, SMALL, 0.0, out=squared)
            torch.mul(e, e, out=squared)

    def _shaped(self, shape: torch.Size) -> _Views:
        if shape not in self.views:
            powers, pairs = (x[..., : shape.numel()].view(*x.shape[:-1], *shape) for x in (self.powers, self.pairs))
            *steps, compared = pairs
            self.views[shape] = _Views(
                powers[1], powers[2], powers.transpose(0, 1), steps, list(steps[0]), list(compared),
                pairs.flatten(0, 1).permute(1, 2, 0),
            )  # fmt: skip
        return self.views[shape]
