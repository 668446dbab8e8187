"""The demo: metrics, encoder, the saved model and its answers, and tiny runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's packages are absent")
pytest.importorskip("matplotlib", reason="the demo's packages are absent")
pytest.importorskip("tqdm", reason="the demo's packages are absent")

from support.demo import TOPICS, make

from examples.retrieval import answers, cost, evaluate, model, report, saved, split
from examples.retrieval.__main__ import main
from examples.retrieval.settings import parse_arguments


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


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASK", "one thing; another;")
    assert parse_arguments([]).questions == ("one thing", "another")
    assert parse_arguments(["--ask", "mine"]).questions == ("mine",)
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
