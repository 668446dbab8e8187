"""Cycles that a tile costs on one processor of a GPU, counted in its machine code: a model, not a measurement.

    python -m benchmarks.tiles.pipes [--target sm_90 ...] [--dim 768 ...] [--variant bounded ...] [--record]

The 16-bit kernels are compiled ahead of time, as `benchmarks/tiles/aot.py` does, and disassembled. The code has up to
three parts: that of a program, that of each of its tiles, and the steps of a tile's product over the rows' components.
Where a program has one tile, what is before its steps, pointers and first loads, is a part "before" in place of that of
the program. Of every part are counted, for all warps of a program and each time that it runs,

    issue           four instructions a cycle
    alu             64 lanes a cycle: comparisons, selections, integers, conversions to 16 bits
    fma             128 lanes a cycle
    exponentials    16 lanes a cycle
    shared          shuffles and shared memory
    tensor          the tensor cores, at TENSOR floating-point operations a cycle

How often a tile runs a part, `times`, follows from the matrix instructions: with those of all its steps a tile must
come to its products, or the count fails. `programs` is how many fit one processor, by registers, threads, shared
and tensor memory. --record writes into benchmarks/results/pipes.csv, which benchmarks/tiles/model.py reads, in place of
the rows of the same target, D, variant and Triton, with a hash of the sources that they are of. Needs a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .. import HERE
from ..record import Row

PIPES = ("issue", "alu", "fma", "exponentials", "shared", "tensor")
ABOUT = ("sources", "triton", "target", "d", "variant", "kernel", "form", "block_m", "block_n", "block_d", "warps",
         "stages", "tma", "registers", "spilled_bytes", "shared_kib", "programs")  # fmt: skip
OF = ("triton", "target", "d", "variant")  # what is recorded at once
FIELDS = (*ABOUT, "part", "times", *PIPES)
ALU = frozenset({
    "ISETP", "FSETP", "FSEL", "SEL", "LOP3", "SHF", "LEA", "IADD3", "VIADD", "VIADDMNMX", "PRMT", "FMNMX", "PLOP3",
    "F2FP", "SGXT", "IABS", "VIMNMX", "IMNMX", "P2R", "R2P", "LOP", "MOV", "VIMNMX3", "FSET", "BMSK", "CS2R", "FLO",
    "POPC", "I2FP",
})  # fmt: skip
FMA = frozenset(("FADD", "FMUL", "FFMA"))
SHARED = frozenset(("SHFL", "LDS", "STS", "LDSM", "STSM"))
LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"(?:@!?U?P\d+\s+)?BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`\((\.L_x_\d+)\)")
GUARD = re.compile(r"^@!?U?P\w+\s+")
MATRIX = re.compile(r"\b(HGMMA|UTCHMMA)\b")
WGMMA = re.compile(r"HGMMA\.64x(\d+)x16")
TENSOR = {"sm_90": 4096, "sm_100": 8192}  # 16-bit floating-point operations a cycle of one processor
SHARED_KIB, REGISTERS, THREADS, COLUMNS = 228, 65536, 2048, 512  # of a processor of either; columns of tensor memory
DIMS = (64, 128, 256, 512, 768, 1024)
VARIANTS = (
    "bounded", "bounded columns", "bounded columns mean", "bounded views", "few bounded views", "plain", "columns",
    "few views",
)  # fmt: skip
LOOPED = ("statistics_kernel", "gradient_kernel")  # of which a program has many tiles


class Shape(NamedTuple):
    """What a tile's product is made of."""

    target: str
    kernel: str
    d: int
    block_m: int
    block_n: int

    @property
    def flops(self) -> int:
        """Return the floating-point operations of a tile: one product, or two where gradients stay in registers."""
        return 2 * self.block_m * self.block_n * self.d * (2 if self.kernel == "gradient_kernel" else 1)

    @property
    def matrix(self) -> float:
        """Return what `matrix_work` comes to over a whole tile."""
        if self.target == "sm_90":
            return self.flops
        second = self.block_n // 16 * -(-self.d // 256) if self.kernel == "gradient_kernel" else 0
        return self.d // 16 + second


def matrix_work(shape: Shape, instructions: Sequence[str], warps: int) -> int:
    """Return the matrix work in some instructions: operations on sm_90, elsewhere instructions, whose width is data."""
    if shape.target != "sm_90":
        return sum(GUARD.sub("", text).startswith("UTCHMMA") for text in instructions)
    wide = (int(found[1]) for text in instructions if (found := WGMMA.search(text)))
    return sum(64 * n * 16 * 2 for n in wide) * warps // 4  # a group of four warps each


