"""The benchmarks' own arithmetic and bookkeeping, without a GPU and without timing anything."""

import subprocess
import sys
import time
import types

import pytest
import torch
from support.helpers import newer_interpreter

pytest.importorskip("pandas", reason="the packages of the benchmarks are absent")
pytest.importorskip("matplotlib", reason="the packages of the benchmarks are absent")
pytest.importorskip("tqdm", reason="the packages of the benchmarks are absent")

import fused_infonce
from benchmarks import ROOT, compare, contestants, dense, house, losses, plot, record
from benchmarks.cases import OURS, Case
from benchmarks.contest import Contest
from benchmarks.suites import gpu
from benchmarks.suites import test_microbenchmarks as micro
from benchmarks.tiles import tune
from fused_infonce.backends.triton import tiles

CPU = torch.device("cpu")
ROW = {
    **dict.fromkeys(record.FIELDS, ""), "date": "2026-01-02", "device": "a CPU", "torch": "2.13.0",
    "loss": "info_nce", "direction": "one", "n": 512, "m": 512, "d": 64, "dtype": "float32", "pass": "fwd_bwd",
    "contestant": "dense", "median_ms": "2.5", "peak_extra_mib": "8.0",
}  # fmt: skip


def rows_of(tmp_path, *changes):
    path = tmp_path / "a.csv"
    record.append(path, [ROW | change for change in changes])
    return record.read([path])


class TestPlot:
    def test_numbers_and_those_who_could_not_run(self, tmp_path):
        timed, absent = rows_of(tmp_path, {}, {"median_ms": "out of memory", "peak_extra_mib": ""})
        assert (timed["n"], timed["d"], timed["median_ms"], timed["peak_extra_mib"]) == (512, 64, 2.5, 8.0)
        assert (absent["median_ms"], absent["peak_extra_mib"], absent["said"]) == (None, None, "out of memory")

    def test_other_tables_are_not_read(self, tmp_path):
        (tmp_path / "b.csv").write_text("registers,spills\n1,2\n")
        assert record.read([tmp_path / "b.csv"]) == []

    def test_the_newest_row_of_a_case_contestant_and_device(self, tmp_path):
        rows = rows_of(
            tmp_path, {"median_ms": "1"}, {"median_ms": "2"}, {"median_ms": "3", "date": "2026-01-01"},
            {"median_ms": "4", "contestant": "floor"}, {"median_ms": "5", "device": "another"},
            {"median_ms": "6", "n": 8},
        )  # fmt: skip
        assert [row["median_ms"] for row in record.newest(rows)] == [2, 4, 5, 6]

    def test_the_width_with_the_most_sizes(self, tmp_path):
        rows = rows_of(
            tmp_path, {}, {"n": 1024, "d": 64}, {"d": 768}, {"n": 512, "d": 768}, {"d": 96}, {"n": 1, "d": 96}
        )
        assert plot.widest_sweep(rows) == 96

    def test_pictures(self, tmp_path):
        sizes = [{"n": n, "m": n, "median_ms": str(n / 100)} for n in (512, 1024, 2048)]
        both = [size | {"direction": direction} for size in sizes for direction in ("one", "self")]
        floor = [size | {"contestant": "floor"} for size in both]
        absent = {"n": 4096, "m": 4096, "median_ms": "out of memory"}
        alone = {"pass": "fwd"}  # one size: nothing to draw
        rows = rows_of(tmp_path, *both, *floor, absent, alone)
        (drawn,) = plot.pictures(rows, tmp_path / "out")
        assert drawn.name == "cpu_time_memory_float32_fwd_bwd.png"
        assert drawn.read_bytes().startswith(b"\x89PNG")
        found = plot.panels([row for row in rows if row["pass"] == "fwd_bwd"])
        assert list(found) == ["one", "self"]
        assert list(found["self"]) == ["floor", "dense"]
        assert [plot.total_rows(row) for row in found["self"]["floor"]] == [1024, 2048, 4096]


