"""The time of every plan on a GPU by a model, as a multiple of three bare products: an estimate, not a measurement.

    python -m benchmarks.tiles.model [--direction one ...] [--rows 16384 ...] [--dim 768 ...] [--record]
    python -m benchmarks.tiles.model --parts --direction one --rows 16384 --dim 768     what each plan's time is made of

A direction's temperature is a number; that of "one-learned" and so on is a tensor on the GPU with a gradient. Its bound
is not known without reading the device, so that exponentials need their rows' maxima, which a pass before them finds.

A call runs its plan on tensors without memory, forward and backward, and what it launches is recorded: kernels over
tiles, library products, and all other kernels and operators. The rules by which these take time:

1. Cycles of kernels over tiles are those of benchmarks/results/pipes.csv, at the clock at which the tensor cores reach
   the rate of a library product.
2. In one program the pipes of a step of the product overlap, and what surrounds the product does not: a tile takes the
   longest pipe of each step and of what is before the first, and then the tensor cores and the longest other pipe of
   what is after the last.
3. Programs of one processor overlap one's product with another's epilogue: k of them take the longest pipe of all
   their work, but no less than k-th part of k tiles one after the other. Programs run in whole waves.
4. A library product runs at its rate, in output tiles of 128 x 256, 128 x 128 or 128 x 64, whichever are the fastest,
   in whole waves; where they do not fill the processors the sum is divided among them.
5. A tile's rows come from the L2 cache at LOADS bytes a cycle and processor, beside all else; rows that a program
   keeps come once.
6. Nothing takes less than its bytes take: every tensor once, from memory, and a block of scores that the L2 cache holds
   from there. What has no tiles takes no more than its bytes.

"of_floor" is by these rules. "at_worst" is without rule 3, two programs being in step, with products of our kernels at
TILE_PRODUCT of the library's rate, and without sums that are divided. Neither has the host, launches, or what a first
load waits for: below some 4096 rows these decide.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_infonce import contrast
from fused_infonce.backends import plan as plans
from fused_infonce.backends import registry
from fused_infonce.backends.contract import KeySet, Problem, Temperature
from fused_infonce.backends.triton import accumulate

from .. import HERE, ROOT
from ..record import Row, commit
from .pipes import PIPES, TENSOR, form

LOADS = 64  # what a processor can take in
TILE_PRODUCT = 0.85  # of a library's rate: what products of Triton in tiles of 128 x 128 are said to reach
DIRECTIONS = ("one", "both", "self", "one-learned", "both-learned", "self-learned")
TRITONS = ("3.7.1", "3.6.0")  # whose machine code is counted
ROWS = (4096, 8192, 16384, 32768, 65536, 131072)
DIMS = (64, 128, 256, 512, 768, 1024)
PLANS = ("onepass", "streaming", "workspace", "triangular")
FIELDS = ("commit", "triton", "machine", "limit_mib", "direction", "n", "d", "plan", "chosen", "block_rows",
          "block_cols", "launches", "of_floor", "at_worst")  # fmt: skip
BYTES_ALONE = ("side_kernel", "scale_kernel", "merge_kernel", "finish_kernel", "combine_kernel")


@dataclass(frozen=True)
class Machine:
    """A GPU. Its rates are what others report for long runs, and none was measured here."""

    name: str
    target: str
    processors: int
    product: float  # FLOP/s of a library product of 16-bit rows
    memory: float  # bytes/s
    cache: float  # bytes/s of L2
    cache_bytes: float  # of it, that a block of scores can have

    @property
    def clock(self) -> float:
        """Return the cycles a second at which the tensor cores make the library's FLOP/s."""
        return self.product / (self.processors * TENSOR[self.target])

    def seconds(self, nbytes: float, block_bytes: float = float("inf")) -> float:
        """Return the time that bytes take, of a block that may stay in L2."""
        return nbytes / (self.cache if block_bytes <= self.cache_bytes else self.memory)


H200 = Machine("H200", "sm_90", 132, 790e12, 4.3e12, 5.5e12, 40e6)


class Times(NamedTuple):
    """Seconds by the rules, and at worst."""

    expected: float
    worst: float


