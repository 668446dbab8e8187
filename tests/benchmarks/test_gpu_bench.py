"""The GPU suite's order, checks and bookkeeping, without a GPU and without timing anything."""

import csv
import sys
import time

import contest
import gpu_bench
import pytest
import torch
from contestants import OURS, Case

CPU = torch.device("cpu")


class TestGpuSuite:
    def test_cases(self):
        cases = gpu_bench.cases()
        assert len(cases) == len(set(cases))
        rows = {case.n for case in cases}
        assert min(rows) <= 512
        assert max(rows) == 1 << 20
        assert {case.d for case in cases} == set(gpu_bench.WIDTHS)
        asked = {(d, t, "fwd_bwd") for d in gpu_bench.DIRECTIONS for t in ("bfloat16", "float16", "float32")}
        asked |= {(d, "bfloat16", "fwd") for d in gpu_bench.DIRECTIONS}
        assert {(case.direction, case.dtype, case.mode) for case in cases} == asked
        assert {case.direction for case in cases[:10]} == set(gpu_bench.DIRECTIONS)
        assert [case.n for case in cases].index(1 << 17) > max([case.n for case in cases].index(n) for n in (512, 2048))

    def test_who_takes_part(self):
        names = [OURS, "dense", "dense compiled", "lightly"]
        compiled = [this for this in gpu_bench.cases() if "dense compiled" in gpu_bench.taking_part(this, names)]
        assert compiled == [gpu_bench.case(8192, 768, direction=direction) for direction in ("one", "symmetric")]
        assert gpu_bench.taking_part(compiled[0], names) == names
        assert gpu_bench.taking_part(gpu_bench.case(1 << 20, 256), names) == [OURS, "dense"]

    def test_nothing_is_timed_where_ours_is_wrong(self, monkeypatch, capsys):
        """In self-similarity it is, and for float16 in one direction it raises."""
        monkeypatch.setattr(gpu_bench, "GATE", ((48, 32),))
        timed = []
        monkeypatch.setattr(gpu_bench, "measure", lambda this, *_: timed.append(this) or [])
        assert gpu_bench.run_all(gpu_bench.cases(), CPU, 1, None)
        assert timed == gpu_bench.cases()
        timed.clear()
        right, evaluate = gpu_bench.nt_xent, gpu_bench.evaluate
        off = {"auto": 1.02, "reference": 1.0}
        monkeypatch.setattr(gpu_bench, "nt_xent", lambda *a, backend: off[backend] * right(*a, backend=backend))
        assert len(gpu_bench.gate("self", "float32", CPU)) == 3  # the loss and two gradients

        def no_float16(direction, rows, backend):
            if (direction, rows[0].dtype) == ("one", torch.float16):
                raise RuntimeError("no such kernel")
            return evaluate(direction, rows, backend)

        monkeypatch.setattr(gpu_bench, "evaluate", no_float16)
        assert not gpu_bench.run_all(gpu_bench.cases(), CPU, 1, None)
        assert timed == [c for c in gpu_bench.cases() if c.direction != "self" and gpu_bench.kind(c) != "one-float16"]
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
            right = gpu_bench.info_nce
            return {
                OURS: lambda q, k: right(q, k, temperature=0.05),
                "right": lambda q, k: right(q, k, temperature=0.05),
                "wrong": lambda q, k: right(q, k, temperature=0.06),
                "late": lambda q, k: right(q, k, temperature=0.05),
                "large": raises(torch.OutOfMemoryError("tried to allocate")),
                "broken": raises(ValueError("no\nsuch thing")),
            }

        monkeypatch.setattr(contest.contestants, "losses", losses)
        monkeypatch.setattr(gpu_bench, "timed", lambda run, name, *_: raise_late() if name == "late" else [0.002] * 3)
        monkeypatch.setattr(gpu_bench, "GATE", ((16, 8),))

    CASE = Case("one", 24, 24, 16, "float32", "fwd_bwd")

    @staticmethod
    def recorded(path):
        with path.open() as file:
            return [(row["contestant"], row["median_ms"], row["floor_ratio"]) for row in csv.DictReader(file)]

    def test_who_cannot_run_is_recorded(self, contestants, tmp_path):
        record = tmp_path / "gpu.csv"
        assert gpu_bench.run_all([self.CASE], CPU, 1, record)
        assert self.recorded(record) == [
            *((name, "2", "1.000") for name in ("floor", OURS, "right")), ("wrong", "disagrees", ""),
            ("late", "out of memory", ""), ("large", "out of memory", ""), ("broken", "failed", ""),
        ]  # fmt: skip

    def test_without_a_floor(self, contestants, monkeypatch, tmp_path):
        monkeypatch.setattr(contest.contestants, "floor", lambda case: lambda query, key: query @ key)
        monkeypatch.setattr(gpu_bench, "timed", lambda run, name, *inputs: [run.step(name, *inputs), 0.002][1:])
        assert gpu_bench.run_all([self.CASE], CPU, 1, tmp_path / "gpu.csv")
        assert self.recorded(tmp_path / "gpu.csv")[:3] == [("floor", "failed", ""), (OURS, "2", ""), ("right", "2", "")]

    def test_what_is_timed_when_time_ends_is_kept(self, contestants, monkeypatch, tmp_path):
        def stopped(self, name, mine):
            raise gpu_bench.OutOfTime

        monkeypatch.setattr(contest.Contest, "disagreement", stopped)
        assert gpu_bench.run_all([self.CASE], CPU, 1, tmp_path / "gpu.csv")
        assert self.recorded(tmp_path / "gpu.csv") == [("floor", "2", "1.000"), (OURS, "2", "1.000")]

    @pytest.mark.parametrize("culprit", ["large", OURS])
    def test_a_broken_context(self, culprit, contestants, monkeypatch, tmp_path):
        """The case ends with the culprit's row; a fresh process goes on behind it, without a peer that broke it."""
        record, commands = tmp_path / "gpu.csv", []

        def clean(device, name):
            if name == culprit and record.exists():  # after the check
                raise gpu_bench.Broken(name)

        monkeypatch.setattr(gpu_bench, "clean", clean)
        monkeypatch.setattr(gpu_bench.os, "execv", lambda *command: commands.append(command))
        cases = [Case("one", n, n, 16, "float32", "fwd_bwd") for n in (16, 24, 32)]
        assert gpu_bench.run_all(cases, CPU, 1, record, 1, ["late"])
        ((program, (_, script, *arguments)),) = commands
        assert (program, script) == (sys.executable, gpu_bench.__file__)
        assert arguments[arguments.index("--after") + 1] == str(cases[1])
        without = arguments[arguments.index("--without") + 1 : arguments.index("--wrong")]
        assert sorted(without) == sorted({"late", culprit} - {OURS})
        assert 0.5 < float(arguments[arguments.index("--minutes") + 1]) <= 1
        names = [name for name, *_ in self.recorded(record)]
        assert names[-1] == culprit
        assert "late" not in names

    def test_a_context_is_broken_where_it_cannot_be_cleaned(self, monkeypatch):
        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(gpu_bench.Broken, match="liger-kernel"):
            gpu_bench.clean(torch.device("cuda"), "liger-kernel")

    @pytest.mark.parametrize("wrong", [[], ["self-float16"]])
    def test_a_fresh_process_goes_on(self, wrong, monkeypatch, tmp_path):
        given = []
        monkeypatch.setattr(gpu_bench.os, "execv", lambda _, command: monkeypatch.setattr(sys, "argv", command[1:]))
        monkeypatch.setattr(gpu_bench, "run_all", lambda *arguments: given.append(arguments) or not wrong)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        cases = gpu_bench.cases()
        gpu_bench.go_on(cases[3], 0.5, tmp_path / "a.csv", ["dense compiled", "liger-kernel"], wrong)
        with pytest.raises(SystemExit) as stop:
            gpu_bench.main()
        assert stop.value.code == bool(wrong)
        where = (cases, torch.device("cuda"), 0.5, tmp_path / "a.csv", 4)
        assert given == [(*where, ["dense compiled", "liger-kernel"], wrong)]

    def test_what_was_checked_is_not_checked_again(self, monkeypatch):
        checked, cases = [], gpu_bench.cases()
        monkeypatch.setattr(gpu_bench, "gate", lambda *kind: checked.append(kind[:2]) or [])
        monkeypatch.setattr(gpu_bench, "measure", lambda *_: [])
        assert not gpu_bench.run_all(cases, CPU, 1, None, 1, (), ["self-float16"])
        kinds = {(case.direction, case.dtype) for case in cases} - {("one", "bfloat16"), ("self", "float16")}
        assert len(checked) == len(kinds)
        assert set(checked) == kinds

    def test_it_stops_by_itself(self, contestants, monkeypatch, capsys):
        cases = [Case("one", n, n, 16, "float32", "fwd") for n in (16, 24)]

        def measure(case, *_):
            if case == cases[1]:
                time.sleep(60)
            return []

        monkeypatch.setattr(gpu_bench, "measure", measure)
        monkeypatch.setattr(gpu_bench, "GATE", ())
        start = time.monotonic()
        assert gpu_bench.run_all(cases, CPU, 2 / 60, None)
        assert time.monotonic() - start < 30
        assert f"no time left for\n  {cases[1]}\n" in capsys.readouterr().err
