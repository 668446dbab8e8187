"""Compile the kernels ahead of time, without a GPU, exactly as the launchers would launch them.

    python -m benchmarks.tiles.aot               one configuration per kernel and case of few, as JSON
    python -m benchmarks.tiles.aot --all         the whole tile table, as a table
    python -m benchmarks.tiles.aot --all --record FILE    and as CSV, with a hash of the sources it holds for

Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import ROOT
from benchmarks.tiles.launches import Case, Launch, launches

SOURCES = [*sorted((ROOT / "kernels").glob("*.py")), ROOT / "fused_infonce/backends/triton/tiles.py"]
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program may use
TENSOR_CORE = {  # what a tile of 16-bit inputs must compile to
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
TILED = (
    *("statistics_kernel", "gradient_kernel", "coefficients_kernel", "exponentials_kernel"),
    *("dense_scores_kernel", "dense_gradient_kernel"),
)
DESCRIPTORS = ("sm_90", "sm_100")  # targets that can load tiles through tensor descriptors
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
}


@dataclass(frozen=True)
class Result:
    triton: str
    target: str
    dtype: str
    d: int
    variant: str
    tma: bool
    kernel: str
    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    bound: int  # of registers a thread that is asked for; 0: none
    registers: int
    shared_kib: float
    shared_limit_kib: int
    spilled_bytes: int
    tensor_core: str
    tma_loads: int
    apart: bool  # whether registers are shared out anew among warps, which is done for warps apart alone


def source_hash() -> str:
    """Return a hash of what the sources compute: comments, docstrings and line breaks make no difference."""
    digest = hashlib.sha256()
    for path in SOURCES:
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(path.name.encode() + b"\0" + ast.unparse(tree).encode())
    return digest.hexdigest()[:16]


def specialised(fn: triton.JITFunction, arguments: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """Specialise as the just-in-time compiler does: None and 1 are constants, and divisibility by 16 is known."""
    signature, constants, attributes = {}, {}, {}

    def type_of(value: Any, path: tuple[int, ...], constant: bool, free: bool, aligned: bool = True) -> Any:
        if isinstance(value, tuple) and not constant:
            return tuple(type_of(part, (*path, i), False, False) for i, part in enumerate(value))
        if constant or value is None or (isinstance(value, int) and value == 1 and not free):
            constants[path] = value
            return "constexpr"
        if aligned and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and not free)):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
        return "fp32" if isinstance(value, float) else "i32"

    for index, parameter in enumerate(fn.params):
        value, free = arguments[parameter.name], parameter.do_not_specialize
        aligned = not parameter.do_not_specialize_on_alignment
        signature[parameter.name] = type_of(value, (index,), parameter.is_constexpr, free, aligned)
    options: dict[str, Any] = {
        name: arguments[name] for name in ("num_warps", "num_stages", "maxnreg") if name in arguments
    }
    return ASTSource(fn, signature, constants, attributes), options


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


class MachineCode(NamedTuple):
    """What a kernel compiled to."""

    registers: int  # a thread
    spilled_bytes: int  # a thread
    text: str  # its instructions


def field(name: str, text: str) -> int:
    """Return the number that follows a name and a colon."""
    found = re.search(rf"\b{name}:\s*(\d+)", text)
    assert found, f"the compiler's tools say nothing of {name}"
    return int(found[1])


def machine_code(kernel: Any) -> MachineCode:
    """Return the machine code of a compiled kernel, disassembled."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        return MachineCode(field("vgpr_count", text), field("private_segment_fixed_size", text), text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        return MachineCode(field("REG", usage), field("STACK", usage), tool("nvdisasm", "-c", file.name))


def widest(found: list[Launch]) -> list[Launch]:
    """Return of each kernel the launch that is given the most arguments, the first of several such."""
    kept: dict[str, Launch] = {}
    for launch in sorted(found, key=lambda each: -sum(x is not None for x in each.arguments.values())):
        kept.setdefault(launch.kernel.__name__, launch)
    return list(kept.values())


def compile_case(case: Case) -> list[Result]:
    results: dict[tuple[Any, ...], Result] = {}
    found = [each for each in launches(case) if not case.kernels or each.kernel.__name__ in case.kernels]
    for fn, arguments, _ in widest(found) if case.widest else found:
        src, options = specialised(fn, arguments)
        key = (fn.__name__, src.hash(), str(options))
        if key in results:
            continue
        kernel = triton.compile(src, target=TARGETS[case.target], options=options)
        code, core = machine_code(kernel), TENSOR_CORE[case.target]
        multiplied = re.search(rf"\b{re.escape(core)}", code.text + kernel.asm.get("ptx", ""))
        block_m, block_n, block_d = (arguments.get(f"BLOCK_{name}", 0) for name in "MND")
        results[key] = Result(
            triton.__version__, case.target, case.dtype, case.d, case.variant, arguments.get("TMA", False), fn.__name__,
            block_m, block_n, block_d, kernel.metadata.num_warps, kernel.metadata.num_stages,
            options.get("maxnreg") or 0, code.registers, kernel.metadata.shared / 1024, SHARED_LIMIT[case.target],
            code.spilled_bytes, core if multiplied else "", kernel.asm.get("ptx", "").count("cp.async.bulk.tensor"),
            "USETMAXREG" in code.text,
        )  # fmt: skip
    return list(results.values())


PROFILE = ("profile_kernel",)
PAIRED = ("paired_dots_kernel", "paired_statistics_kernel", "paired_gradient_kernel")


