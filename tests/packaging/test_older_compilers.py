"""`torch.compile` of PyTorch 2.9 records the losses: their sources avoid what it cannot.

The tests that compile show it where they run with that release; this one does with any.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "fused_infonce"
RECORDED = ("losses", "temperature", "compose", "distributed", "contrast.py", "checks.py", "backends")
BEHIND_OPERATORS = ("backends/torch", "backends/triton")  # which nothing records
SOURCES = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] in RECORDED
    and not path.relative_to(ROOT).as_posix().startswith(BEHIND_OPERATORS)
]


def unknown(tree: ast.AST) -> Iterator[str]:
    """Yield what the compiler of PyTorch 2.9 refuses, or takes for something else."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "NamedTuple" for base in node.bases):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            if any(ast.unparse(x) == "property" for each in methods for x in each.decorator_list):
                yield f"a property of the NamedTuple {node.name}"
        elif isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            if text == "zip" and any(x.arg == "strict" and ast.unparse(x.value) == "False" for x in node.keywords):
                yield f"line {node.lineno}: zip(strict=False), which it takes for strict=True"
            elif text == "isinstance" and isinstance(node.args[1], ast.BinOp):
                yield f"line {node.lineno}: isinstance of a union, in place of a tuple of types"


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_the_compiler_of_torch_2_9_knows_what_it_records(source):
    assert not list(unknown(ast.parse((ROOT / source).read_text())))


def test_what_it_does_not_know_would_be_found():
    text = "class A(NamedTuple):\n    @property\n    def b(self): ...\nzip(a, b, strict=False)\nisinstance(a, b | c)"
    assert len(list(unknown(ast.parse(text)))) == 3
