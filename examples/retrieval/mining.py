"""(name, docstring) pairs mined from installed sources by parsing, never importing, them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .text import first_paragraph, remove_name, remove_name_words, words

PACKAGES = ("stdlib", "numpy", "torch")
# Tests and vendored copies: their docstrings describe no API.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "_internal", "_vendor", "__pycache__"}
    | {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
)
MAX_FILE_BYTES = 1_000_000
MAX_PACKAGE_BYTES = 40_000_000
MIN_WORDS = 4
MIN_STRICT_WORDS = 3
MAX_WORDS = 60
# `add_docstr(torch.abs, "...")` and `add_newdoc("numpy", "abs", "...")` document what is written in C.
DOCUMENTING_CALLS = frozenset({"add_docstr", "_add_docstr", "add_newdoc"})
# Below this many files, starting worker processes costs more than they save.
MIN_FILES_FOR_WORKERS = 200

Documented = tuple[str, tuple[str, ...], str]  # qualified name, argument names, docstring


@dataclass(frozen=True)
class Pair:
    """One documented object: `text` is the query side (its docstring without its name), `key` what to retrieve."""

    qualified_name: str
    arguments: tuple[str, ...]
    text: str
    summary: str  # the docstring's first paragraph as it was written

    @property
    def name(self) -> str:
        return self.qualified_name.rsplit(".", 1)[-1]

    @property
    def signature(self) -> str:
        return f"{self.qualified_name}({', '.join(self.arguments)})"

    @property
    def key(self) -> str:
        """Module path, class, name and argument names as words."""
        return words(" ".join((self.qualified_name, *self.arguments)))

    @property
    def query(self) -> str:
        """The docstring as words, without the whole name; single words that it shares with the name may remain."""
        return words(self.text)

    @property
    def strict_query(self) -> str:
        """The docstring as words, every word of the name removed."""
        return remove_name_words(self.text, self.name)


def mine(max_pairs: int, source: Path | None = None) -> list[Pair]:
    """Pairs of the installed packages, or of the sources below `source`, in an order that never varies."""
    jobs = sources(source)
    workers = os.cpu_count() or 1
    if len(jobs) < MIN_FILES_FOR_WORKERS or workers == 1:
        found = [pairs_of_file(*job) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, 8), mp_context=context) as pool:
            found = list(pool.map(pairs_of_file, *zip(*jobs, strict=True), chunksize=16))
    pairs = [pair for of_file in found for pair in of_file]
    if len(pairs) > max_pairs:
        # A fixed sample over all packages rather than the first ones in the alphabet.
        kept = set(sorted(range(len(pairs)), key=lambda index: _stable_hash(pairs[index].qualified_name))[:max_pairs])
        pairs = [pair for index, pair in enumerate(pairs) if index in kept]
    return pairs


def sources(source: Path | None = None) -> list[tuple[str, Path, Path]]:
    """Package, root and path of every source file to mine."""
    roots = [(source.resolve().name, source.resolve())] if source else _installed_roots()
    return [(package, root, path) for package, root in roots for path in source_files(root)]


def _installed_roots() -> list[tuple[str, Path]]:
    return [(package, root) for package in PACKAGES if (root := package_root(package)) is not None]


def package_root(package: str) -> Path | None:
    """Folder of an installed package, which is not imported: `find_spec` on a top-level name does not."""
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def source_files(root: Path) -> list[Path]:
    """Lists the Python sources below `root` in sorted order, up to a total size that bounds the time to parse them."""
    files, total = [], 0
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]):
            continue
        try:
            size = path.stat().st_size
        except OSError:
            continue
        if size > MAX_FILE_BYTES:
            continue
        total += size
        if total > MAX_PACKAGE_BYTES:
            break
        files.append(path)
    return files


def pairs_of_file(package: str, root: Path, path: Path) -> list[Pair]:
    """Pairs of one source file; none where it cannot be read or parsed."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in others' sources
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    module = list(path.relative_to(root).with_suffix("").parts)
    if module[-1] == "__init__":
        module.pop()
    prefix = ".".join(module if package == "stdlib" else [package, *module])
    candidates = (make_pair(*documented) for documented in _documented(tree.body, prefix))
    return [pair for pair in candidates if pair is not None]


def make_pair(qualified_name: str, arguments: tuple[str, ...], docstring: str) -> Pair | None:
    """Makes the pair of one object, or None where too little is left of its docstring to tell what it does."""
    summary = " ".join(first_paragraph(docstring).split()[:MAX_WORDS])
    text = remove_name(summary, qualified_name.rsplit(".", 1)[-1])
    pair = Pair(qualified_name, arguments, text, summary)
    enough = len(pair.query.split()) >= MIN_WORDS and len(pair.strict_query.split()) >= MIN_STRICT_WORDS
    return pair if enough else None


def _documented(body: Sequence[ast.stmt], prefix: str) -> Iterator[Documented]:
    """Yields the public documented objects among the statements of a module or a class."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not node.name.startswith("_") and (doc := ast.get_docstring(node, clean=False)):
                yield f"{prefix}.{node.name}", _argument_names(node.args), doc
        elif isinstance(node, ast.ClassDef):
            if node.name.startswith("_"):
                continue
            if doc := ast.get_docstring(node, clean=False):
                yield f"{prefix}.{node.name}", _constructor_arguments(node), doc
            yield from _documented(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _documented(node.body, prefix)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            documented = _documenting_call(node.value)
            if documented is not None:
                yield documented


def _argument_names(arguments: ast.arguments) -> tuple[str, ...]:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return tuple(argument.arg for argument in named if argument.arg not in {"self", "cls"})


def _constructor_arguments(node: ast.ClassDef) -> tuple[str, ...]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return _argument_names(child.args)
    return ()


def _documenting_call(call: ast.Call) -> Documented | None:
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function not in DOCUMENTING_CALLS or len(call.args) not in {2, 3}:
        return None
    # The docstring may be formatted or concatenated: its first literal holds the first paragraph.
    doc = next(filter(None, map(_string, ast.walk(call.args[-1]))), None)
    owner = [_string(argument) for argument in call.args[:-1]]
    name = ".".join(filter(None, owner)) if all(owner) else ast.unparse(call.args[0])
    if doc is None or not re.fullmatch(r"[A-Za-z_][\w.]*\.[A-Za-z]\w*", name):
        return None
    signature = re.match(rf"\s*{re.escape(name.rsplit('.', 1)[-1])}\(([^)]*)\)", doc)
    arguments = re.findall(r"(?:^|,)\s*\*{0,2}([A-Za-z_]\w*)", signature.group(1)) if signature else []
    return name, tuple(arguments), doc


def _string(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _stable_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