def default_cases() -> Iterator[Case]:
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        # Of float32 rows NVIDIA's have one source and no tensor cores; of two of them the recorded table is enough.
        for dtype in ("bfloat16", "float32") if target in ("sm_90", "gfx942") else ("bfloat16",):
            yield Case(target, dtype, 256, "plain")
            yield Case(target, dtype, 256, "columns", ("statistics_kernel",))
            yield Case(target, dtype, 256, "bounded views", ("statistics_kernel",))
            yield Case(target, dtype, 256, "bounded columns", ("exponentials_kernel", "combine_kernel"))
            yield Case(target, dtype, 256, "general", (*PAIRED, "finish_kernel", "parts_kernel"))
            yield Case(target, dtype, 256, "columns margin", ("dense_coefficients_kernel",))
            yield Case(target, dtype, 256, "guided", TILED)
            yield Case(target, dtype, 256, "profile of general", PROFILE)
        yield Case(target, "bfloat16", 256, "sigmoids", ("exponentials_kernel",))
        if target == "sm_90":
            yield Case(target, "bfloat16", 256, "indexed", (*PAIRED, "finish_kernel", "parts_kernel"))
        if not target.startswith("gfx"):
            yield Case(target, "tf32", 256, "bounded", TILED)
    yield Case("sm_90", "bfloat16", 256, "forward sigmoids", ("exponentials_kernel",))
    yield Case("sm_90", "bfloat16", 512, "bounded columns mean", ("statistics_kernel",))
    yield Case("sm_90", "bfloat16", 200, "plain", ("dense_gradient_kernel",))  # unaligned rows
    for target in ("sm_90", "gfx942"):
        yield Case(target, "bfloat16", 256, "learned columns", (*TILED[:1], *TILED[2:4], "combine_kernel"))
        yield Case(target, "bfloat16", 256, "biased general", (*PAIRED[1:], "exponentials_kernel", "scale_kernel"))
        yield Case(target, "bfloat16", 256, "learned general", ("exponentials_kernel", "combine_kernel"))
    for target in DESCRIPTORS:
        yield Case(target, "bfloat16", 256, "plain", TILED[:4], tma=True)
        yield Case(target, "bfloat16", 256, "columns", ("statistics_kernel",), tma=True)
        yield Case(target, "bfloat16", 256, "bounded", ("exponentials_kernel",), apart=True)


EVERY = ("plain", "columns", "general", "indexed", "guided", "bounded", "bounded columns", "bounded views", "raw",
         "raw columns", "columns margin", "biased general", "learned columns", "learned general")  # fmt: skip


def all_cases() -> Iterator[Case]:
    """Yield a row length for every entry of the table: up to 128, to 256, and longer; of "gradient" also 64 and 512.

    For sm_90 every kernel of all kinds of calls in 16 bits, of rows that are aligned and of rows that are not.
    """
    for d in (200, 256):
        for variant in EVERY:
            yield Case("sm_90", "bfloat16", d, variant, widest=True)
    for variant in ("plain", "columns", "general"):
        yield Case("sm_90", "float16", 256, variant, widest=True)
    for target in TARGETS:
        for d in (128, 256, 1024):
            for variant in ("plain", "columns", "general", "guided", "bounded", "bounded columns", "bounded views"):
                yield Case(target, "bfloat16", d, variant, TILED)
            yield Case(target, "bfloat16", d, "sigmoids", TILED)
        for variant in ("plain", "columns"):
            for d in (64, 512):
                yield Case(target, "bfloat16", d, variant, ("gradient_kernel",))
            tf32 = [] if target.startswith("gfx") else ["tf32"]  # which no launcher asks for there
            for dtype in ("float32", *tf32, "float64"):
                yield Case(target, dtype, 512, variant, TILED)
                yield Case(target, dtype, 128, variant, ("gradient_kernel",))
        for dtype in ("float32", "float64"):
            yield Case(target, dtype, 512, "sigmoids", TILED)
        yield Case(target, "bfloat16", 256, "forward sigmoids", TILED)
    for target in DESCRIPTORS:
        for variant in ("bounded", "bounded columns"):
            yield Case(target, "bfloat16", 256, variant, TILED, tma=True)
    for target in TARGETS:
        for dtype in ("bfloat16", "float32", *([] if target.startswith("gfx") else ["tf32"]), "float64"):
            for variant in ("profile", "profile of general"):
                yield Case(target, dtype, 256, variant, PROFILE)


def compile_all(cases: list[Case]) -> list[Result]:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            return [result for results in pool.map(compile_case, cases) for result in results]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="", help="a target, to compile for it alone")
    parser.add_argument("--record", type=Path, help="a CSV file, in which rows of other targets and Tritons stay")
    parser.add_argument("--hash", action="store_true", help="of the sources that a recorded table holds for")
    options = parser.parse_args()
    if options.hash:
        return print(source_hash())
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    few = (replace(case, widest=True) for case in default_cases())
    cases = [case for case in (all_cases() if options.all else few) if options.only in case.target]
    sources = source_hash()
    results = compile_all(cases)
    if source_hash() != sources:
        sys.exit("the sources changed meanwhile")
    if not options.all:
        print(json.dumps([asdict(result) for result in results]))
        return
    rows = [asdict(result) for result in results]
    print(*(f"{name[:10]:>10}" for name in rows[0]))
    for row in rows:
        print(*(f"{value!s:>10}" for value in row.values()))
    if options.record:
        record(options.record, [{"sources": sources, **row} for row in rows])


def record(path: Path, rows: list[dict[str, Any]], of: Sequence[str] = ("triton", "target")) -> None:
    """Write rows in place of those that have the same in the columns `of`."""
    made = {tuple(str(row[name]) for name in of) for row in rows}
    with path.open(newline="") as file:
        kept = [
            {name: row.get(name) for name in rows[0]}
            for row in csv.DictReader(file)
            if tuple(row.get(name) for name in of) not in made
        ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


if __name__ == "__main__":
    main()
