"""What `python -m fused_infonce.temperature` takes on two files, and what it says of halves of images.

    python -m benchmarks.suites.command                                20,000 pairs of width 256, verdict and picture
    python -m benchmarks.suites.command --record results/command.csv   the same, appended to a CSV file
    python -m benchmarks.suites.command --digits docs/temperature.png  embeddings of digits: the picture of the guide

Seconds are those of the whole process, by the clock and of the processor, which other programs on the machine change
least. Memory is the most that it held at once, as the operating system says, less
that of a process that imports torch alone. Pages of the files count, since they are mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import HERE, ROOT, record
from fused_infonce import FusedInfoNCELoss

FIELDS = (
    *("date", "commit", "device", "torch", "n", "d", "dtype", "picture"),
    *("seconds", "cpu_seconds", "peak_mib", "torch_mib", "peak_extra_mib"),
)
COMMAND = ("-m", "fused_infonce.temperature")
TRAINED_AT = 0.07
HELD_OUT = 597  # of 1797 images


class Took(NamedTuple):
    """What a process took and printed: seconds, those of the processor, and the MiB that it held at most."""

    seconds: float
    cpu_seconds: float
    mib: float
    said: str


# A process counts as held what its parent held when it was started, so that one with little in it starts it.
STARTER = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10, done.stdout]))
"""


def of_process(folder: str, *arguments: str) -> Took:
    """Run Python in a folder."""
    command = [sys.executable, "-S", "-c", STARTER, sys.executable, *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    code, *used = json.loads(done.stdout)
    if code:
        raise SystemExit(f"python {' '.join(arguments)} failed")
    return Took(seconds, *used)


def measured(n: int, d: int, dtype: str, picture: str) -> dict[str, Any]:
    """Return a row of what the command takes on random pairs."""
    generator = np.random.default_rng(0)
    query = generator.standard_normal((n, d), dtype=np.float32)
    key = query + 4 * generator.standard_normal((n, d), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("query", query), ("key", key)):
            np.save(os.path.join(folder, f"{name}.npy"), rows.astype(dtype))
        alone = of_process(folder, "-c", "import torch").mib
        took = of_process(folder, *COMMAND, "query.npy", "key.npy", "--temperature", "0.05", "--plot", picture)
    print(took.said)
    known = {k: v for k, v in record.provenance(torch.device("cpu")).items() if k in FIELDS}
    return {
        **known, "n": n, "d": d, "dtype": dtype, "picture": picture, "seconds": f"{took.seconds:.1f}",
        "cpu_seconds": f"{took.cpu_seconds:.1f}", "peak_mib": f"{took.mib:.0f}", "torch_mib": f"{alone:.0f}",
        "peak_extra_mib": f"{took.mib - alone:.0f}",
    }  # fmt: skip


def halves() -> tuple[Tensor, Tensor]:
    """Return embeddings of the even and of the odd columns of held-out images of digits, from two linear encoders."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[torch.randperm(1797)] / 16
    even, odd = images[:, :, ::2].flatten(1), images[:, :, 1::2].flatten(1)
    encoders = nn.Linear(32, 32), nn.Linear(32, 32)
    loss = FusedInfoNCELoss(temperature=TRAINED_AT)
    optimizer = torch.optim.Adam([p for encoder in encoders for p in encoder.parameters()], lr=0.01)
    for _ in range(300):
        batch = HELD_OUT + torch.randperm(len(images) - HELD_OUT)[:256]
        optimizer.zero_grad()
        loss(encoders[0](even[batch]), encoders[1](odd[batch])).backward()
        optimizer.step()
    with torch.no_grad():
        return encoders[0](even[:HELD_OUT]), encoders[1](odd[:HELD_OUT])


def draw_digits(picture: Path) -> None:
    """Draw the picture of the guide, print what the command says, and keep that in results/command.json."""
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in zip(("even", "odd"), halves(), strict=True):
            np.save(os.path.join(folder, f"{name}.npy"), rows.numpy())
        call = (*COMMAND, "even.npy", "odd.npy", "--temperature", str(TRAINED_AT))
        print(of_process(folder, *call, "--plot", str(picture)).said)
        said = of_process(folder, *call, "--json").said
    known = {k: v for k, v in record.provenance(torch.device("cpu")).items() if k in ("date", "commit", "torch")}
    (HERE / "results" / "command.json").write_text(json.dumps({**known, **json.loads(said)}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="append the results to this CSV file, absolute or relative to benchmarks/")
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--dtype", choices=("float16", "float32", "float64"), default="float32")
    parser.add_argument("--picture", default="report.png", help="its name, by whose end it has a format")
    parser.add_argument("--digits", type=Path, metavar="PICTURE", help="draw this instead, relative to the repository")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.digits:
        draw_digits(ROOT / options.digits)
        return
    row = measured(options.n, options.d, options.dtype, options.picture)
    print(*(f"{name}: {row[name]}" for name in ("seconds", "cpu_seconds", "peak_mib", "torch_mib", "peak_extra_mib")))
    if options.record:
        record.append(options.record, [row], FIELDS)


if __name__ == "__main__":
    main()
