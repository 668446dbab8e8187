"""`python -m fused_infonce.temperature` against the functions that it is made of, and what it says of mistakes."""

from __future__ import annotations

import io
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_infonce.temperature import diagnose, fit, report, sweep
from fused_infonce.temperature.__main__ import main, progress
from fused_infonce.temperature.thresholds import threshold

N, D = 90, 12


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A folder with query.npy and key.npy, swept in several chunks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "CHUNK", 32)
    query = torch.randn(N, D)
    save(query=query, key=query + 2 * torch.randn(N, D))
    return tmp_path


def save(**arrays: Tensor) -> None:
    for name, array in arrays.items():
        np.save(f"{name}.npy", array.numpy())


def load(name: str) -> Tensor:
    return torch.from_numpy(np.load(f"{name}.npy"))


def printed(capsys, *arguments: str) -> dict:
    assert main(["query.npy", "key.npy", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ("plain", torch.float16),
        ("symmetric", torch.float64),
        ("target", torch.float32),
        ("ids", torch.float32),
        ("symmetric ids", torch.float32),
    ],
)
def test_it_says_what_fit_and_sweep_find(pairs, capsys, options, dtype):
    query, key = load("query").to(dtype), load("key").to(dtype)
    arguments, given = [], {}
    if "symmetric" in options:
        arguments, given = ["--symmetric"], {"symmetric": True}
    if "target" in options:
        target = torch.randperm(N)[:50]
        query = query[target]
        save(target=target)
        arguments, given = ["--target", "target.npy"], {"target": target}
    if "ids" in options:
        ids = torch.arange(N, dtype=torch.int32) // 2
        save(ids=ids)
        arguments += ["--ids", "ids.npy"]
        given |= {"query_ids": ids, "key_ids": ids}
    save(query=query, key=key)
    said, every, best = printed(capsys, *arguments), sweep(query, key, (0.003, 3.0), **given), fit(query, key, **given)
    assert said["fit"]["temperature"] == pytest.approx(best.temperature, rel=1e-4)
    assert said["fit"]["stderr"] == pytest.approx(best.stderr, rel=1e-3)
    assert said["use"] == pytest.approx(
        {"temperature": best.temperature, "scale": 1 / best.temperature, "logit_scale": math.log(1 / best.temperature)},
        rel=1e-4,
    )
    assert said["retrieval"]["recall_at_5"] == pytest.approx(every.recall(5))
    assert said["retrieval"]["median_rank"] == pytest.approx(every.median_rank())
    assert [line["temperature"] for line in said["temperatures"] if line["temperature"] > 0.3] == [0.5]
    for line in said["temperatures"]:
        t = line["temperature"]
        assert line["nll"] == pytest.approx(every.nll(t).item(), rel=1e-5)
        assert line["ece"] == pytest.approx(every.calibration(t).ece, abs=1e-5)
        assert line["effective_negatives"] == pytest.approx(every.effective_negatives(t).median().item(), rel=1e-4)
        assert line["hardest_share"] == pytest.approx(every.hardest_share(t).median().item(), rel=1e-4)
    assert said["thresholds"]["hardest"]["error"] == pytest.approx(threshold(every.pos, every.hardest).error)
    assert (said["pairs"], said["keys"], said["dimensions"]) == (len(query), N, D)


