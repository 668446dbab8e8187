"""Benchmarks of fused_infonce: what is timed (cases, contestants, dense), how (contest), and what comes of it (record).

Run from the repository root against an installed fused_infonce; a RESULTS path is absolute or relative to benchmarks/.

    make bench                                  microbenchmarks on this machine's CPU
    python -m benchmarks.suites.gpu             the suite on a GPU
    python -m benchmarks.suites.drop_ins        every drop-in against its library
    python -m benchmarks.suites.cached          gradient caching against the step without it
    python -m benchmarks.suites.command         the temperature of two files, in seconds and memory
    python -m benchmarks.suites.accuracy        errors at low temperatures
    python -m benchmarks.tiles.tune             tile sizes on a GPU, compiled beforehand by ahead.py
    python -m benchmarks.tiles.host_time        what a call costs the host of a GPU
    python -m benchmarks.tiles.aot              registers, spills and instructions of the kernels, without a GPU
    python -m benchmarks.tiles.pipes            cycles of their tiles, counted in the machine code
    python -m benchmarks.tiles.model            the time of every plan on a GPU by a model from these cycles
    python -m benchmarks.compare OLD.csv NEW.csv
    python -m benchmarks.house                  frames of a call, lines and files of the product
    python -m benchmarks.plot                   pictures of what is recorded
    python -m benchmarks.tables                 the documentation's tables of what is recorded
"""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# `python -m` puts the repository root first on the path, and there fused_infonce/ lies without its kernels, which only
# an installation puts inside: the installed package must be found.
if Path(sys.path[0] or os.curdir).resolve() == ROOT:
    del sys.path[0]
    if importlib.util.find_spec("fused_infonce") is None:
        sys.path.append(str(ROOT))  # nothing is installed: the PyTorch backend will do