@pytest.mark.parametrize("arch", [*tune.SHARED_KIB])
@pytest.mark.parametrize("kernel", tune.WORKLOADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tile_candidates(arch, kernel, dtype):
    """Valid, near the table's, which is the first, without duplicates, and each as the table would hand it out."""
    for d in (64, 100, 256, 512):
        found = tune.candidates(arch, kernel, dtype, d)
        assert found[0] == tiles.tile(arch, kernel, dtype, d)
        assert len(found) == len(set(found)) > 1
        for tile in found:
            sizes = (tile.block_m, tile.block_n, tile.block_d)
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
            assert tile.block_d <= tiles.power_of_two(d)
            assert kernel != "gradient" or tile.block_d >= d
            assert tile.warps in (4, 8)
            assert sum(a != b for a, b in zip(tile[:5], found[0][:5], strict=True)) <= 2
            assert 1 <= tile.stages <= tune.MOST_STAGES
            with tune.instead(tile, arch, kernel, dtype):
                assert tiles.tile(arch, kernel, dtype, d) == tile
        assert found[0] == tiles.tile(arch, kernel, dtype, d)  # the table is as it was


@pytest.mark.interpreter
@newer_interpreter
@pytest.mark.parametrize("name", tune.WORKLOADS)
def test_tuning_runs_the_launchers(name, triton_device):
    """With a stopwatch that prefers the second candidate; every candidate must compute what the table's does."""
    pytest.importorskip("triton")
    times = iter([3.0, 1.0, *[2.0] * 1000])
    arch, device = tiles.architecture(torch.device(triton_device)), torch.device(triton_device)

    def timer(run):
        run()
        return next(times)

    with pytest.MonkeyPatch.context() as patch:
        few = tune.candidates(arch, name, torch.float32, 40)[:8]
        patch.setattr(tune, "candidates", lambda *_: few)
        records = tune.tune(arch, name, torch.float32, 40, 40, device, time.monotonic() + 60, timer)
    assert [record["outcome"] for record in records] == ["ok"] * len(few)
    assert len({record["tile"] for record in records}) == len(few) == 8
    assert tune.best(records) is records[1]
    assert tune.best(records[:1]) is records[0]


def test_a_candidate_that_computes_something_else_is_not_timed(monkeypatch):
    pytest.importorskip("triton")
    results = iter([[torch.ones(3)], [torch.ones(3) + 1e-9], [2 * torch.ones(3)]])
    monkeypatch.setattr(tune, "workload", lambda *_: None)
    monkeypatch.setattr(tune, "result", lambda *_: next(results))
    monkeypatch.setattr(tune, "candidates", lambda *_: [tiles.Tile(16, 16, 16, 4, 1)] * 4)
    records = tune.tune("sm_90", "statistics", torch.float32, 8, 8, CPU, time.monotonic() + 60, lambda _: 1.0)
    assert [record["outcome"].split(":")[0] for record in records] == ["ok", "ok", "wrong", "StopIteration"]
    assert [record["median_ms"] for record in records] == [1.0, 1.0, "", ""]


def test_proposed_rows_are_those_of_the_table():
    small, large = tiles.Tile(128, 64, 64, 8, 2), tiles.Tile(128, 128, 64, 8, 3)
    text = tune.pasted({64: small, 128: small, 256: large}, "statistics")
    assert text == "((128, Tile(128, 64, 64, 8, 2)), (None, Tile(128, 128, 64, 8, 3)),)"
    assert eval(text, {"Tile": tiles.Tile}) == ((128, small), (None, large))
    assert eval(tune.pasted({64: small}, "gradient"), {"Tile": tiles.Tile}) == ((64, small._replace(block_d=16)),)
    for odd in (large._replace(registers=128), large._replace(tma=True, registers=128), large._replace(apart=True)):
        assert eval(tune.written(odd), {"Tile": tiles.Tile}) == odd


@pytest.mark.interpreter
def test_exponentials_are_tuned_as_they_are_launched():
    """Unshifted, and in 16 bits finite; the states are those of the rows, summed over the tiles."""
    pytest.importorskip("triton")
    c, states = tune.workload("exponentials", torch.bfloat16, 33, 16, CPU)()
    assert c.shape == (33, 33)
    assert states.shape == (1, 3, 33)
    assert c.isfinite().all()
    exponentials = c.double().masked_fill(torch.eye(33, dtype=torch.bool), 0)
    assert exponentials.gt(0).sum() == 33 * 32
    assert states.isfinite().all()


def test_proposals_are_rows_of_the_table(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "architecture", lambda _: "sm_90")
    record = {"tile": tiles.Tile(128, 64, 64, 8, 3), "outcome": "ok", "median_ms": 1.0, "default_ms": 1.0}
    monkeypatch.setattr(tiles, "processors", lambda _: 132)
    monkeypatch.setattr(tune, "tune", lambda *_: [record])
    monkeypatch.setattr(tune, "compile_candidates", lambda *_: {})
    monkeypatch.setattr(tune, "alive", lambda _: True)
    monkeypatch.setattr(tune, "target", lambda: None)
    monkeypatch.setattr(sys, "argv", ["it", "--kernel", "exponentials", "--dim", "256"])
    tune.main()
    row = '"sm_90": {"exponentials": {"half": ((None, Tile(128, 64, 64, 8, 3)),)}},'
    assert capsys.readouterr().out.splitlines()[-1] == row


@pytest.mark.parametrize("module", [tune, gpu], ids=lambda module: module.__name__)
def test_without_a_gpu(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["it"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code != 0
    assert "needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["it", "--list"])
    module.main()
    assert len(capsys.readouterr().out.splitlines()) > 50


def test_benchmarks_find_the_installed_package_from_the_root():
    """As `python -m` starts them: with the repository root first on the path."""
    program = "import importlib.util, benchmarks; print(importlib.util.find_spec('fused_infonce').origin)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fused_infonce.__file__


def test_provenance_without_programs(monkeypatch, tmp_path):
    provenance = record.provenance.__wrapped__
    monkeypatch.setenv("FUSED_INFONCE_COMMIT", "abc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance(CPU)["commit"] == "abc"
    monkeypatch.delenv("FUSED_INFONCE_COMMIT")
    assert provenance(CPU)["commit"] == ""
    monkeypatch.setattr(record, "_output", lambda *_, **__: "what git says")
    assert provenance(CPU)["commit"] == "what git says"
    monkeypatch.setenv("FUSED_INFONCE_COMMIT", "of another tree")
    assert provenance(CPU)["commit"] == "of another tree"


class TestPeers:
    def test_one_that_cannot_be_loaded_is_named(self, monkeypatch, capsys):
        def make():
            raise OSError("no such library")

        monkeypatch.setitem(contestants.PEERS, "one", {"bad": ("cpu", make), "dense": ("cpu", lambda: dense.info_nce)})
        assert contestants.available.__wrapped__("one", "cpu") == {"dense": dense.info_nce}
        assert "bad is left out: OSError: no such library" in capsys.readouterr().err

    def test_inf_cl(self, monkeypatch):
        """With a stand-in that has the signature, the shapes and the default of version 1.2.1."""

        def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
            q, k = (x.view(len(x), -1, head_dim).flatten(1) for x in (q, k))
            logits = scale * q @ k.T
            return logits.logsumexp(1) - logits.diagonal()

        monkeypatch.setitem(sys.modules, "inf_cl", types.SimpleNamespace(cal_flash_loss=cal_flash_loss))
        loss = contestants.inf_cl()
        for d in (64, 256, 512, 768):
            query, key = torch.randn(2, 5, d)
            torch.testing.assert_close(loss(query, key), dense.info_nce(query, key))
        with pytest.raises(ValueError, match="power of two or a multiple of 256, got 96"):
            loss(*torch.randn(2, 5, 96))


class TestMicrobenchmarks:
    def test_who_raises_is_left_out_and_who_disagrees_fails(self, capsys):
        def raises(query, key):
            raise ValueError("no such thing")

        scale = [1.0]
        losses = {OURS: dense.info_nce, "bad": raises, "dense": lambda q, k: scale[0] * dense.info_nce(q, k)}
        case = Case("one", 8, 8, 16, "float32", "fwd")
        run = Contest(case, CPU, losses, contestants.floor(case))
        run.agree()
        run.round()
        assert {row["contestant"] for row in run.rows([1.0])} == {OURS, "floor", "dense"}
        assert "bad raises ValueError: no such thing" in capsys.readouterr().err
        scale[0] = 1.1
        with pytest.raises(AssertionError, match="dense differs from ours"):
            run.agree()

    def test_a_short_call_of_ours_is_timed_in_turn(self):
        order = []

        def contestant(name):
            return lambda query, key: order.append(name) or query.sum()

        losses = {name: contestant(name) for name in (OURS, "dense", "other")}
        run = Contest(Case("one", 8, 8, 16, "float32", "fwd"), CPU, losses)
        for _ in range(3):
            run.round()
        assert [order[i : i + 3].index(OURS) for i in (0, 3, 6)] == [2, 1, 0]
        assert [len(times) for times in run.times.values()] == [3, 3, 3]
        assert OURS not in Contest(Case("one", 2048, 2048, 16, "float32", "fwd"), CPU, losses).times

    def test_a_wrong_key_gradient_disagrees(self):
        def wrong(query, key):
            return dense.info_nce(query, key.detach()) + 0 * key.sum()

        run = Contest(Case("one", 8, 8, 16, "float32", "fwd_bwd"), CPU, {OURS: dense.info_nce, "wrong": wrong})
        with pytest.raises(AssertionError, match=r"wrong differs from ours by 1\.0e"):
            run.agree()

    def test_the_sweep(self):
        cases = micro.cases("cpu")
        assert len(cases) == len(set(cases))
        for direction in ("one", "symmetric", "self"):
            sizes = {c.rows for c in cases if (c.direction, c.d, c.mode) == (direction, micro.WIDTH, "fwd_bwd")}
            assert sizes == {512, 1024, 2048, 4096, 8192, 16384}
        assert micro.cases("cuda")

    def test_it_ends_in_time(self, monkeypatch):
        """Whatever the rate: by the estimates, on a clock that they drive."""
        for speed in (0.5, 1.0, 2.0):
            now = [0.0]
            monkeypatch.setattr(micro.time, "monotonic", lambda now=now: now[0])
            clock, ran = micro.Clock(), set()
            for case in micro.cases("cpu"):
                if clock.enough(case):
                    now[0] += micro.seconds(case) / speed
                    clock.add(case, micro.seconds(case) / speed)
                    ran.add(str(case))
            assert now[0] <= micro.LIMIT
            assert "one-8192x8192x768-float32-fwd_bwd" in ran
            assert speed < 1 or "one-16384x16384x384-float32-fwd_bwd" in ran


class TestLosses:
    def test_the_twelve_losses_have_cases(self):
        named = {name.split("(")[0].split(",")[0] for name in losses.LOSSES}
        assert len(named) >= 12
        assert all(issubclass(getattr(fused_infonce, name), torch.nn.Module) for name in named)
        assert {case.n for case in losses.cases()} == {64, 256, 1024}

    @pytest.mark.parametrize("name", losses.LOSSES)
    def test_the_dense_form_has_the_same_value_and_gradients(self, name):
        case = losses.LossCase(name, 24)
        run = Contest(case, CPU, case.contestants())
        run.agree()
        run.round()
        (ours, theirs) = run.rows([1.0])
        assert (ours["loss"], ours["contestant"], theirs["contestant"]) == (name, OURS, "dense")
        assert (ours["n"], ours["m"], ours["floor_ratio"]) == (24, case.m, "")


class TestCompare:
    def files(self, tmp_path, old, new):
        for name, times in {"old": old, "new": new}.items():
            rows = [ROW | {"contestant": c, "n": n, "median_ms": str(t)} for (c, n), t in times.items()]
            record.append(tmp_path / f"{name}.csv", rows)
        return [compare.times(tmp_path / f"{name}.csv") for name in ("old", "new")]

    def test_ratios(self, tmp_path):
        old = {(OURS, 64): 2, ("dense", 64): 4, (OURS, 256): 3, ("dense", 256): 3, (OURS, 8): 1}
        new = {(OURS, 64): 3, ("dense", 64): 4, (OURS, 256): 2, ("dense", 256): 4, (OURS, 16): 1}
        found = compare.compared(*self.files(tmp_path, old, new), OURS, "dense")
        assert found["new / old"].tolist() == [1.5, 2 / 3]
        assert found["of dense, old"].tolist() == [0.5, 1]
        assert found["of dense, new"].tolist() == [0.75, 0.5]
        assert found["change"].tolist() == [1.5, 0.5]
        assert compare.geometric_mean(found["new / old"]) == pytest.approx(1)
        lines = compare.printed(found, markdown=True).splitlines()
        assert lines[2] == "| info_nce 64x512x64 float32 fwd_bwd one | 2 | 3 | 1.50 | 0.50 | 0.75 | 1.50 |"
        assert lines[-1].startswith("| geometric mean |  |  | 1.00 |")
        assert len({line.count("|") for line in lines}) == 1

    def test_a_contestant_that_was_not_there(self, tmp_path):
        found = compare.compared(*self.files(tmp_path, {(OURS, 64): 2}, {(OURS, 64): 3}), OURS, "floor")
        assert found["new / old"].tolist() == [1.5]
        assert compare.printed(found).splitlines()[-1].split() == ["geometric", "mean", "1.50", "nan", "nan", "nan"]

    def test_times_of_two_devices_are_not_mixed(self, tmp_path):
        record.append(tmp_path / "a.csv", [ROW, ROW | {"device": "another"}])
        with pytest.raises(SystemExit, match="several devices"):
            compare.times(tmp_path / "a.csv")


class TestHouse:
    SOURCE = '''"""Module."""

# a comment
def long():
    """Two
    lines."""

    x = """not a
    docstring"""
    return (
        x
    )


class Small:
    """Words."""

    value = 1  # one
'''

    def test_lines(self):
        assert house.lines(self.SOURCE) == 13
        assert house.code_lines(self.SOURCE) == 8

    def test_long_functions(self, monkeypatch):
        assert house.long_functions(self.SOURCE) == []
        monkeypatch.setattr(house, "LONG", 4)
        assert house.long_functions(self.SOURCE) == [("long", 5)]

    def test_files_that_name_a_loss(self, tmp_path):
        for name, text in {"fused_infonce/a.py": "x_loss", "docs/b.md": "`a_loss`", "README.md": "a_loss_of"}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        assert {place: len(files) for place, files in house.naming(tmp_path, "a_loss").items()} == {
            "fused_infonce": 0, "docs": 1, "tests": 0, "README.md": 0,
        }  # fmt: skip

    @newer_interpreter
    def test_frames(self):
        pytest.importorskip("triton")
        found = house.frames(ROOT)
        assert found[0][1] == "forward"
        assert all((ROOT / "fused_infonce" / file).exists() for file, *_ in found)
