"""The demo: mining, splitting, metrics, encoder, costs, the saved model, and tiny runs from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's packages are absent")
pytest.importorskip("matplotlib", reason="the demo's packages are absent")
pytest.importorskip("tqdm", reason="the demo's packages are absent")

from examples.retrieval import answers, cost, evaluate, mining, model, report, saved, show, split, text
from examples.retrieval.__main__ import main
from examples.retrieval.settings import parse_arguments

WORDS = """
matrix vector tensor row column diagonal inverse rank trace norm solve factor product shape stride offset scalar
socket server client packet header request reply timeout address port session cookie proxy tunnel handshake frame
thread process queue lock event signal worker task future barrier pool pipe schedule priority latch channel
"""
TOPICS = WORDS.split()


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


def make(name: str, docstring: str) -> mining.Pair:
    pair = mining.make_pair(name, (), docstring)
    assert pair is not None
    return pair


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


def test_retrieval_scores_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]])
    scores = evaluate.retrieval_scores(similarity)
    assert scores.recall_at_1 == pytest.approx(1 / 3)
    assert scores.mrr_at_10 == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_ties_are_misses_and_rank_eleven_counts_nothing() -> None:
    assert evaluate.retrieval_scores(np.zeros((2, 2))) == evaluate.Scores(0.0, 0.5)
    scores = evaluate.retrieval_scores(np.tile(np.arange(11.0), (11, 1)))  # row i is at rank 11 - i
    assert scores.recall_at_1 == pytest.approx(1 / 11)
    assert scores.mrr_at_10 == pytest.approx(sum(1 / rank for rank in range(1, 11)) / 11)


def test_encoder_shapes_and_batches() -> None:
    torch.manual_seed(0)
    rows = model.hashed_features(["one two three", "", "read rows from a table"], bits=8)
    assert rows.shape == (3, 512)
    encoder = model.Encoder(16, bits=8).eval()
    embedded = model.embed(encoder, rows, torch.device("cpu"))
    assert embedded.shape == (3, 16)
    assert embedded.isfinite().all()
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.embed(encoder, rows, torch.device("cpu"), batch=2), embedded)


def test_contestants_agree_and_cost_something() -> None:
    costs = cost.measure_costs([], 8, 0.05, torch.device("cpu"))
    assert costs == []
    losses, times = cost._interleaved_times(33, 8, 0.05, torch.device("cpu"), seconds=0.0)
    assert losses["fused"] == pytest.approx(losses["dense"], rel=1e-5)
    assert all(len(of_one) == cost.MIN_ROUNDS and min(of_one) > 0 for of_one in times.values())


def costs_of(fused: list[float], dense: list[float], batch: int = 64, others: float | None = None) -> list[cost.Cost]:
    times = {"fused": fused, "dense": dense}
    return [cost._cost(name, batch, 8, times, None, None, 1.0) for name in cost.CONTESTANTS]


def test_spread_and_speedup_over_the_rounds() -> None:
    # Other load doubles both times of the last two rounds, and not their ratio.
    fused, dense = costs_of([1.0, 1.0, 1.0, 2.0, 2.0], [1.5, 1.5, 1.5, 3.0, 3.0])
    assert (fused.milliseconds, fused.spread) == (1000, (1000, 2000))
    assert (fused.speedup, fused.speedup_spread) == (1.5, (1.5, 1.5))
    assert dense.speedup == 1


def test_a_gain_within_the_spread_is_not_called_one() -> None:
    faster, uncertain = ([1.0] * 5, [2.0] * 5), ([1.0] * 5, [0.5, 0.5, 2.0, 2.0, 2.0])
    assert cost.faster_from(costs_of(*uncertain, 64) + costs_of(*faster, 128) + costs_of(*faster, 256)) == 128
    assert cost.faster_from(costs_of(*faster, 64) + costs_of(*uncertain, 128)) is None
    assert cost.faster_from([]) is None


def test_times_beside_other_load_decide_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.disturbed([0.02, None, 0.05]) is None
    assert cost.disturbed([0.02, 0.6, None]) == 0.6
    costs = costs_of([1.0] * 5, [2.0] * 5)
    show.print_gain(costs, None, 64, (4000.0, 4100.0), cost.step_savings(costs, 64, 4000.0))
    assert "faster from batch 64 on" in capsys.readouterr().out
    show.print_gain(costs, 0.6, 64, (4000.0, 4100.0), None)
    printed = capsys.readouterr().out
    assert "Other programs used up to 60%" in printed
    assert "faster from" not in printed


def test_the_share_of_the_processor_that_others_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0])  # the work takes 4 seconds of 2 cores, of which others use 2
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(cost.os, "cpu_count", lambda: 2)
    seconds = iter([50.0, 52.0])
    monkeypatch.setattr(cost, "_other_seconds", lambda: next(seconds))
    assert cost.with_other_load(lambda: "done") == ("done", 0.25)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_the_processor_seconds_of_others_only_grow() -> None:
    before = cost._other_seconds()
    assert sum(range(3_000_000)) > 0  # our own work
    after = cost._other_seconds()
    assert before is not None
    assert after is not None
    assert after >= before - 0.1  # /proc/stat counts in hundredths of a second a core


def test_share_of_a_training_step_that_the_loss_saves() -> None:
    costs = costs_of([0.001] * 5, [0.002] * 5, 100) + costs_of([0.010] * 5, [0.030] * 5, 1000)
    # A step of 11 ms at batch 100 leaves 10 ms for the rest, 100 ms at batch 1000.
    assert cost.step_savings(costs, 100, 11.0) == pytest.approx({100: 1 / 12, 1000: 20 / 130})
    assert cost.step_savings(costs, 77, 11.0) is None


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASK", "one thing; another;")
    assert parse_arguments([]).questions == ("one thing", "another")
    assert parse_arguments(["--ask", "mine"]).questions == ("mine",)
    assert parse_arguments([]).temperatures is None
    assert parse_arguments(["--temperatures"]).temperatures == (0.5, 0.1, 0.05, 0.02)
    monkeypatch.delenv("ASK")
    assert parse_arguments([]).questions == ()
    assert parse_arguments([]).next_command == 'make demo ASK="..."'
    # The next step repeats the settings, or the saved model would not fit them.
    assert parse_arguments(["--epochs", "1"]).next_command == "make demo ASK=\"...\" DEMO_ARGS='--epochs 1'"


@pytest.fixture
def synthetic_source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    source = tmp_path / "library"
    source.mkdir()
    definitions = []
    for number in range(80):
        a, b, c, *others = rng.permutation(TOPICS)[:9]
        definitions.append(f"def {a}_{b}({c}):\n    '''It takes {c} and {' and '.join(others)} {number}.'''\n")
    (source / "functions.py").write_text("\n".join(definitions))
    return source


def tiny_run(source: Path, output: Path, *more: str) -> int:
    sizes = ["--epochs", "1", "--batch", "32", "--dim", "16", "--held-out", "10", "--cost-batches"]
    return main([*sizes, "--device", "cpu", "--source", str(source), "--output", str(output), *more])


def test_a_tiny_run_writes_its_report_picture_and_model(
    synthetic_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = tiny_run(synthetic_source, tmp_path / "out", "--strict")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    # So little training shows little: the status of a strict run says whether every claim was.
    assert status == (0 if all(claim["shown"] for claim in written["claims"]) else 1)
    curves = next(claim for claim in written["claims"] if "reference" in claim["text"])
    assert curves["shown"]
    assert len(written["loss"]["fused"]) >= len(written["loss"]["reference"]) > 0
    assert set(written["retrieval"]) == {"untrained", "TF-IDF", "trained"}
    ranks = written["answers"]["held_out_ranks"]
    assert len(ranks) == len(written["answers"]["held_out"]) == 10
    assert ranks == sorted(ranks)
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    verdicts = [line for line in printed.out.splitlines() if line.startswith(("  right  ", "  wrong  "))]
    assert len(verdicts) == len(ranks)
    assert 'make demo ASK="..." DEMO_ARGS=' in printed.out
    assert printed.err == ""  # no progress bar where there is no terminal


@pytest.mark.parametrize(
    "more", [("--epochs", "0"), ("--batch", "4096"), ("--held-out", "1"), ("--cost-batches", "16", "32")]
)
def test_a_short_run_is_no_error(
    synthetic_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr(cost, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(cost, "_in_fresh_process", lambda *arguments: None)
    assert tiny_run(synthetic_source, tmp_path / "out", *more) == 0


def test_a_claim_that_was_not_shown_is_an_error_to_a_strict_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    claims = [report.Claim("water is wet", True, "wet"), report.Claim("R@1 above TF-IDF's", False, "0.1 and 0.2")]
    assert report.print_claims(claims, strict=True) == 1
    assert report.print_claims(claims, strict=False) == 0
    assert report.print_claims(claims[:1], strict=True) == 0
    assert "not shown  R@1 above TF-IDF's: 0.1 and 0.2" in capsys.readouterr().out


def test_questions_are_answered_from_the_saved_model(
    synthetic_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, question = tmp_path / "out", ("--ask", "what takes a tensor; and a socket")
    assert tiny_run(synthetic_source, output, *question) == 0
    first = capsys.readouterr().out
    assert f"No model is saved in {output / saved.MODEL_NAME} yet: training one." in first
    with monkeypatch.context() as patch:
        patch.setattr(answers, "train", None)  # a training now would fail
        patch.setattr(answers, "prepare", None)
        assert tiny_run(synthetic_source, output, *question) == 0
    second = capsys.readouterr().out
    assert "nothing is trained again" in second
    found = [
        printed[printed.index("\n  what takes a tensor?") : printed.index("s in all)") - 2]
        for printed in (first, second)
    ]
    assert found[0] == found[1]
    assert "and a socket?" in found[0]


def test_a_saved_model_that_does_not_fit_is_trained_again(
    synthetic_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, question = tmp_path / "out", ("--ask", "what takes a tensor", "--seed")
    for seed in ("0", "1"):
        assert tiny_run(synthetic_source, output, *question, seed) == 0
    assert "made otherwise (--seed was 0 and is 1): training again." in capsys.readouterr().out
    with (synthetic_source / "functions.py").open("a") as source:
        source.write("def added(one): 'Adds one more object to the sources that are mined.'\n")
    assert tiny_run(synthetic_source, output, *question, "1") == 0
    assert "made otherwise (sources that were read changed): training again." in capsys.readouterr().out
    (output / saved.MODEL_NAME).write_bytes(b"no model")
    assert tiny_run(synthetic_source, output, *question, "1") == 0
    assert "cannot be read" in capsys.readouterr().out
    assert [path.name for path in output.iterdir()] == [saved.MODEL_NAME]


def test_ranks_of_known_answers_by_hand() -> None:
    objects = [make(f"m.{name}", "an object that is described by six words") for name in ("p", "q", "r", "t")]
    similarities = {"first": [0.9, 0.1, 0.2, 0.3], "tied": [0.5, 0.5, 0.1, 0.0], "last": [0.0, 0.4, 0.3, 0.2]}

    class Stub:
        held_out = frozenset({objects[0].signature})
        pairs = objects

        def similarities(self, questions: list[str]) -> torch.Tensor:
            return torch.tensor([similarities[question] for question in questions])

    known = answers._ranked(Stub(), [("last", [0]), ("tied", [1]), ("first", [1, 0])])  # type: ignore[arg-type]
    assert [(one.question, one.rank) for one in known] == [("first", 1), ("tied", 2), ("last", 4)]
    assert known[0].right == objects[0].signature
    assert known[0].right_held_out
    assert known[2].first == objects[1].signature


def test_shown_held_out_pairs_are_evenly_spaced() -> None:
    pairs = [make(f"m.f{number}", "an object that is described by six words") for number in range(1000)]
    assert answers.evenly(split.Split([], pairs)).held_out == pairs[::100]
    assert answers.evenly(split.Split([], pairs[:7])).held_out == pairs[:7]


def test_a_tiny_run_at_two_temperatures(synthetic_source: Path, tmp_path: Path) -> None:
    tiny_run(synthetic_source, tmp_path / "out", "--temperatures", "0.5", "0.05")
    report = json.loads((tmp_path / "out" / "temperature.json").read_text())
    assert [one["temperature"] for one in report["temperatures"]] == [0.5, 0.05]
    for one in report["temperatures"]:
        errors = one["gradient_error"]["training batch"]
        assert 0 < errors["rounding"] <= 1.01 * errors["fused"] < 5e-3
        assert errors["fused"] < errors["dense"]
    assert (tmp_path / "out" / "temperature.png").read_bytes().startswith(b"\x89PNG")
