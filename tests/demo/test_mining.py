"""The data of the demo: the documented objects that it mines, their queries, and the split of pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the demo's packages are absent")
pytest.importorskip("matplotlib", reason="the demo's packages are absent")
pytest.importorskip("tqdm", reason="the demo's packages are absent")

from support.demo import TOPICS, make

from examples.retrieval import mining, split, text


def write_tree(root: Path) -> Path:
    """A package whose import would leave a trace, with every kind of object that is mined or must not be."""
    package = root / "sample"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"""open({str(root / "imported")!r}, "w").close()
raise SystemExit("imported")

class TableReader(Base):
    '''Reads a table from comma separated files on disk.'''

    def __init__(self, path, *, delimiter=","):
        pass

    def readRows(self, limit, *more):
        '''Read rows until `limit` of them were found.

        This second paragraph is not part of the pair.
        '''

    def _hidden(self):
        '''A private method that nobody should ever find.'''

async def close_all(handles, /, force=False): '''Calling close_all() will close all handles that remain open.'''

def short(): '''Too short.'''

if True:
    def nested(): '''Defined below a condition, as compatibility code often is.'''

add_docstr(sample.native, r'''native(input, *, out=None) -> Tensor

Computes something fast in another language.''')
"""
    )
    (package / "broken.py").write_text("def broken(:\n    '''Never parsed because of its syntax.'''\n")
    (package / "binary.py").write_bytes(b"\xff\xfe\x00 not text")
    (package / "dangling.py").symlink_to(package / "missing.py")
    (package / "tests" / "test_it.py").write_text(
        "def helper():\n    '''A helper of the tests, not of the package.'''\n"
    )
    return package


@pytest.fixture
def mined(tmp_path: Path) -> dict[str, mining.Pair]:
    return {pair.qualified_name: pair for pair in mining.mine(100, write_tree(tmp_path))}


def test_mining_finds_the_public_documented_objects(mined: dict[str, mining.Pair]) -> None:
    expected = ["TableReader", "TableReader.readRows", "close_all", "nested", "native"]
    assert list(mined) == [f"sample.{name}" for name in expected]
    assert mined["sample.TableReader"].arguments == ("path", "delimiter")
    assert mined["sample.TableReader.readRows"].arguments == ("limit",)
    assert mined["sample.native"].arguments == ("input", "out")
    assert mined["sample.native"].summary == "Computes something fast in another language."
    assert mined["sample.TableReader.readRows"].key == "sample table reader read rows limit"


def test_mining_never_imports(tmp_path: Path, mined: dict[str, mining.Pair]) -> None:
    assert mined
    assert not (tmp_path / "imported").exists()
    assert "sample" not in sys.modules


def test_mining_is_deterministic_also_when_it_samples(tmp_path: Path, mined: dict[str, mining.Pair]) -> None:
    package = tmp_path / "sample"
    assert mining.mine(100, package) == list(mined.values())
    sample = mining.mine(3, package)
    assert len(sample) == 3
    assert sample == mining.mine(3, package)
    assert [pair for pair in mined.values() if pair in sample] == sample


def test_worker_processes_mine_the_same(
    tmp_path: Path, mined: dict[str, mining.Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "MIN_FILES_FOR_WORKERS", 0)
    monkeypatch.setattr(mining.os, "cpu_count", lambda: 2)
    assert mining.mine(100, tmp_path / "sample") == list(mined.values())


def test_installed_packages_are_found_without_importing_them() -> None:
    assert mining.package_root("stdlib") == Path(json.__file__).parents[1]
    assert mining.package_root("numpy") == Path(np.__file__).parent
    assert mining.package_root("no_such_package_anywhere") is None


def test_queries_do_not_hold_the_name(mined: dict[str, mining.Pair]) -> None:
    assert mined["sample.close_all"].query == "calling will handles that remain open"
    assert mined["sample.TableReader"].query == "reads a table from comma separated files on disk"
    assert mined["sample.TableReader"].strict_query == "reads a from comma separated files on disk"
    assert mined["sample.TableReader.readRows"].query == "until limit of them were found"
    assert text.remove_name_words("Reading files, close to the tables", "read_table") == "files close to the"


@pytest.mark.parametrize(
    "spelling", ["read_csv", "pd.read_csv()", "ReadCSV", "read csv", "read-csvs", "_read_csv", "READ_CSV"]
)
def test_a_name_is_removed_however_it_is_spelt(spelling: str) -> None:
    assert (
        text.remove_name(f"Use {spelling} for files; to read one csv", "read_csv") == "Use for files; to read one csv"
    )


def test_part_of_a_word_is_not_the_name() -> None:
    assert text.remove_name("Resort to sorting if sorted, sort or sorter", "sort") == "Resort to if , or sorter"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return `x` as a :class:`~a.B`.\n\nMore.", "Return x as a a.B."),
        ("\n    add(a, b) -> c\n\n    The sum\n    of **both**.\n", "The sum of both."),
        ("f(a,\n  b)\n\nWrapped signature.", "Wrapped signature."),
        (".. note:: old\n\nSee https://x.org/y for it.", "See for it."),
        ("Return(s) the value.", "Return(s) the value."),
        ("   \n", ""),
    ],
)
def test_first_paragraph(docstring: str, expected: str) -> None:
    assert text.first_paragraph(docstring) == expected


def test_nothing_alike_on_both_sides_of_the_split() -> None:
    rng = np.random.default_rng(0)
    distinct = [make(f"m.object_{TOPICS[i]}", "about " + " ".join(rng.permutation(TOPICS)[:8])) for i in range(40)]
    copied = make("a.first", "returns the largest value along one axis of the array")
    copies = [
        copied,
        make("b.second", "Returns the largest value, along one axis of the array."),
        make("c.third", "returns the largest value along one given axis of the array"),
        make("c.dot", "inner product of two vectors without conjugation"),
        make("d.dot", "multiplies arrays, or matrices, element by element and adds"),
        make("e.dot", "a small round mark drawn on the canvas"),
        # Alike only once the words of the names are gone.
        make("f.lower_bound", "lower bound on unknown sizes bound lower of bound lower shapes"),
        make("g.upper", "upper on upper unknown upper sizes upper of upper shapes"),
    ]
    assert make("b.second", copies[1].summary) not in split.drop_repeats(copies)
    for seed in range(10):
        parts = split.split_pairs(distinct + copies, 20, seed)
        assert len(parts.held_out) == 20
        for related in (copies[:3], copies[3:6], copies[6:]):
            trained = sum(pair in parts.train for pair in related)
            held_out = sum(pair in parts.held_out for pair in related)
            assert held_out <= 1
            assert not (trained and held_out)
        assert parts == split.split_pairs(distinct + copies, 20, seed)
