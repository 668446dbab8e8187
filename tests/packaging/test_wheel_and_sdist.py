"""What the wheel and the sdist hold; that an install computes, imports quickly and has types that a checker finds."""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt"]  # what a build reads
FOLDERS = ["fused_infonce", "kernels", "tests"]
# what the sdist holds besides, so that every test runs in it too
FILES += ["CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", ".pre-commit-config.yaml", ".ci/run"]
FOLDERS += [name for name in ("benchmarks", "examples", "docs") if (ROOT / name).is_dir()]

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

# A drop-in may need its library, and pictures need theirs; nothing else may.
IMPORT_ALL = """
import importlib
for found in pkgutil.walk_packages(fused_infonce.__path__, "fused_infonce."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        library = error.name.partition(".")[0]
        if found.name != "fused_infonce.temperature.plots" or library != "matplotlib":
            assert found.name.startswith("fused_infonce.compat."), found.name
            assert library in {libraries!r}, error.name
"""
LIBRARIES = (
    "info_nce", "open_clip", "pytorch_metric_learning", "lightly", "sentence_transformers", "FlagEmbedding",
    "transformers", "lightning", "pytorch_lightning",
)  # fmt: skip

ASK_FOR_TRITON = """
try:
    fused_infonce.FusedInfoNCELoss(backend="triton")(q, k)
except Exception as error:
    assert "triton" in str(error).lower(), error
else:
    raise AssertionError("backend='triton' ran without triton")
"""


SECONDS_BEYOND_TORCH = """
import time
import torch
before, start = set(sys.modules), time.process_time()
import fused_infonce
print(time.process_time() - start)
heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton"} & (set(sys.modules) - before)
assert not heavy, heavy
"""

IN_THE_REPOSITORY = """
import os
import torch
import fused_infonce
assert os.path.dirname(os.path.dirname(fused_infonce.__file__)) == os.getcwd(), fused_infonce.__file__
try:
    fused_infonce.info_nce(torch.ones(2, 2), torch.ones(2, 2), backend="triton")
except RuntimeError as error:
    print(error)
"""

USERS_FILE = """
import torch
from fused_infonce import FusedInfoNCELoss, info_nce
from fused_infonce.kernels import tile
rows = torch.zeros(4, 8)
reveal_type(info_nce(rows, rows))
reveal_type(FusedInfoNCELoss()(rows, rows))
info_nce(rows, rows, reductoin="mean")
info_nce(rows, rows, reduction="avg")
FusedInfoNCELoss(backend="cuda")
"""


def run(*command, **kwargs):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    assert done.returncode == 0, done.stdout
    return done.stdout


def modules(folder):
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}