def test_on_a_device_it_says_what_it_says_on_the_cpu(pairs, capsys, device):
    save(ids=torch.arange(N) // 2)
    here, there = (printed(capsys, "--ids", "ids.npy", "--device", where) for where in ("cpu", device))
    assert there["use"] == pytest.approx(here["use"], rel=1e-4)
    assert there["retrieval"] == here["retrieval"]


@pytest.mark.interpreter
def test_by_kernels(pairs, capsys):
    save(query=load("query")[:20], key=load("key")[:20])
    ours, kernels = (printed(capsys, "--backend", backend) for backend in ("torch", "triton"))
    assert kernels["use"] == pytest.approx(ours["use"], rel=1e-4)


def test_people_get_tables_a_verdict_and_the_value_under_its_names(pairs, capsys):
    assert main(["query.npy", "key.npy", "--temperature", "0.5"]) == 0
    said = capsys.readouterr().out
    t = fit(load("query"), load("key")).temperature
    assert "A training at 0.5 is too warm for them: the best is 0." in said
    assert f"Use temperature={t:.4g}, or scale={1 / t:.4g}, or logit_scale={-math.log(t):.4g}." in said
    (line,) = (x for x in said.splitlines() if x.endswith("yours; lightly's NTXentLoss"))
    assert line.split()[:2] == ["0.5", f"{sweep(load('query'), load('key')).nll(0.5):.4f}"]
    assert sum(line.endswith("fitted") for line in said.splitlines()) == 1
    assert "ties" not in said


def test_it_warns_of_what_is_wrong_with_a_training(pairs, capsys):
    ids = torch.arange(N) // 2
    key = load("key")
    key[1::2] = key[::2]  # copies, which ids leave out
    save(ids=ids, key=key)
    for arguments, given in (([], {}), (["--ids", "ids.npy", "--symmetric"], {"query_ids": ids, "key_ids": ids})):
        found = diagnose(load("query"), key, 0.5, symmetric=bool(given), **given)
        said = printed(capsys, "--temperature", "0.5", "--diagnose", *arguments)["diagnosis"]
        assert said["gauges"] == pytest.approx(found.gauges)
        assert [each["name"] for each in said["warnings"]] == [each.name for each in found.warnings]
        assert ("duplicates" in [each.name for each in found.warnings]) == (not given)
    assert main(["query.npy", "key.npy", "--temperature", "0.5", "--diagnose"]) == 0
    assert "duplicates (1): this share of the positives has an equal key" in capsys.readouterr().out
    assert refused(capsys, "query.npy", "key.npy", "--diagnose") == (
        "a diagnosis is of a training: give its temperature"
    )


def test_both_bounds_of_ties_are_shown_where_they_differ(pairs, capsys):
    key = load("key")
    key[N // 2 :] = key[: N // 2]
    save(key=key)
    assert main(["query.npy", "key.npy"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["retrieval", "ties", "last", "ties", "first"]
    low, high = map(float, first.split()[1:])
    assert low == 0 < high


def test_pairs_that_are_all_ranked_first_have_no_best_temperature(pairs, capsys):
    save(key=load("query") + 0.01)
    said = printed(capsys, "--temperature", "0.07")
    assert (said["use"], said["verdict"], said["fit"]["stderr"]) == (None, None, None)
    assert main(["query.npy", "key.npy"]) == 0
    assert "No temperature fits best: every pair is ranked first" in capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    assert main([*arguments]) == 2
    out, error = capsys.readouterr()
    assert not out
    return error.removeprefix("error: ").strip()


def test_files_that_cannot_be_read(pairs, capsys):
    def of(name: str) -> str:
        return refused(capsys, name, "key.npy")

    assert of("none.npy") == "none.npy: there is no such file"
    assert of(".").endswith("expected a .npy file, got a folder")
    torch.save(load("query"), "query.pt")
    assert of("query.pt").startswith("query.pt: expected a .npy file, got an archive, as of np.savez or torch.save")
    with open("query.pkl", "wb") as file:
        pickle.dump(load("query").numpy(), file)
    assert "got a pickle" in of("query.pkl")
    with open("query.csv", "w") as text:
        text.write("1,2,3")
    assert "got something else: save an array" in of("query.csv")
    with open("empty.npy", "w"):
        pass
    assert of("empty.npy").endswith("got an empty file")
    whole = (pairs / "query.npy").read_bytes()
    (pairs / "half.npy").write_bytes(whole[: len(whole) // 2])
    assert "cannot be mapped as an array, is it whole?" in of("half.npy")
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    assert "cannot be mapped as an array" in of("objects.npy")
    assert of("key.npy") == "key.npy: queries and keys are one file, in which every row is its own copy"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (np.zeros((N, D), dtype=np.int8), "query.npy: embeddings must be float16, float32, float64 in this machine's"),
        (np.zeros((N, D), dtype=">f4"), "query.npy: embeddings must be float16, float32, float64 in this machine's"),
        (np.zeros((N, D), dtype="V2"), "numpy has no bfloat16"),
        (np.ones(N, dtype=np.float32), "query.npy: embeddings must be one row each, (N, D), got shape (90,)"),
        (np.ones((0, D), dtype=np.float32), "query.npy: embeddings must be one row each, (N, D), got shape (0, 12)"),
        (np.ones((N, D + 1), dtype=np.float32), "query and key must be of one width D, got shapes (90, 13) and (90"),
        (np.ones((N + 1, D), dtype=np.float32), "without a target, row i of key is the positive of row i of query"),
        (np.ones((N, D), dtype=np.float16), "query and key must have one dtype, got torch.float16 and torch.float32"),
    ],
)
def test_embeddings_that_are_none(pairs, capsys, query, said):
    np.save("query.npy", query)
    assert said in refused(capsys, "query.npy", "key.npy")


def test_rows_that_cannot_be_compared_are_counted_and_named(pairs, capsys):
    query = load("query")
    query[[3, 70], 5] = math.nan
    query[80] = math.inf
    save(query=query)
    assert refused(capsys, "query.npy", "key.npy") == ("query.npy: 3 of 90 rows hold NaN or infinity: rows 3, 70, 80")
    query[:] = 0
    save(query=query)
    assert refused(capsys, "query.npy", "key.npy").endswith("nothing but zeros: rows 0, 1, 2, 3, 4, ...")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_whose_norm_overflows_or_vanishes_are_counted_and_named(pairs, capsys, dtype):
    query = load("query").to(dtype)
    scale = torch.ones(N, 1, dtype=dtype)
    scale[[4, 9]] = 1e30
    save(query=query * scale)
    assert refused(capsys, "query.npy", "key.npy") == (
        "query.npy: 2 of 90 rows have a norm beyond float32: divide them by something: rows 4, 9"
    )
    scale[[4, 9]] = 1e-30
    save(query=query, key=query * scale)
    said = refused(capsys, "query.npy", "key.npy")
    assert said.startswith("key.npy: 2 of 90 rows have a norm of 1e-12 or less, which counts as zero")
    assert said.endswith("rows 4, 9")
    scale[[4, 9]] = 1e-9  # which is long enough
    save(query=query, key=query * scale)
    assert main(["query.npy", "key.npy"]) == 0


def test_an_error_of_the_tables_is_told_as_any_other(pairs, capsys, monkeypatch):
    def fails(*arguments):
        raise ValueError("confidence must be in [0, 1], got nan")

    monkeypatch.setattr(report.Report, "lines", fails)
    for form in ([], ["--json"]):
        assert refused(capsys, "query.npy", "key.npy", *form).endswith("confidence must be in [0, 1], got nan")


@pytest.mark.parametrize(("error", "device"), [(AssertionError, "cuda"), (RuntimeError, "cuda"), (None, "meta")])
def test_a_device_that_cannot_be_used_is_told_before_the_files_are_read(pairs, capsys, monkeypatch, error, device):
    if error is not None:
        zeros = torch.zeros

        def without(*shape, device=None, **options):
            if device == "cuda":
                raise error("Torch not compiled with CUDA enabled\nand more")
            return zeros(*shape, device=device, **options)

        monkeypatch.setattr(torch, "zeros", without)
    said = refused(capsys, "none.npy", "key.npy", "--device", device)
    assert said.startswith(f"--device {device} cannot be used: ")
    assert "none.npy" not in said
    assert "\n" not in said


def test_options_that_do_not_fit(pairs, capsys):
    def of(*arguments: str) -> str:
        return refused(capsys, "query.npy", "key.npy", *arguments)

    assert of("--temperature", "20") == (
        "temperature must be in [0.003, 3], got 20: is it a scale, of the temperature 0.05?"
    )
    assert of("--temperature", "-1").startswith("temperature must be positive and finite")
    save(floats=torch.arange(N).double(), few=torch.arange(7), far=torch.arange(N) + 7, same=torch.zeros(N).long())
    assert of("--target", "floats.npy") == ("floats.npy: expected integers, got float64: save x.astype(np.int64)")
    assert of("--ids", "few.npy") == "few.npy: expected one integer for each key, shape (90,), got shape (7,)"
    assert of("--target", "far.npy").startswith("target must be rows of key, 0 to 89, got 90 for query 83")
    assert of("--target", "same.npy", "--symmetric").startswith("symmetric needs row i of key")
    assert of("--ids", "same.npy").startswith("no pair has a negative")
    assert "Expected one of cpu, cuda" in of("--device", "gpu")
    save(query=load("query")[:7])
    assert of("--target", "far.npy").endswith("got shape (90,), one for each key: are files the wrong way round?")
    assert of("--plot", "report.docx").startswith("the picture's name must end in one of ")
    with pytest.raises(SystemExit):
        main(["query.npy", "key.npy", "--backend", "numpy"])


def test_without_tqdm_and_without_matplotlib(pairs, capsys, monkeypatch):
    for name in ("tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fused_infonce.temperature.plots", raising=False)
    assert "pip install 'fused-infonce[plot]'" in refused(capsys, "query.npy", "key.npy", "--plot", "report.png")
    with pytest.raises(ImportError, match="pictures need matplotlib"):
        sweep(load("query"), load("key")).plot("report.png")
    assert main(["query.npy", "key.npy"]) == 0
    assert "with tqdm installed there is a progress bar" in capsys.readouterr().err


def test_a_bar_shows_each_pass_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    import tqdm

    shown = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO(), "mininterval": 0})

        def update(self, amount):
            super().update(amount)
            shown.append((self.desc, self.n, self.total))

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with progress(5) as advance:
        for amount in (3, 2, 3, 2, 5):
            advance(amount)
    assert shown == [
        ("pass 1", 3, 5), ("pass 1", 5, 5), ("pass 2: ", 3, 5), ("pass 2: ", 5, 5), ("pass 3: ", 5, 5),
    ]  # fmt: skip


def test_from_a_shell(pairs):
    command = [sys.executable, "-m", "fused_infonce.temperature", "query.npy", "key.npy", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["pairs"] == N
    assert not done.stderr  # no bar where nobody looks


def test_random_negatives_are_no_positives(pairs):
    ids = torch.arange(N) // 3
    pairs_of = report.Pairs(load("query"), load("query"), ids=ids)
    assert report.Pairs(load("query"), load("query")).random().max() < 0.999  # of a row with itself it is 1
    same = torch.nn.functional.normalize(load("query"))
    scores = (same @ same.T)[ids[:, None] != ids]
    found = pairs_of.random()
    assert 0.9 * report.RANDOM < len(found) < report.RANDOM
    torch.testing.assert_close(torch.stack([found.min(), found.max()]), torch.stack([scores.min(), scores.max()]))


def test_a_threshold_has_equal_errors():
    for case in range(60):
        generator = torch.Generator().manual_seed(case)
        pos, neg = (torch.randint(7, (1 + case % n,), generator=generator) / 4 for n in (11, 17))
        found = threshold(pos + 0.25, torch.cat([neg, torch.tensor([-math.inf])]))
        pos = pos + 0.25
        missed, taken = (pos < found.score).double().mean(), (neg >= found.score).double().mean()
        candidates = torch.cat([pos, neg]).unique()
        if (pos < candidates[-1]).double().mean() < (neg >= candidates[-1]).double().mean():
            assert found == (candidates[-1].item(), 0.5)
            continue
        assert found.error == pytest.approx((missed + taken).item() / 2)
        assert missed >= taken
        lower = candidates[candidates < found.score].max()  # the one before: the errors have not crossed there
        assert (pos < lower).double().mean() < (neg >= lower).double().mean()
    assert threshold(torch.tensor([0.8, 0.9]), torch.tensor([0.2, 0.4])) == pytest.approx((0.6, 0))
    assert math.isnan(threshold(torch.ones(3), torch.tensor([-math.inf])).score)