class Counts(NamedTuple):
    """What pipes.csv says of one kernel: cycles of a tile, for k programs of a processor, and of a program besides."""

    parts: tuple[tuple[int, dict[str, int]], ...]  # how often a tile runs a part, and the cycles of each pipe
    programs: int
    loads: float  # cycles in which the rows of a tile come

    def alone(self, product: float = 1.0) -> float:
        """Return the cycles of a tile in a program that has its processor to itself; product: share of the rate."""
        total = 0.0
        for times, pipe in self.parts:
            tensor, others = pipe["tensor"] / product, max(pipe[name] for name in PIPES[:-1])
            total += times * (max(tensor, others) if times > 1 else tensor + others)
        return max(total, self.loads)

    def tile(self, programs: int) -> float:
        """Return the cycles in which a processor with that many programs makes a tile."""
        busiest = max(sum(times * pipe[name] for times, pipe in self.parts) for name in PIPES)
        return max(busiest, self.loads, self.alone() / programs)

    @property
    def besides(self) -> float:
        """Return the cycles of a program's own, which no tile has."""
        return sum(max(pipe.values()) for times, pipe in self.parts if not times)


@cache
def counts(target: str, triton: str) -> dict[tuple[Any, ...], Counts]:
    """Return the newest counts of each kernel, by D, kernel, form and tile."""
    found: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    with (HERE / "results" / "pipes.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["target"], row["triton"]) == (target, triton):
                key = (int(row["d"]), row["kernel"], row["form"], int(row["block_m"]), int(row["block_n"]))
                found[key][row["part"]] = row
    return {
        key: Counts(
            tuple((int(row["times"]), {name: int(row[name]) for name in PIPES}) for row in parts.values()),
            int(parts["tile"]["programs"]),
            2 * key[0] * (key[4] + ("step" in parts) * key[3]) / LOADS,  # rows of x too where a loop goes over D
        )
        for key, parts in found.items()
    }


class Operators(TorchDispatchMode):
    """A context that notes every operator with its tensors, and lets it run."""

    def __init__(self, events: list[Any]):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        inputs = [x for x in args if isinstance(x, Tensor)]
        inputs += [x for xs in args if isinstance(xs, (list, tuple)) for x in xs if isinstance(x, Tensor)]  # of cat
        if not (func.is_view or name.startswith(("empty", "new_empty", "detach"))):
            self.events.append((name, inputs, [x for x in (out,) if isinstance(x, Tensor)]))
        return out


@cache
def run(direction: str, n: int, d: int, limit: int, only: str | None) -> tuple[plans.Plan, list[Any]]:
    """Return the plan of a call, and what it launches forward and backward, with any Triton.

    only: a plan to take in place of it, which may not be possible and then launches nothing.
    """
    from . import launches

    name, _, learned = direction.partition("-")
    query, key = (torch.empty(n, d, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    if name == "self":
        key = query
    target = torch.empty(n, dtype=torch.int64, device="meta") if name == "self" else None
    t = Temperature(torch.empty(1, device="meta", requires_grad=bool(learned)), None if learned else 0.05)
    problem = Problem(
        KeySet(query),
        (KeySet(key),),
        t,
        target,
        columns=name == "both",
        self_similar=name == "self",
        two_views=name == "self",
    )
    options = registry.Options("triton", limit)
    rules, blocks = plans.RULES["triton"]
    if only:
        rules = tuple((only, lambda _: True, flops, why) for plan, _, flops, why in rules if plan == only)[:1]
    with ExitStack() as stack:
        for where, what, value in (
            (registry, "resolve", lambda *_: "triton"), (registry, "remembered", {}),
            (torch.Tensor, "is_cuda", True), (torch.cuda, "device_of", nullcontext),
            (torch, "is_autocast_enabled", lambda *_: False), (accumulate, "adds_in_place", lambda _: True),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(where, what, value, create=True))
        stack.enter_context(mock.patch.dict(plans.RULES, {"triton": (rules, blocks)}))
        events = stack.enter_context(launches.recorded(H200.target))
        plan = registry.plan_of(problem, options, reduced=True)
        if not plan.rows:  # no chunk fits the limit
            return plan, []
        stack.enter_context(Operators(events))
        if plan.one_pass:
            loss = contrast.onepass(problem, plan, "infonce", 1 / n)
        else:
            rows, columns = contrast.statistics(problem, options, plan=plan)
            loss = torch.nn.functional.softplus(rows.neg - rows.pos).sum()
            if columns is not None:
                loss = loss + torch.nn.functional.softplus(columns.neg - columns.pos).sum()
        leaves = [query] if key is query else [query, key]
        torch.autograd.grad(loss, [*leaves, t.values] if learned else leaves)
    return plan, events


def size(*tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def product(machine: Machine, name: str, inputs: Sequence[Tensor], out: Tensor) -> Times:
    """Return the times of a library product, which may add to its output."""
    a, b = inputs[-2:]
    (m, k), n = a.shape, b.shape[1]
    moved = machine.seconds(size(a), size(a)) + machine.seconds(size(b, out) + (size(out) if "add" in name else 0))
    times = []
    for divided in (True, False):
        waves = []
        for width in (256, 128, 64):
            tiles = -(-m // 128) * -(-n // width)
            parts = max(machine.processors // tiles, 1) if divided else 1
            waves.append(-(-tiles * parts // machine.processors) / parts * width)
        work = min(waves) * 2 * 128 * k / (machine.product / machine.processors)
        times.append(max(work, moved))
    return Times(*times)


def made(arguments: dict[str, Any], grid: tuple[int, ...]) -> tuple[int, int]:
    """Return how many programs of a launch make tiles, and how many tiles: it may leave out diagonals, or a half."""
    block_m, block_n, peel = arguments["BLOCK_M"], arguments["BLOCK_N"], arguments.get("PEEL", "")
    first, left = arguments.get("row_start", 0), arguments.get("col_start", 0)
    last, right = (arguments[a if a in arguments else b] for a, b in (("row_end", "size_x"), ("col_end", "size_y")))
    starts, across = range(first, last, block_m)[: grid[0]], -(-(right - left) // block_n)
    shift, tiles = arguments.get("shift"), 0
    for start in starts:
        begin = (start - left) // block_n if arguments.get("HALF") else 0
        masked = {across - 1} if (right - left) % block_n else set()
        for diagonal in (0,) if shift is None else (0, shift, -shift):
            low = start + diagonal - left
            masked |= set(range(low // block_n, -(-(low + block_m) // block_n)))
        masked &= set(range(begin, across))
        tiles += {"": across - begin, "on": len(masked), "off": across - begin - len(masked)}[peel]
    return (tiles if "C_ptr" in arguments else len(starts) * grid[1]), tiles


def over_tiles(machine: Machine, triton: str, launch: Any) -> Times:
    """Return the times of a kernel over tiles."""
    name, arguments = launch.kernel.__name__, launch.arguments
    x, y = (getattr(arguments[f"{side}_ptr"], "base", arguments[f"{side}_ptr"]) for side in "XY")
    key = (x.shape[1], name, form(arguments), arguments["BLOCK_M"], arguments["BLOCK_N"])
    counted = counts(machine.target, triton).get(key)
    if counted is None:
        raise LookupError(
            f"pipes.csv has no counts for {key} of triton {triton}: record them with benchmarks.tiles.pipes"
        )
    programs, tiles = made(arguments, launch.grid)
    c = arguments.get("C_ptr")
    moved = machine.seconds(size(x, y, arguments.get("G_ptr")))
    if c is not None:
        rows, cols = (arguments[f"{side}_end"] - arguments[f"{side}_start"] for side in ("row", "col"))
        block = tiles * arguments["BLOCK_M"] * arguments["BLOCK_N"] * c.element_size()
        moved = machine.seconds((rows + cols) * x.shape[1] * x.element_size()) + machine.seconds(block, size(c))
    if not tiles:
        return Times(0.0, 0.0)
    each, whole = tiles / programs, machine.processors * counted.programs
    full, rest = divmod(programs, whole)
    cycles = full * counted.programs * (each * counted.tile(counted.programs) + counted.besides)
    if rest:
        k = -(-rest // machine.processors)
        cycles += k * (each * counted.tile(k) + counted.besides)
    in_step = -(-programs // machine.processors) * (each * counted.alone(TILE_PRODUCT) + counted.besides)
    return Times(max(cycles / machine.clock, moved), max(in_step / machine.clock, moved))


def priced(machine: Machine, triton: str, events: Sequence[Any]) -> Iterator[tuple[str, Times]]:
    """Yield the name and the times of all that was launched."""
    from .aot import TILED
    from .launches import Launch

    for event in events:
        if isinstance(event, Launch):
            name = event.kernel.__name__
            if name in TILED:
                yield f"{name} {event.arguments.get('PEEL', '')}".strip(), over_tiles(machine, triton, event)
            elif name in BYTES_ALONE:
                seconds = machine.seconds(size(*{id(x): x for x in event.arguments.values()}.values()))
                yield name, Times(seconds, seconds)
            else:
                raise LookupError(f"the model has no rule for {name}")
        else:
            name, inputs, outputs = event
            if name in ("mm", "addmm", "addmm_"):
                yield f"{name} {tuple(outputs[0].shape)}", product(machine, name, inputs, outputs[0])
            else:
                seconds = machine.seconds(size(*inputs, *outputs))
                yield name, Times(seconds, seconds)


def rows_of(
    machine: Machine, triton: str, direction: str, n: int, d: int, limit: int, parts: bool = False
) -> Iterator[Row]:
    """Yield the times of every plan for a call, relative to three bare products at the library's rate."""
    floor = 6 * n * n * d / machine.product
    chosen = run(direction, n, d, limit, None)[0].name
    for name in PLANS:
        if name != chosen and name not in _possible(direction, d):
            continue
        plan, events = run(direction, n, d, limit, name)
        if not events:
            continue
        prices = list(priced(machine, triton, events))
        expected, worst = (sum(times) / floor for times in zip(*(times for _, times in prices), strict=True))
        yield {
            "commit": commit(ROOT), "triton": triton, "machine": machine.name, "limit_mib": limit >> 20,
            "direction": direction, "n": n, "d": d, "plan": name, "chosen": name == chosen, "block_rows": plan.rows,
            "block_cols": plan.cols, "launches": len(prices), "of_floor": round(expected, 3),
            "at_worst": round(worst, 3),
        }  # fmt: skip
        if parts:
            print(f"{direction} {n} x {d} {name}: {expected:.3f} of the floor, {worst:.3f} at worst")
            sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
            for part, times in prices:
                for i, value in enumerate((1, *times)):
                    sums[part][i] += value
            for part, (number, *seconds) in sorted(sums.items(), key=lambda item: -item[1][1]):
                print(f"    {number:4.0f} {part:40s} {seconds[0] / floor:7.3f} {seconds[1] / floor:7.3f}")


def _possible(direction: str, d: int) -> Sequence[str]:
    """Return the plans by which a call can run whatever its number of rows."""
    from fused_infonce.backends.triton import tiles

    name, _, learned = direction.partition("-")
    other = ["triangular"] if name == "self" else ["workspace"] if learned else ["onepass", "workspace"]
    return other + ["streaming"] * (d <= tiles.STREAMING_MAX_D[torch.bfloat16])


def main() -> None:
    """Print the times, and record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS)
    parser.add_argument("--triton", nargs="+", default=TRITONS[:1], help="whose machine code")
    parser.add_argument("--limit", type=int, default=1117, help="workspace in MiB; by default an H200's")
    parser.add_argument("--parts", action="store_true", help="print what each time is made of")
    parser.add_argument("--record", action="store_true", help="in benchmarks/results/model.csv")
    args = parser.parse_args()
    rows = [
        row
        for direction in args.direction
        for d in args.dim
        for n in args.rows
        for triton in args.triton
        for row in rows_of(H200, triton, direction, n, d, args.limit << 20, args.parts)
    ]
    if not args.parts:
        shown = [name for name in FIELDS if name not in ("commit", "machine", "limit_mib")]
        print(*shown, sep="\t")
        for row in rows:
            print(*(row[name] for name in shown), sep="\t")
    if args.record:
        from .aot import record

        record(HERE / "results" / "model.csv", rows, ("triton", "limit_mib", "direction", "n", "d"))


if __name__ == "__main__":
    main()
