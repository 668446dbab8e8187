"""The examples of the documentation run, in the order in which they are read, and what they name exists."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import pytest
import torch
from support.documentation import DOCS, ROOT, blocks

import fused_infonce

PAGES = sorted(path.name for path in DOCS.glob("*.md"))
LOOP = re.compile(r"^for step in range\(\d+\):$", re.MULTILINE)
LOSSES = sorted(name for name in fused_infonce.__all__ if name.endswith("Loss"))
COMMON = {"self", "temperature", "learnable_temperature", "max_logit_scale", "reduction", "backend"}
COMMON |= {"workspace_limit", "distributed", "record"}


def run(code: str, names: dict[str, Any]) -> None:
    """Run a block; what it computes and does not keep must be a finite number.

    A training takes three steps: its second fails where the first one's graph was kept.
    """
    trains = ".step()" in code
    if trains:
        code, loops = LOOP.subn("for step in range(3):", code)
        assert loops == 1, f"a training is written as a loop, so that it takes more than one step:\n{code}"
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), "documentation", "eval"), names)
            if isinstance(value, torch.Tensor):
                assert value.dim() == 0, ast.unparse(statement)
                assert value.isfinite(), ast.unparse(statement)
        else:
            exec(compile(ast.Module([statement], []), "documentation", "exec"), names)
    if trains:
        assert names["step"] == 2
        assert names["value"].isfinite()


def test_examples_of_the_readme_run() -> None:
    """Each block by itself, as it is pasted."""
    torch.manual_seed(0)
    ran = 0
    for block in blocks("README.md"):
        run(block, {})
        ran += 1
    assert ran == 3


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("coming-from.md", "distributed.md")])
def test_examples_of_a_page_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code in blocks(f"docs/{page}"):
        run(code, names)
    if page == "plans.md":  # whose text says what is printed
        first, *others = capsys.readouterr().out.splitlines()
        assert first.startswith("onepass on the torch backend, because ")
        assert " 6 N M D FLOPs" in first
        assert len(others) == 2


def test_drop_ins_of_the_documentation_exist() -> None:
    """Their libraries need not be here: names are looked up in the sources."""
    text = "".join((DOCS / name).read_text() for name in ("coming-from.md", "temperature.md"))
    package = ROOT / "fused_infonce" / "compat"
    imports = re.findall(r"from fused_infonce\.compat\.(\w+) import (.*)", text)
    shared = {"common", "lightning_hooks"}
    assert {module for module, _ in imports} == {path.stem for path in package.glob("[!_]*.py")} - shared
    for module, names in imports:
        tree = ast.parse((package / f"{module}.py").read_text())
        defined = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        defined |= {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
        assert set(names.split(", ")) <= defined, module
    for code in blocks("docs/coming-from.md"):
        ast.parse(code)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_rows_and_an_example(name: str) -> None:
    text, code = (DOCS / "losses.md").read_text(), "".join(blocks("docs/losses.md"))
    rows = re.findall(rf"^\| `{name}` \|.*\|$", text, re.MULTILINE)
    assert len(rows) == 2, "a row that says what it computes, and one with its options"
    assert f"{name}(" in code


@pytest.mark.parametrize("name", LOSSES)
def test_the_options_of_a_loss_are_those_of_its_constructor(name: str) -> None:
    section = (DOCS / "losses.md").read_text().partition("## Options")[2].partition("\n## ")[0]
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", section, re.MULTILINE)
    parameters = inspect.signature(getattr(fused_infonce, name).__init__).parameters
    assert sorted(re.findall(r"`(\w+)`", row)) == sorted(set(parameters) - COMMON)
    positional = [x for x in parameters if parameters[x].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    taken = {"FusedInfoNCELoss": 3, "MatryoshkaLoss": 4, "ClipLoss": 0, "SigLipLoss": 0}
    assert len(positional) - 1 == taken.get(name, 1)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)])
def test_links_and_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+?)(?:#[\w-]*)?\)", text):
        assert link.startswith("http") or (folder / link).exists(), link
    for path in re.findall(r"`((?:benchmarks|docs|examples|tests|fused_infonce|kernels)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