def parsed(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the instructions up to the exit after the products, and the loops as the places of their first and last.

    What follows is out of the way: waits that are seldom run, which branch back.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    multiplied = False
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append(found[2].strip())
            multiplied |= MATRIX.search(instructions[-1]) is not None
            if multiplied and instructions[-1] == "EXIT":
                break
    branches = ((BRANCH.match(each), i) for i, each in enumerate(instructions))
    return instructions, [(labels[b[1]], i) for b, i in branches if b and labels.get(b[1], i + 1) <= i]


def cycles(instructions: Sequence[str], warps: int) -> dict[str, int]:
    """Return the cycles of each pipe but the tensor cores, for all warps of a program."""
    count: Counter[str] = Counter()
    for text in instructions:
        kind = GUARD.sub("", text).split()[0].partition(".")[0]
        count["issue"] += 1
        if kind in ALU:
            count["alu"] += 2
        elif kind in FMA:
            count["fma"] += 1
        elif kind == "IMAD":
            count["fma"] += 2
        elif kind == "MUFU":
            count["exponentials"] += 8
        elif kind in SHARED:
            count["shared"] += 2
    return {name: round(count[name] * warps / 4) for name in PIPES[:-1]}


def parts(shape: Shape, text: str, warps: int) -> Iterator[Row]:
    """Yield the parts of a disassembly, how often a tile runs each, and the cycles of each time."""
    code, loops = parsed(text)
    around = sorted((b - a, a, b + 1) for a, b in loops if matrix_work(shape, code[a : b + 1], warps))
    whole = (len(code), 0, len(code))
    _, first, last = tile = around[-1] if shape.kernel in LOOPED else whole
    _, start, end = around[0] if around and around[0] != tile else (0, last, last)
    alone = shape.kernel not in LOOPED and start < end
    pieces = {
        "program": [*code[:first], *code[last:]],
        "before": code[first:start] if alone else [],
        "tile": [*([] if alone else code[first:start]), *code[end:last]],
        "step": code[start:end],
    }
    before, after, each = (matrix_work(shape, pieces[name], warps) for name in ("before", "tile", "step"))
    once = before + after
    steps = (shape.matrix - once) / each if each else 0
    if steps != int(steps) or once + steps * each < shape.matrix:  # more where warps repeat one another's product
        raise ValueError(f"{shape}: the matrix work of a tile is {shape.matrix}, found {once} and {each} a step")
    for name, times in (("program", 0), ("before", 1), ("tile", 1), ("step", int(steps))):
        if pieces[name]:
            share = matrix_work(shape, pieces[name], warps) / shape.matrix if times else 0
            tensor = round(share * shape.flops / TENSOR[shape.target])
            yield {"part": name, "times": times, **cycles(pieces[name], warps), "tensor": tensor}


def programs(registers: int, warps: int, shared: int, columns: int) -> int:
    """Return how many programs fit one processor; shared: bytes, of which the hardware takes 1024 more a program."""
    granted = -(-registers // 8) * 8 * 32 * warps
    fits = (REGISTERS // granted, THREADS // (32 * warps), (SHARED_KIB << 10) // (shared + 1024))
    return min(*fits, COLUMNS // columns if columns else fits[0])


def form(arguments: dict[str, Any]) -> str:
    """Return which code of a kernel a launch runs, in words: what the compiler knows of it besides the tile."""
    words = [f"peel {arguments['PEEL']}"] if arguments.get("PEEL") else []
    words += ["unshifted"] if arguments.get("UNSHIFTED") else []
    words += ["mean"] if arguments.get("MEAN") else []
    words += ["columns"] if arguments.get("COLUMNS_ptr") is not None else []
    words += [side for side in "xy" if arguments.get(f"U{side.upper()}_ptr") is not None]
    words += ["diagonal"] if arguments["DIAGONAL"] else []
    words += ["target"] if arguments["TARGET"] else []
    words += ["added"] if arguments.get("ACCUMULATE") else []
    return ", ".join(words)


def counted(target: str, d: int, variant: str, found: dict[tuple[str, str, str], Any]) -> Iterator[Row]:
    """Yield the rows of every kernel over tiles that a call of this kind launches.

    found: what was compiled before, by target, source and options, since most kernels are those of any D.
    """
    import triton

    from . import aot, launches

    seen = set()
    for kernel, arguments, _ in launches.launches(launches.Case(target, "bfloat16", d, variant)):
        if kernel.__name__ not in aot.TILED or kernel.__name__.startswith("dense"):  # few scores wait for the host
            continue
        source, options = aot.specialised(kernel, arguments)
        shape = Shape(target, kernel.__name__, d, arguments["BLOCK_M"], arguments["BLOCK_N"])
        key = (target, source.hash(), str(options))
        about = {"triton": triton.__version__, "target": target, "d": d, "variant": variant,
                 "kernel": kernel.__name__, "form": form(arguments)}  # fmt: skip
        if (about["kernel"], about["form"]) in seen:
            continue
        seen.add((about["kernel"], about["form"]))
        if key not in found:
            compiled = triton.compile(source, target=aot.TARGETS[target], options=options)
            code, made = aot.machine_code(compiled), compiled.metadata
            fit = programs(code.registers, made.num_warps, made.shared, getattr(made, "tmem_size", 0))
            found[key] = code, {
                "block_m": shape.block_m, "block_n": shape.block_n, "block_d": arguments["BLOCK_D"],
                "warps": made.num_warps, "stages": made.num_stages, "tma": arguments["TMA"],
                "registers": code.registers, "spilled_bytes": code.spilled_bytes, "shared_kib": made.shared / 1024,
                "programs": fit,
            }  # fmt: skip
        code, facts = found[key]
        for part in parts(shape, code.text, facts["warps"]):
            yield {**about, **facts, **part}


def main() -> None:
    """Count, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TENSOR, default=["sm_90"])
    parser.add_argument("--dim", type=int, nargs="+", default=[768])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--record", action="store_true", help="in benchmarks/results/pipes.csv")
    args = parser.parse_args()
    from . import aot

    sources = aot.source_hash()
    found: dict[tuple[str, str, str], Any] = {}
    rows = [
        {"sources": sources, **row}
        for target in args.target
        for d in args.dim
        for variant in args.variant
        for row in counted(target, d, variant, found)
    ]
    print(*FIELDS[2:], sep="\t")
    for row in rows:
        print(*(row[name] for name in FIELDS[2:]), sep="\t")
    if args.record:
        if aot.source_hash() != sources:
            sys.exit("the sources changed meanwhile")
        aot.record(HERE / "results" / "pipes.csv", [{name: row[name] for name in FIELDS} for row in rows], OF)


if __name__ == "__main__":
    main()
