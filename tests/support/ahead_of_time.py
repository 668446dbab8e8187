"""Compile the default tiles as `python -m benchmarks.tiles.aot` does, and print the results as JSON.

Tensor cores are looked for in PTX, an instruction of which is one of machine code, rather than in machine code: the
disassembler needs half a second for any kernel, a third of the whole. `make tiles` looks at the machine code of every
tile of the table. Kernels that share out registers anew are disassembled, since an assembler may ignore the request.

Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[2])  # instead of this folder, which is a script's

from benchmarks.tiles import aot  # noqa: E402

TENSOR_CORE = {**aot.TENSOR_CORE, "sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma.mma_async"}
compile_case, machine_code, tool = aot.compile_case, aot.machine_code, aot.tool


def without_disassembly(kernel: Any) -> aot.MachineCode:
    if "setmaxnreg" in kernel.asm.get("ptx", ""):
        return machine_code(kernel)
    with mock.patch.object(aot, "tool", lambda name, *more: "" if name == "nvdisasm" else tool(name, *more)):
        return machine_code(kernel)


def compiled(case: aot.Case) -> list[aot.Result]:
    with (
        mock.patch.object(aot, "machine_code", without_disassembly),
        mock.patch.dict(aot.TENSOR_CORE, TENSOR_CORE),
    ):
        return compile_case(case)


if __name__ == "__main__":
    with mock.patch.object(aot, "compile_case", compiled):
        results = aot.compile_all([replace(case, widest=True) for case in aot.default_cases()])
    print(json.dumps([asdict(result) for result in results]))
