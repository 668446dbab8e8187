"""The rule of the house: a thing lives on the lowest floor that it can, and imports only from floors below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A folder or file of the package, from the ground up; kernels/ is installed as fused_infonce.kernels.
FLOORS = (
    "kernels", "backends", "contrast", "checks", "distributed", "compose", "temperature", "losses", "functional",
    "wrappers", "compat", "__init__",
)  # fmt: skip
MODULES = {
    ".".join(("fused_infonce", *path.relative_to(base).with_suffix("").parts)): path
    for base in (ROOT / "fused_infonce", ROOT)
    for path in sorted(base.rglob("*.py") if base != ROOT else (ROOT / "kernels").rglob("*.py"))
}
LONG_KERNELS = {"statistics_kernel", "exponentials_kernel"}  # straight down one tile, which a helper would hide
MOST_LINES, LONGEST_BODY = 400, 60


def floor(module: str) -> str:
    """Return the folder, or the file beside the folders, that a module of the package lives in."""
    _, first, *_ = module.split(".")
    return first


def imported(module: str, tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import in a file; the name is "" where a module as a whole is imported."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                is_module = whole in MODULES or f"{whole}.__init__" in MODULES
                yield (whole, "") if is_module else (source, alias.name)


def own(module: str) -> Iterator[tuple[str, str]]:
    """Yield what a module imports from the package."""
    for source, name in imported(module, ast.parse(MODULES[module].read_text())):
        if source.split(".")[0] == "fused_infonce":
            yield (source if "." in source else f"{source}.__init__"), name


def test_every_module_has_a_floor():
    assert {floor(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_floor_and_those_below(module):
    height = FLOORS.index(floor(module))
    above = [(source, name) for source, name in own(module) if FLOORS.index(floor(source)) > height]
    assert not above


@pytest.mark.parametrize("module", [name for name in MODULES if floor(name) == "kernels"])
def test_kernels_import_triton_and_each_other_alone(module):
    sources = {source for source, _ in imported(module, ast.parse(MODULES[module].read_text()))}
    assert {source.split(".")[0] for source in sources if floor_or_none(source) != "kernels"} <= {"triton"}


def floor_or_none(module: str) -> str | None:
    return floor(module) if module.startswith("fused_infonce.") else None


def test_only_launchers_import_kernels():
    users = {module for module in MODULES if any(floor(source) == "kernels" for source, _ in own(module))}
    assert {module.rsplit(".", 1)[0] for module in users} == {"fused_infonce.backends.triton", "fused_infonce.kernels"}


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_crosses_files_of_losses(module):
    """A loss may call another's public function; compat and wrappers build on public names too."""
    if floor(module) in ("losses", "functional", "wrappers", "compat", "__init__"):
        assert not [(source, name) for source, name in own(module) if name.startswith("_") and source != module]


# What a loss may know of the floor of devices: nothing of any one device.
SHARED = {"contract", "indexing", "plan", "precision", "recording", "row_losses", "rows"}


@pytest.mark.parametrize("module", [name for name in MODULES if floor(name) in ("losses", "wrappers", "compat")])
def test_losses_know_no_device(module):
    used = {source for source, _ in own(module) if floor(source) == "backends"}
    assert used <= {"fused_infonce.backends", *(f"fused_infonce.backends.{name}" for name in SHARED)}


def test_the_public_names_are_those_of_the_package():
    """`functional` and `__init__` import losses and define nothing."""
    for module in ("fused_infonce.functional", "fused_infonce.__init__"):
        tree = ast.parse(MODULES[module].read_text())
        kinds = {type(node) for node in tree.body}
        assert kinds <= {ast.ImportFrom, ast.Import, ast.Assign, ast.AugAssign, ast.Expr}, module  # __all__ += ...


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MOST_LINES
    functions = [x for x in ast.walk(ast.parse(text)) if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {function.name for function in functions if lines_of_body(function) > LONGEST_BODY}
    assert long <= LONG_KERNELS if floor(module) == "kernels" else not long


def lines_of_body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function from the first statement after its docstring to its end."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_a_long_body_and_an_import_from_above_would_be_found():
    long = "def f():\n    'doc'\n" + "    x = 1\n" * (LONGEST_BODY + 1)
    (function,) = ast.parse(long).body
    assert isinstance(function, ast.FunctionDef)
    assert lines_of_body(function) == LONGEST_BODY + 1
    tree = ast.parse("from ..losses import info_nce\nfrom .. import contrast\nfrom ..losses.clip import _pairs")
    assert list(imported("fused_infonce.compose.rows", tree)) == [
        ("fused_infonce.losses.info_nce", ""), ("fused_infonce.contrast", ""), ("fused_infonce.losses.clip", "_pairs"),
    ]  # fmt: skip