def libraries():
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """The sdist of the repository, and the wheel built from that sdist."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
INSTALL = ("install", "--quiet", "--no-deps", "--no-index")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    run(*PIP, *INSTALL, "--target", str(target), str(built[1]))
    return target


@pytest.fixture
def run_installed(installed, tmp_path):
    def run_script(*parts, blocked=()):
        prelude = PRELUDE.format(paths=[str(installed), *libraries()], blocked=blocked)
        environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return run(sys.executable, "-I", "-S", "-c", "".join((prelude, *parts)), cwd=tmp_path, env=environ)

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
    # No upper bounds, since torch pins its own triton. numpy is for the temperature command.
    assert plain == ["numpy", "torch>=2.9", 'triton>=3.5; sys_platform == "linux"']
    assert re.findall(r"^Requires-Python: (.*)$", metadata, re.MULTILINE) == [">=3.10"]
    assert {"test", "bench", "demo", "compat"} <= set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    classifiers = re.findall(r"^Classifier: (.*)$", metadata, re.MULTILINE)
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)} <= set(classifiers)
    assert {line.split(" :: ")[-1] for line in classifiers if "System" in line} == {"Linux", "MacOS", "Windows"}
    assert "Project-URL" not in metadata  # there is no address yet


def test_sdist_holds_the_whole_repository(built, source):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.relative_to(source).as_posix() for folder in FOLDERS for path in (source / folder).rglob("*")}
    assert {"fused_infonce/py.typed", "tests/conftest.py", "kernels/tile.py"} <= files
    assert files | set(FILES) <= names


def test_an_install_computes(run_installed):
    pytest.importorskip("triton")
    run_installed(COMPUTE, IMPORT_ALL.format(libraries=LIBRARIES), blocked=(*LIBRARIES, "matplotlib"))


def test_an_install_computes_without_triton(run_installed):
    run_installed(COMPUTE, ASK_FOR_TRITON, blocked=("triton",))


def test_the_project_files_name_the_version():
    code = (ROOT / "fused_infonce" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.*)"$', code, re.MULTILINE)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text()


def test_there_is_no_top_level_kernels_package(run_installed, installed):
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == ["fused_infonce"]


def test_the_import_takes_little_beyond_torch(run_installed):
    seconds = [float(run_installed(SECONDS_BEYOND_TORCH)) for _ in range(2)]  # of the processor, not of the clock
    if max(seconds) >= 0.3:  # else the median of three is known without the third
        seconds.append(float(run_installed(SECONDS_BEYOND_TORCH)))
    assert statistics.median(seconds) < 0.3, seconds


def test_python_in_the_repositorys_root_says_that_the_source_tree_hides_the_install(source, installed):
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(installed), *libraries()])
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environ |= {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    said = run(sys.executable, "-S", "-c", IN_THE_REPOSITORY, cwd=source.resolve(), env=environ)
    assert "backend='triton' cannot run" in said
    assert "source tree" in said
    assert str(source.resolve()) in said


@pytest.fixture(scope="module")
def mypy_cache(tmp_path_factory):
    """A copy of what `make lint` has left, which knows torch: without it mypy reads torch for a quarter of a minute."""
    cache = tmp_path_factory.mktemp("mypy")
    if (ROOT / ".mypy_cache").is_dir():
        shutil.copytree(ROOT / ".mypy_cache", cache, dirs_exist_ok=True)
    return cache


@pytest.mark.parametrize("way", ["plain", "strict editable"])
def test_mypy_finds_the_types_from_a_users_folder(way, source, built, mypy_cache, tmp_path):
    pytest.importorskip("mypy")
    builder = venv.EnvBuilder(symlinks=os.name != "nt")
    python = builder.ensure_directories(tmp_path / "venv").env_exe
    builder.create(tmp_path / "venv")
    (site,) = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").split()
    Path(site, "libraries.pth").write_text("\n".join(libraries()))
    editable = ("--no-build-isolation", "--config-settings", "editable_mode=strict", "--editable", str(source))
    # this environment may hold the package too, which the new one sees through libraries.pth
    run(*PIP, "--python", python, *INSTALL, "--ignore-installed", *([str(built[1])] if way == "plain" else editable))

    (tmp_path / "train.py").write_text(USERS_FILE)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", str(mypy_cache), "train.py"]
    mypy += ["--config-file", str(ROOT / "pyproject.toml")]  # the options that the cache holds for
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(mypy, cwd=tmp_path, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    function, module, *rest = (line.partition(" ")[2] for line in done.stdout.splitlines())
    assert re.search(r'Revealed type is "torch\.(_tensor\.)?Tensor"', function), done.stdout
    assert re.search(r'Revealed type is "torch\.(_tensor\.)?Tensor"', module), done.stdout
    keyword, reduction, backend = (line for line in rest if line.startswith("error"))
    assert keyword.startswith('error: Unexpected keyword argument "reductoin" for "info_nce"'), done.stdout
    assert reduction.startswith('error: Argument "reduction" to "info_nce" has incompatible type'), done.stdout
    assert backend.startswith('error: Argument "backend" to "FusedInfoNCELoss" has incompatible type'), done.stdout
