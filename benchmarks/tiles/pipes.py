"""Cycles that a tile costs on one processor of a Hopper GPU, counted in its machine code: a model, not a measurement.

    python -m benchmarks.tiles.pipes [--dim 768 ...] [--variant bounded ...] [--record]

The 16-bit kernels are compiled ahead of time for sm_90, as tests/support/aot.py does, and disassembled. The code has
three parts: before the largest loop, the loop, and after it. Of each are counted, for all warps of a program,

    issue           four instructions a cycle
    alu             64 lanes a cycle: comparisons, selections, integers, conversions to 16 bits
    fma             128 lanes a cycle
    exponentials    16 lanes a cycle
    shared          shuffles and shared memory
    tensor          4096 bfloat16 FLOPs a cycle

and the largest bounds the part. Of coefficients and exponentials the loop is the product, once for each BLOCK_D
components, and what comes after is the epilogue; of statistics the loop is a whole tile. A product and an epilogue
overlap only where two programs fit one processor, which is so up to 128 registers of 8 warps. --record appends to
benchmarks/results/pipes.csv. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from .. import ROOT
from ..record import append, commit

FIELDS = ("commit", "triton", "d", "variant", "kernel", "peel", "block_m", "block_n", "registers", "spilled_bytes",
          "part", "issue", "alu", "fma", "exponentials", "shared", "tensor")  # fmt: skip
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
VARIANTS = ("bounded", "bounded columns", "bounded views", "plain", "columns")


def parsed(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions of a disassembly, and its loops as the places of their first and last."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append(found[2].strip())
    branches = ((BRANCH.match(each), i) for i, each in enumerate(instructions))
    loops = [(labels[b[1]], i) for b, i in branches if b and labels.get(b[1], i + 1) <= i]
    return instructions, loops


def cycles(instructions: Sequence[str], warps: int) -> dict[str, int]:
    """The cycles of each pipe for all warps of a program."""
    count: Counter[str] = Counter()
    for text in instructions:
        name = GUARD.sub("", text).split()[0]
        kind = name.partition(".")[0]
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
        elif kind == "HGMMA" and (shape := re.search(r"64x(\d+)x16", name)):
            count["tensor"] += int(shape[1]) * 64 * 16 * 2 // 4096
    return {name: round(count[name] * warps / 4) for name in FIELDS[FIELDS.index("issue") :]}


def parts(text: str, warps: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The cycles before, in and after the largest loop of a disassembly."""
    instructions, loops = parsed(text)
    first, last = max(loops, key=lambda loop: loop[1] - loop[0]) if loops else (0, -1)
    yield "before", cycles(instructions[:first], warps)
    yield "loop", cycles(instructions[first : last + 1], warps)
    yield "after", cycles(instructions[last + 1 :], warps)


def counted(d: int, variant: str) -> Iterator[dict[str, Any]]:
    """The rows of every kernel over tiles that a call of this kind launches."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import aot
    import triton

    seen = set()
    for kernel, arguments in aot.launches(aot.Case("sm_90", "bfloat16", d, variant)):
        if kernel.__name__ not in aot.TILED:
            continue
        source, options = aot.specialised(kernel, arguments)
        if (source.hash(), str(options)) in seen:
            continue
        seen.add((source.hash(), str(options)))
        compiled = triton.compile(source, target=aot.TARGETS["sm_90"], options=options)
        registers, spilled, _ = aot.inspect(aot.Case("sm_90", "bfloat16", d, variant), compiled)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = aot.tool("nvdisasm", "-c", file.name)
        row = {
            "triton": triton.__version__, "d": d, "variant": variant, "kernel": kernel.__name__,
            "peel": arguments.get("PEEL", ""), "block_m": arguments["BLOCK_M"], "block_n": arguments["BLOCK_N"],
            "registers": registers, "spilled_bytes": spilled,
        }  # fmt: skip
        for part, found in parts(text, compiled.metadata.num_warps):
            yield {**row, "part": part, **found}


def main() -> None:
    """Count, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, nargs="+", default=[768])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/pipes.csv")
    args = parser.parse_args()
    rows = [
        {"commit": commit(ROOT), **row} for d in args.dim for variant in args.variant for row in counted(d, variant)
    ]
    print(*FIELDS[2:], sep="\t")
    for row in rows:
        print(*(row[name] for name in FIELDS[2:]), sep="\t")
    if args.record:
        append("results/pipes.csv", rows, FIELDS)


if __name__ == "__main__":
    main()
