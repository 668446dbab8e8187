"""What the wheel and the sdist hold, and that a plain install computes, with triton and without."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt"]  # what a build reads
FOLDERS = ["fused_infonce", "kernels", "tests"]

# Runs isolated and without site, hence without the .pth file of an editable install.
PRELUDE = """
import pkgutil, sys
sys.path[:0] = {paths!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""

COMPUTE = """
import torch
import torch.nn.functional as F
import fused_infonce, fused_infonce.kernels
for module in (fused_infonce, fused_infonce.kernels):
    assert module.__file__.startswith(sys.path[0]), module.__file__
torch.manual_seed(0)
q, k = (torch.randn(8, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
loss = fused_infonce.FusedInfoNCELoss()(q, k)
dense = F.cross_entropy(F.normalize(q) @ F.normalize(k).T / 0.1, torch.arange(8))
torch.testing.assert_close(loss, dense)
torch.testing.assert_close(torch.autograd.grad(loss, (q, k)), torch.autograd.grad(dense, (q, k)))
"""

# A drop-in may need its library; nothing else may.
IMPORT_ALL = """
import importlib
for found in pkgutil.walk_packages(fused_infonce.__path__, "fused_infonce."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        assert found.name.startswith("fused_infonce.compat."), found.name
        assert error.name.partition(".")[0] in {libraries!r}, error.name
"""
LIBRARIES = (
    "info_nce", "open_clip", "pytorch_metric_learning", "lightly", "sentence_transformers", "FlagEmbedding",
    "transformers",
)  # fmt: skip

ASK_FOR_TRITON = """
try:
    fused_infonce.FusedInfoNCELoss(backend="triton")(q, k)
except Exception as error:
    assert "triton" in str(error).lower(), error
else:
    raise AssertionError("backend='triton' ran without triton")
"""


def run(*command, **kwargs):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    assert done.returncode == 0, done.stdout


def modules(folder):
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a copy of the tree, and the wheel built from that sdist."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", str(target), str(built[1]))
    return target


@pytest.fixture
def run_installed(installed, tmp_path):
    def run_script(*parts, blocked=()):
        libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        prelude = PRELUDE.format(paths=[str(installed), *libraries], blocked=blocked)
        environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        run(sys.executable, "-I", "-S", "-c", "".join((prelude, *parts)), cwd=tmp_path, env=environ)

    return run_script


def test_wheel_holds_both_packages_and_nothing_else(built):
    names = zipfile.ZipFile(built[1]).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    expected = {f"fused_infonce/{name}" for name in modules("fused_infonce")}
    expected |= {f"fused_infonce/kernels/{name}" for name in modules("kernels")}
    assert "fused_infonce/__init__.py" in expected
    assert code == expected | {"fused_infonce/py.typed"}
    assert any(re.search(r"\.dist-info/(licenses/)?LICENSE$", name) for name in names)


def test_the_wheel_requires_torch_triton_and_numpy_without_upper_bounds(built):
    archive = zipfile.ZipFile(built[1])
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    plain = sorted(line for line in required if "extra ==" not in line)
    # No upper bounds: torch pins its own triton.
    assert plain == ["numpy", "torch>=2.9", 'triton>=3.5; sys_platform == "linux"']
    assert re.findall(r"^Requires-Python: (.*)$", metadata, re.MULTILINE) == [">=3.10"]
    assert {"test", "bench", "demo", "compat"} <= set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))


def test_sdist_holds_the_sources(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"kernels/{name}" for name in modules("kernels")} <= names
    assert {f"fused_infonce/{name}" for name in modules("fused_infonce")} <= names
    assert {"pyproject.toml", "LICENSE", "fused_infonce/py.typed", "tests/conftest.py"} <= names


def test_an_install_computes(run_installed):
    pytest.importorskip("triton")
    run_installed(COMPUTE, IMPORT_ALL.format(libraries=LIBRARIES), blocked=LIBRARIES)


def test_an_install_computes_without_triton(run_installed):
    run_installed(COMPUTE, ASK_FOR_TRITON, blocked=("triton",))


def test_there_is_no_top_level_kernels_package(run_installed, installed):
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == ["fused_infonce"]
