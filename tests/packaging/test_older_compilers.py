"""PyTorch 2.9 records the losses and Triton 3.6 compiles the kernels: sources avoid what they cannot.

The tests that compile show it where they run with these releases; these do with any.
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


KERNELS = sorted((ROOT.parent / "kernels").glob("*.py"))


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


def without_values(tree: ast.AST) -> Iterator[str]:
    """Yield the functions that return what is or may be None, of which Triton 3.6 makes no value."""
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        nothing, returned = {"None"}, set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and "None" in parts(node.value):
                nothing.update(*map(parts, node.targets))
            elif isinstance(node, ast.Return) and node.value is not None:
                returned.update(parts(node.value))
        if nothing & returned:
            yield f"{function.name}: {', '.join(sorted(nothing & returned))}"


def parts(node: ast.expr) -> list[str]:
    return [ast.unparse(x) for x in (node.elts if isinstance(node, ast.Tuple) else [node])]


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_triton_3_6_knows_what_kernels_return(source):
    assert not list(without_values(ast.parse(source.read_text())))


def test_a_pointer_to_nothing_would_be_found():
    text = "def f(x):\n    a, b = None, None\n    if x: a, b = x, x\n    return a, b\ndef g(): return None"
    assert len(list(without_values(ast.parse(text)))) == 2
