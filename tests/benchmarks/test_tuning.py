"""A run of the tuning script: compiled in processes, timed in shares, and what happens when something breaks."""

import os
import sys
import threading
import time
from functools import partial
from multiprocessing import dummy

import pytest
import torch
from support.helpers import newer_interpreter

pytest.importorskip("tqdm", reason="the packages of the benchmarks are absent")
pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter

from benchmarks.tiles import ahead, tune
from fused_infonce.backends.triton import tiles

MACHINE = ahead.Machine("sm_90", GPUTarget("cuda", 90, 32), 132)


def test_candidates_are_compiled_in_processes_that_have_no_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in the processes
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "compile_all", partial(ahead.compile_all, processes=1))
    good, bad = tiles.Tile(64, 64, 16, 4, 2), tiles.Tile(64, 48, 16, 4, 2)
    monkeypatch.setattr(tune, "candidates", lambda *_: [good, bad])
    job = tune.Job("statistics", torch.bfloat16, 16)
    found = tune.compile_candidates([job], MACHINE, 256, time.monotonic() + 300)
    assert found[job, good] == "ok"
    assert "power of 2" in found[job, bad]
    assert any(path.name == "statistics_kernel.cubin" for path in tmp_path.rglob("*.cubin"))


def test_who_fails_is_named_and_who_is_late_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(ahead.multiprocessing, "get_context", lambda _: dummy)  # threads
    monkeypatch.setattr(ahead, "compile_for", lambda _: None)
    late = threading.Event()

    def fails():
        raise RuntimeError("at 3:4\nsome code") from ValueError("no such tile\nat all")

    launches = [("well", lambda: None), ("bad", fails), ("late", late.wait), ("never", lambda: None)]
    found = ahead.compile_all(launches, MACHINE, time.monotonic() + 0.5, processes=1)
    late.set()
    assert found == {"well": "ok", "bad": "ValueError: no such tile"}
    assert "1 of 4 compiled, 1 failed" in capsys.readouterr().out


@pytest.mark.interpreter
@newer_interpreter
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("kernel", tune.WORKLOADS)
def test_what_is_launched_has_the_candidate_s_tile(kernel, arch, monkeypatch):
    """Not the table's, whichever of an architecture's rows a launcher looks up."""
    tile, launched = tiles.Tile(64, 16, 16, 2, 7), set()

    def run(self, *args, **arguments):
        launched.add(tuple(arguments.get(name) for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    monkeypatch.setattr(tiles, "architecture", lambda _: arch)
    tune.launched(tune.Job(kernel, torch.bfloat16, 16), arch, 64, tile)
    assert (64, 16, 2, 7) in launched


def test_only_what_has_compiled_is_timed(monkeypatch):
    few = [tiles.Tile(16, 16, 16, 4, stages) for stages in (1, 2, 3, 4)]
    monkeypatch.setattr(tune, "workload", lambda *_: None)
    monkeypatch.setattr(tune, "result", lambda *_: [torch.ones(3)])
    monkeypatch.setattr(tune, "candidates", lambda *_: few)
    compiled = {few[0]: "ok", few[1]: "ok", few[3]: "ValueError: no such tile"}
    arguments = ("sm_90", "statistics", torch.float32, 8, 8, torch.device("cpu"), time.monotonic() + 60)
    records = tune.tune(*arguments, lambda _: 1.0, compiled)
    assert [(r["tile"], r["outcome"]) for r in records] == list(compiled.items())
    assert [r["median_ms"] for r in records] == [1.0, 1.0, ""]


def test_what_is_left_after_a_broken_context_runs_in_a_new_process(monkeypatch, tmp_path, capsys):
    """The second job's second candidate breaks it: the third is not tried, the other jobs are."""
    few = [tiles.Tile(16, 16, 16, 4, stages) for stages in (1, 2, 3)]
    broken, ran = [], []

    def timer(run):
        ran.append((run, len(ran)))
        if len(ran) == 5:
            broken.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return float(len(ran))

    class Replaced(BaseException):
        """The process, by another."""

    def execv(program, arguments):
        assert program == sys.executable
        raise Replaced(arguments)

    monkeypatch.setattr(tune, "workload", lambda name, dtype, n, d, device: d)
    monkeypatch.setattr(tune, "result", lambda *_: [torch.ones(3)])
    monkeypatch.setattr(tune, "candidates", lambda *_: few)
    monkeypatch.setattr(tune, "alive", lambda _: not broken)
    monkeypatch.setattr(tune, "measure", timer)
    monkeypatch.setattr(tune.tune, "__defaults__", (timer, None))
    monkeypatch.setattr(os, "execv", execv)
    record = str(tmp_path / "tune.csv")
    command = ["it", "--kernel", "statistics", "--dim", "64", "128", "256", "--first", "0", "--record", record]
    monkeypatch.setattr(sys, "argv", command)
    _, args = tune.arguments()
    with pytest.raises(Replaced) as end:
        tune.time_all(tune.jobs_of(args), "sm_90", torch.device("cpu"), time.monotonic() + 60, args, None)
    assert [d for d, _ in ran] == [64, 64, 64, 128, 128]
    arguments = end.value.args[0]
    assert arguments[1:3] == ["-m", "benchmarks.tiles.tune"]
    monkeypatch.setattr(sys, "argv", arguments[2:])
    parsed = tune.arguments()[1]
    assert [job.d for job in tune.jobs_of(parsed)[parsed.first :]] == [256]
    assert parsed.record == record
    assert 0 < parsed.minutes <= 1
    rows = (tmp_path / "tune.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 + 2
    assert "illegal memory access" in rows[-1]


@pytest.mark.interpreter
@newer_interpreter
def test_it_runs_to_its_end_with_a_stand_in(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["it", "--stand-in", "--kernel", "exponentials"])
    tune.main()
    assert capsys.readouterr().out.splitlines()[1:] == ["exponentials bfloat16 D = 24: ok, ok, ok"]
    monkeypatch.setattr(sys, "argv", ["it", "--stand-in", "--record", "a.csv"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "times of a stand-in are not recorded" in capsys.readouterr().err
