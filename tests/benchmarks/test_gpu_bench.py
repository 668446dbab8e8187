"""The GPU suite's order, checks and bookkeeping, without a GPU and without timing anything."""

import csv
import re
import sys
import time

import pytest
import torch

pytest.importorskip("tqdm", reason="the packages of the benchmarks are absent")

from benchmarks.cases import OURS, Case, square
from benchmarks.suites import gpu

CPU = torch.device("cpu")


class TestGpuSuite:
    def test_cases(self):
        cases = gpu.cases()
        assert len(cases) == len(set(cases))
        rows = {case.n for case in cases}
        assert min(rows) <= 512
        assert max(rows) == 1 << 20
        assert {case.d for case in cases} == {*gpu.WIDTHS, 312}
        for direction in ("one", "symmetric"):
            assert any(case.n % 2 and case.direction == direction for case in cases)
        asked = {(d, t, "fwd_bwd") for d in (*gpu.DIRECTIONS, "sigmoid") for t in ("bfloat16", "float16", "float32")}
        asked |= {(d, "bfloat16", "fwd") for d in gpu.DIRECTIONS}
        asked |= {(d, "bfloat16", "fwd_bwd") for d in ("biased", "biased symmetric")}
        assert {(case.direction, case.dtype, case.mode) for case in cases} == asked
        assert {case.direction for case in cases[:10]} == set(gpu.DIRECTIONS)
        assert [case.n for case in cases].index(1 << 17) > max([case.n for case in cases].index(n) for n in (512, 2048))

    def test_who_takes_part(self):
        names = [OURS, "dense", "dense compiled", "lightly"]
        compiled = [this for this in gpu.cases() if "dense compiled" in gpu.taking_part(this, names)]
        assert compiled == [square(8192, 768, direction=direction) for direction in ("one", "symmetric")]
        assert gpu.taking_part(compiled[0], names) == names
        small = [*names[:2], "lightly", f"{OURS}, replayed", "dense, replayed"]
        assert gpu.taking_part(square(2048, 768), names) == small
        assert gpu.taking_part(square(1 << 20, 256), names) == [OURS, "dense"]

    def test_nothing_is_timed_where_ours_is_wrong(self, monkeypatch, capsys):
        """In self-similarity it is, and for float16 in one direction it raises."""
        monkeypatch.setattr(gpu, "GATE", ((48, 32),))
        timed = []
        monkeypatch.setattr(gpu, "measure", lambda this, *_: timed.append(this) or [])
        assert gpu.run_all(gpu.cases(), CPU, 1, None)
        assert timed == gpu.cases()
        timed.clear()
        right, evaluate = gpu.nt_xent, gpu.evaluate
        off = {"auto": 1.02, "reference": 1.0}
        monkeypatch.setattr(gpu, "nt_xent", lambda *a, backend: off[backend] * right(*a, backend=backend))
        assert len(gpu.gate("self", "float32", CPU)) == 3  # the loss and two gradients

        def no_float16(direction, rows, backend):
            if (direction, rows[0].dtype) == ("one", torch.float16):
                raise RuntimeError("no such kernel")
            return evaluate(direction, rows, backend)

        monkeypatch.setattr(gpu, "evaluate", no_float16)
        assert not gpu.run_all(gpu.cases(), CPU, 1, None)
        assert timed == [c for c in gpu.cases() if c.direction != "self" and gpu.kind(c) != "one-float16"]
        said = capsys.readouterr().err
        assert said.count("ours is wrong, so no self-bfloat16 is timed") == 1
        assert "one-48x48x32-float16-fwd_bwd: failed: RuntimeError: no such kernel" in said

    @pytest.fixture
    def contestants(self, monkeypatch):
        """Ours, and peers that are right, wrong, out of memory and broken."""

        def raises(error):
            def loss(query, key):
                raise error

            return loss

        def raise_late():
            raise torch.OutOfMemoryError("only when it is timed")

        def losses(case, device):
            right = gpu.info_nce
            return {
                OURS: lambda q, k: right(q, k, temperature=0.05),
                "right": lambda q, k: right(q, k, temperature=0.05),
                "wrong": lambda q, k: right(q, k, temperature=0.06),
                "late": lambda q, k: right(q, k, temperature=0.05),
                "large": raises(torch.OutOfMemoryError("tried to allocate")),
                "broken": raises(ValueError("no\nsuch thing")),
            }

        monkeypatch.setattr(gpu.contestants, "losses", losses)
        monkeypatch.setattr(gpu, "timed", lambda name, *_: raise_late() if name == "late" else [0.002])
        monkeypatch.setattr(gpu, "GATE", ((16, 8),))

    CASE = Case("one", 24, 24, 16, "float32", "fwd_bwd")

    @staticmethod
    def recorded(path):
        with path.open() as file:
            return [(row["contestant"], row["median_ms"], row["floor_ratio"]) for row in csv.DictReader(file)]

    def test_who_cannot_run_is_recorded(self, contestants, tmp_path):
        path = tmp_path / "gpu.csv"
        assert gpu.run_all([self.CASE], CPU, 1, path)
        well = ("floor", OURS, "right", f"{OURS}, replayed", "floor, at the end")
        assert self.recorded(path) == [
            ("wrong", "disagrees", ""), ("large", "out of memory", ""), ("broken", "failed", ""),
            ("late", "out of memory", ""), *((name, "2", "1.000") for name in well),
        ]  # fmt: skip

    def test_contestants_take_turns_and_the_floor_comes_last_too(self, contestants, monkeypatch):
        turns, seconds = [], iter(range(1, 100))
        monkeypatch.setattr(gpu, "timed", lambda name, *_: turns.append(name) or [next(seconds)])
        rows = {row["contestant"]: row["median_ms"] for row in gpu.measure(self.CASE, CPU)}
        one = ["floor", OURS, "right", "late", f"{OURS}, replayed"]
        assert turns == [*one * gpu.TURNS, "floor, at the end"]
        assert (rows["floor"], rows[OURS], rows["floor, at the end"]) == ("6000", "7000", "1.6e+04")

    def test_without_a_floor(self, contestants, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu.contestants, "floor", lambda case: lambda query, key: query @ key)
        assert gpu.run_all([self.CASE], CPU, 1, tmp_path / "gpu.csv")
        rows = self.recorded(tmp_path / "gpu.csv")
        assert rows[0] == ("floor", "failed", "")
        assert rows[-3:] == [(name, "2", "") for name in (OURS, "right", f"{OURS}, replayed")]

    def test_what_is_timed_when_time_ends_is_kept(self, contestants, monkeypatch, tmp_path):
        def timed(name, *_):
            if name == "right":
                raise gpu.OutOfTime
            return [0.002]

        monkeypatch.setattr(gpu, "timed", timed)
        assert gpu.run_all([self.CASE], CPU, 1, tmp_path / "gpu.csv")
        assert self.recorded(tmp_path / "gpu.csv")[-2:] == [("floor", "2", "1.000"), (OURS, "2", "1.000")]

    @pytest.mark.parametrize("culprit", ["large", OURS])
    def test_a_broken_context_ends_the_process_and_is_named(self, culprit, contestants, monkeypatch, tmp_path, capsys):
        def clean(device, name):
            if name == culprit and "gate" not in said:
                raise gpu.Broken(name)
            said.discard("gate")

        said, path = {"gate"}, tmp_path / "gpu.csv"
        monkeypatch.setattr(gpu, "clean", clean)
        cases = [Case("one", n, n, 16, "float32", "fwd_bwd") for n in (24, 32)]
        with pytest.raises(gpu.Broken) as broken:
            gpu.run_all(cases, CPU, 1, path, ["late"])
        assert (broken.value.name, broken.value.done) == (culprit, 0)
        assert f"{cases[0]}: {culprit} has broken the GPU's context" in capsys.readouterr().err
        assert not path.exists() or {name for name, *_ in self.recorded(path)} == {"wrong", "large"}

    @pytest.mark.parametrize(("culprit", "first", "without"), [("large", 5, ["late", "large"]), (OURS, 6, ["late"])])
    def test_a_new_process_goes_on_after_a_broken_context(self, culprit, first, without, monkeypatch):
        def run_all(chosen, device, minutes, path, left_out):
            ran.append((chosen, minutes, path, left_out))
            if len(ran) == 1:
                broken = gpu.Broken(culprit)
                broken.done = 2
                raise broken
            return True

        def execv(program, arguments):  # replaces the process
            assert (program, *arguments[:3]) == (sys.executable, sys.executable, "-m", "benchmarks.suites.gpu")
            monkeypatch.setattr(sys, "argv", arguments[2:])
            gpu.main()

        ran = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu, "run_all", run_all)
        monkeypatch.setattr(gpu.os, "execv", execv)
        monkeypatch.setattr(sys, "argv", ["it", "--first", "3", "--record", "a.csv", "--without", "late"])
        with pytest.raises(SystemExit) as end:
            gpu.main()
        assert end.value.code == 1
        assert ran[0] == (gpu.cases()[3:], 7.5, "a.csv", ["late"])
        assert ran[1] == (gpu.cases()[first:], 7.5, "a.csv", without)

    def test_a_context_is_broken_where_it_cannot_be_cleaned(self, monkeypatch):
        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(gpu.Broken, match="liger-kernel"):
            gpu.clean(torch.device("cuda"), "liger-kernel")

    def test_it_stops_by_itself(self, contestants, monkeypatch, capsys):
        cases = [Case("one", n, n, 16, "float32", "fwd") for n in (16, 24)]

        def measure(case, *_):
            if case == cases[1]:
                time.sleep(60)
            return []

        monkeypatch.setattr(gpu, "measure", measure)
        monkeypatch.setattr(gpu, "GATE", ())
        start = time.monotonic()
        assert gpu.run_all(cases, CPU, 2 / 60, None)
        assert time.monotonic() - start < 30
        assert f"no time left for\n  {cases[1]}\n" in capsys.readouterr().err

    @pytest.mark.interpreter
    def test_it_runs_to_its_end_with_a_stand_in(self, monkeypatch, capsys):
        pytest.importorskip("triton")
        monkeypatch.setattr(sys, "argv", ["it", "--stand-in"])
        with pytest.raises(SystemExit) as end:
            gpu.main()
        said = capsys.readouterr()
        assert not end.value.code, said.err
        for direction, dtype, mode in gpu.STAND_IN:
            for name in ("floor", OURS, f"{OURS}, replayed", "floor, at the end"):
                line = rf"{direction}-20x20x24-{dtype}-{mode} +{re.escape(name)} +has run"
                assert re.search(line, said.out), (line, said.out)
        assert " ms" not in said.out
        monkeypatch.setattr(sys, "argv", ["it", "--stand-in", "--record", "a.csv"])
        with pytest.raises(SystemExit):
            gpu.main()
        assert "times of a stand-in are not recorded" in capsys.readouterr().err
