"""The GPU suite's order, checks and bookkeeping, without a GPU and without timing anything."""

import csv
import time

import pytest
import torch

pytest.importorskip("tqdm", reason="the packages of the benchmarks are absent")

from benchmarks import contest
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
        assert {case.d for case in cases} == set(gpu.WIDTHS)
        asked = {(d, t, "fwd_bwd") for d in gpu.DIRECTIONS for t in ("bfloat16", "float16", "float32")}
        asked |= {(d, "bfloat16", "fwd") for d in gpu.DIRECTIONS}
        assert {(case.direction, case.dtype, case.mode) for case in cases} == asked
        assert {case.direction for case in cases[:10]} == set(gpu.DIRECTIONS)
        assert [case.n for case in cases].index(1 << 17) > max([case.n for case in cases].index(n) for n in (512, 2048))

    def test_who_takes_part(self):
        names = [OURS, "dense", "dense compiled", "lightly"]
        compiled = [this for this in gpu.cases() if "dense compiled" in gpu.taking_part(this, names)]
        assert compiled == [square(8192, 768, direction=direction) for direction in ("one", "symmetric")]
        assert gpu.taking_part(compiled[0], names) == names
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
        monkeypatch.setattr(gpu, "timed", lambda run, name, *_: raise_late() if name == "late" else [0.002] * 3)
        monkeypatch.setattr(gpu, "GATE", ((16, 8),))

    CASE = Case("one", 24, 24, 16, "float32", "fwd_bwd")

    @staticmethod
    def recorded(path):
        with path.open() as file:
            return [(row["contestant"], row["median_ms"], row["floor_ratio"]) for row in csv.DictReader(file)]

    def test_who_cannot_run_is_recorded(self, contestants, tmp_path):
        path = tmp_path / "gpu.csv"
        assert gpu.run_all([self.CASE], CPU, 1, path)
        assert self.recorded(path) == [
            *((name, "2", "1.000") for name in ("floor", OURS, "right")), ("wrong", "disagrees", ""),
            ("late", "out of memory", ""), ("large", "out of memory", ""), ("broken", "failed", ""),
        ]  # fmt: skip

    def test_without_a_floor(self, contestants, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu.contestants, "floor", lambda case: lambda query, key: query @ key)
        monkeypatch.setattr(gpu, "timed", lambda run, name, inputs: [run.step(name, *inputs), 0.002][1:])
        assert gpu.run_all([self.CASE], CPU, 1, tmp_path / "gpu.csv")
        assert self.recorded(tmp_path / "gpu.csv")[:3] == [("floor", "failed", ""), (OURS, "2", ""), ("right", "2", "")]

    def test_what_is_timed_when_time_ends_is_kept(self, contestants, monkeypatch, tmp_path):
        def stopped(self, name, mine):
            raise gpu.OutOfTime

        monkeypatch.setattr(contest.Contest, "disagreement", stopped)
        assert gpu.run_all([self.CASE], CPU, 1, tmp_path / "gpu.csv")
        assert self.recorded(tmp_path / "gpu.csv") == [("floor", "2", "1.000"), (OURS, "2", "1.000")]

    @pytest.mark.parametrize("culprit", ["large", OURS])
    def test_a_broken_context_ends_the_run_and_is_named(self, culprit, contestants, monkeypatch, tmp_path, capsys):
        path = tmp_path / "gpu.csv"

        def clean(device, name):
            if name == culprit and path.exists():  # after the check
                raise gpu.Broken(name)

        monkeypatch.setattr(gpu, "clean", clean)
        cases = [Case("one", n, n, 16, "float32", "fwd_bwd") for n in (24, 32)]
        assert not gpu.run_all(cases, CPU, 1, path, ["late"])
        names = [name for name, *_ in self.recorded(path)]
        assert names[-1] == culprit
        assert "late" not in names
        said = capsys.readouterr().err
        assert f"{cases[0]}: {culprit} has broken the GPU's context" in said
        assert f"--without {culprit!r}" in said

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
