"""Measures of the house: frames of a call, files that a loss touches, lines of the product.

    python -m benchmarks.house [--tree PATH] [--record] [--loss NAME]

- frames: Python frames of the package between a user's `FusedInfoNCELoss()(query, key)` and the launch of the first
  Triton kernel, the one that launches it included, and how many files they lie in. The kernels are interpreted.
- lines: of fused_infonce/ and kernels/, not blank, in all and without comments and docstrings.
- functions whose body has more than 60 lines, its docstring not counted.
- files of fused_infonce/, docs/, tests/ and the README that name a loss's function: about what a new loss touches.

`--record` appends them to benchmarks/results/house.csv. Any tree of this product can be measured, an older one too.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

from . import ROOT
from .record import append, commit

FIELDS = ("commit", "metric", "value")
LONG = 60  # lines of a body
PRODUCT = ("fused_infonce", "kernels")
PLACES = ("fused_infonce", "docs", "tests", "README.md")
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")  # which have no frames from Python 3.12 on
UNSEEN = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Run in a process of its own, where the tree's package is installed and its kernels are interpreted.
TRACE = """
import json, sys
from pathlib import Path
import torch
from triton.runtime.interpreter import InterpretedFunction
import fused_infonce

package = str(Path(fused_infonce.__file__).parent)

class Launched(BaseException):
    pass

def launched(*_, **__):
    frame, found = sys._getframe(1), []
    while frame:
        code = frame.f_code
        if code.co_filename.startswith(package):
            found.append((str(Path(code.co_filename).relative_to(package)), code.co_name, frame.f_lineno))
        frame = frame.f_back
    print(json.dumps(found[::-1]))
    raise Launched

InterpretedFunction.run = launched
query, key = torch.randn(2, 256, 128)
loss = fused_infonce.FusedInfoNCELoss(backend="triton")
try:
    loss(query.requires_grad_(), key.requires_grad_())
except Launched:
    sys.exit()
sys.exit("no kernel was launched")
"""


def frames(tree: Path) -> list[tuple[str, str, int]]:
    """The frames of the package from a user's call to the first launch: file, function and line, the outermost first.

    Raises:
        SystemExit: the call fails, with what it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(tree / "fused_infonce", site / "fused_infonce", ignore=ignored)
        shutil.copytree(tree / "kernels", site / "fused_infonce" / "kernels", ignore=ignored)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        run = subprocess.run(
            [sys.executable, "-c", TRACE], env=environment, cwd=folder, capture_output=True, text=True, check=False
        )
    if run.returncode:
        sys.exit(f"the call of {tree} failed:\n{run.stdout}{run.stderr}")
    found = [(file, name, line) for file, name, line in json.loads(run.stdout.splitlines()[-1])]
    return [frame for frame in found if frame[1] not in COMPREHENSIONS]


def sources(tree: Path) -> list[Path]:
    """The Python files of the product."""
    return [path for part in PRODUCT for path in sorted((tree / part).rglob("*.py"))]


def docstrings(module: ast.Module) -> Iterator[ast.Expr]:
    """The docstrings of a module, its classes and functions."""
    for node in ast.walk(module):
        if isinstance(node, (ast.Module, ast.ClassDef, Function)) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield first


def lines(text: str) -> int:
    """The number of lines that are not blank."""
    return sum(bool(line.strip()) for line in text.splitlines())


def code_lines(text: str) -> int:
    """The number of lines with code: neither blank nor of a comment or docstring alone."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in UNSEEN:
            found |= {*range(token.start[0], token.end[0] + 1)}
    for node in docstrings(ast.parse(text)):
        found -= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return len(found)


def long_functions(text: str) -> list[tuple[str, int]]:
    """Functions whose body is long, with its number of lines."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if length > LONG:
                found.append((node.name, length))
    return found


def naming(tree: Path, loss: str) -> dict[str, list[Path]]:
    """The files that name a function, by the part of the tree."""
    word = re.compile(rf"\b{re.escape(loss)}\b")
    found: dict[str, list[Path]] = {}
    for place in PLACES:
        start = tree / place
        files = [start] if start.is_file() else sorted(p for p in start.rglob("*") if p.suffix in (".py", ".md"))
        found[place] = [path.relative_to(tree) for path in files if word.search(path.read_text(encoding="utf-8"))]
    return found


def measured(tree: Path, loss: str) -> dict[str, int]:
    """Every metric of a tree, by name; the particulars are printed."""
    path = frames(tree)
    print("frames:", *(f"  {file}:{line} {name}" for file, name, line in path), sep="\n")
    texts = {source: source.read_text(encoding="utf-8") for source in sources(tree)}
    long = [(source, *each) for source, text in texts.items() for each in long_functions(text)]
    print(f"functions over {LONG} lines:", *(f"  {s.relative_to(tree)} {name}: {n}" for s, name, n in long), sep="\n")
    named = naming(tree, loss)
    print(f"files that name {loss}:", *(f"  {file}" for files in named.values() for file in files), sep="\n")
    return {
        "frames from the call to the first kernel": len(path),
        "files of these frames": len({file for file, *_ in path}),
        "files of the product": len(texts),
        "lines of the product": sum(map(lines, texts.values())),
        "lines of code of the product": sum(map(code_lines, texts.values())),
        f"functions over {LONG} lines": len(long),
        **{f"files of {place} that name {loss}": len(files) for place, files in named.items()},
        f"files that name {loss}": sum(map(len, named.values())),
    }


def main() -> None:
    """Measure a tree, print the metrics, and record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the root of a checkout; default: this one")
    parser.add_argument("--loss", default="decoupled_info_nce", metavar="NAME", help="a public function")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/house.csv")
    args = parser.parse_args()
    tree = args.tree.resolve()
    found = measured(tree, args.loss)
    print()
    for metric, value in found.items():
        print(f"{value:6}  {metric}")
    if args.record:
        of = commit(tree)
        append("results/house.csv", [dict(zip(FIELDS, (of, *row), strict=True)) for row in found.items()], FIELDS)


if __name__ == "__main__":
    main()
