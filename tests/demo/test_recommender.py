"""The recommender's demo: the split, the metrics by hand, and a tiny run from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo's packages are absent")
pytest.importorskip("tqdm", reason="the demo's packages are absent")

from examples.recommender import data, model, train
from examples.recommender.__main__ import main

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def folder_of(tmp_path: Path, rows: list[tuple[int, int, int]]) -> Path:
    lines = [f"{user}\t{item}\t3\t{when}\n" for user, item, when in rows]
    (tmp_path / "ml-100k.inter").write_text(HEADER + "".join(lines))
    return tmp_path


def test_the_last_film_of_each_user_is_held_out(tmp_path: Path) -> None:
    rows = [(7, 30, 5), (4, 10, 1), (7, 10, 9), (4, 20, 3), (4, 30, 2), (7, 20, 9)]
    ratings = data.read(data.file_of(folder_of(tmp_path, rows)))
    assert ratings.names == (2, 3)
    assert ratings.held_out.tolist() == [1, 1]  # of two at one time, the later line
    assert sorted(zip(ratings.users.tolist(), ratings.items.tolist(), strict=True)) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert ratings.counts.tolist() == [2, 0, 2]
    torch.testing.assert_close(ratings.log_frequency, torch.tensor([0.5, 0.25, 0.5]).log())
    assert ratings.seen.tolist() == [[True, False, True]] * 2


def test_metrics_by_hand() -> None:
    names = (3, 14)
    ratings = data.Ratings(torch.tensor([0]), torch.tensor([13]), torch.tensor([2, 0, 5]), names)
    scores = torch.arange(14.0).flip(0).repeat(3, 1)
    scores[0, 13] = 100  # seen, so that it is not recommended
    scores[2, 5:12] = 50  # seven equals, of which the held-out item comes last
    found = model.ranked(scores, ratings)
    assert found.hit_rate == 1
    assert found.ndcg == pytest.approx((1 / math.log2(4) + 1 + 1 / math.log2(8)) / 3)
    assert model.ranked(-scores, ratings).hit_rate == 0


def test_the_correction_and_the_softmax_over_all_items_by_hand(tmp_path: Path) -> None:
    rows = [(user, item, 10 * user + item) for user in range(6) for item in range(user % 3, 9, 1 + user % 2)]
    ratings = data.read(data.file_of(folder_of(tmp_path, rows)))
    users, items = (model.Tower(count, 4) for count in ratings.names)
    losses = train.Losses(users, items, ratings, 0.2)
    user, item = ratings.users[::3], ratings.items[::3]
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (users(user), items(item), items.all())]
    logits = unit[0] @ unit[1].T / 0.2
    twice = (item[:, None] == item) & ~torch.eye(len(item), dtype=torch.bool)
    assert twice.any()
    for loss, wanted in (
        (losses.in_batch, logits),
        (losses.corrected, logits - (ratings.counts / ratings.counts.sum()).log()[item]),
    ):
        own = torch.nn.functional.cross_entropy(wanted.masked_fill(twice, -math.inf), torch.arange(len(item)))
        torch.testing.assert_close(loss(user, item), own)
    torch.testing.assert_close(
        losses.full(user, item), torch.nn.functional.cross_entropy(unit[0] @ unit[2].T / 0.2, item)
    )


def test_a_tiny_run_writes_its_report_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(user, (user * step) % 40, step) for user in range(1, 60) for step in range(1, 9)]
    sizes = ["--epochs", "1", "--batch", "64", "--dim", "8", "--seeds", "0", "1"]
    folder = folder_of(tmp_path, rows)
    assert main([*sizes, "--data", str(folder), "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "recommender.json").read_text())
    assert list(report["scores"]) == ["most popular", *train.NAMES]
    assert [len(scores) for scores in report["scores"].values()] == [1, 2, 2, 2]
    assert (tmp_path / "out" / "recommender.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "in-batch, corrected" in printed.out
    assert printed.err == ""  # no progress bar where there is no terminal


def test_a_missing_file_is_said_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 2
    assert "ml-100k.inter" in capsys.readouterr().err
