"""What holds for every test: where the kernels run, NaN in fresh allocations, seeds, the hypothesis profile."""

import os

import torch  # does not import triton

GPU = torch.cuda.is_available()
if not GPU:  # read when @triton.jit decorates, hence before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

import importlib.util  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from support.broken_context import pytest_runtest_call, pytest_runtest_protocol  # noqa: E402, F401

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for examples/ and benchmarks/; at the end, so that the installed fused_infonce comes first
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and INTERPRETED:
    import support.interpreter  # noqa: F401

hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure():
    if importlib.util.find_spec("fused_infonce.kernels") is None:
        raise pytest.UsageError(
            "the repository root hides the installed package: run pytest rather than python -m pytest, "
            "or install with pip install -e ."
        )


def pytest_report_header():
    import fused_infonce

    kernels = "interpreted" if INTERPRETED else "compiled"
    device = torch.cuda.get_device_name() if GPU else "none"
    return [
        f"fused_infonce: {next(iter(fused_infonce.__path__))}",
        f"torch {torch.__version__}; GPU: {device}; kernels: {kernels}",
    ]


def pytest_ignore_collect(collection_path, config):
    """Import for `-m serial` none of the many files that do not hold the word: all their tests would be deselected."""
    if config.option.markexpr == "serial" and collection_path.match("test_*.py"):
        return "serial" not in collection_path.read_text(encoding="utf-8") or None
    return None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    no_triton = pytest.mark.skip(reason="triton is not installed")
    no_gpu = pytest.mark.skip(reason="no CUDA or ROCm device is visible: run make gpu where there is one")
    interpreted = pytest.mark.skip(reason="TRITON_INTERPRET is set, so no kernel is compiled for the GPU: run make gpu")
    compiled = pytest.mark.skip(reason="kernels are compiled for the GPU in this process: set TRITON_INTERPRET=1")
    for item in items:
        if "triton_device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.interpreter if INTERPRETED or not GPU else pytest.mark.gpu)
        if item.get_closest_marker("gpu"):
            if not GPU:
                item.add_marker(no_gpu)
            elif INTERPRETED:
                item.add_marker(interpreted)
        if item.get_closest_marker("interpreter"):
            if not HAS_TRITON:
                item.add_marker(no_triton)
            elif not INTERPRETED:
                item.add_marker(compiled)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Return each device that is there, for tests of what runs on all of them."""
    return request.param


@pytest.fixture
def triton_device():
    """Return the device of the kernels in this process: the GPU, or the CPU, whose tensors the interpreter takes."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def precision():
    """What PyTorch is told of float32 products, as it was before the test afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def fresh_plans():
    """Forget the plans of earlier tests, which may have changed the thresholds and the limit that they rest on."""
    from support.helpers import forget_plans

    forget_plans()
    yield
    forget_plans()


@pytest.fixture(autouse=True)
def any_limit(request, monkeypatch):
    """Let tests ask for a workspace of a few bytes, so that small problems are computed in many parts."""
    from fused_infonce.backends import plan

    if not request.node.get_closest_marker("least_limit"):
        monkeypatch.setattr(plan, "LEAST_LIMIT", 1)


@pytest.fixture(autouse=True)
def seed():
    """Without a GPU of the CPU alone: torch.manual_seed takes long to note a seed for each device that is not there."""
    (torch.manual_seed if GPU else torch.default_generator.manual_seed)(0)


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or kwargs.get("out") is not None:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            else:
                tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
        return tensor

    return wrapper


@pytest.fixture(scope="session")
def compiler_that_knows_torch():
    """Let `torch.compile` list PyTorch's functions, as its first use does, before any test replaces some of them."""
    torch.compile(torch.neg, backend="eager")(torch.ones(1))


@pytest.fixture(autouse=True)
def poisoned_allocations(request, monkeypatch):
    """Fill uninitialised memory with NaN (floats) or the largest value (integers), so that an unwritten element fails.

    torch.utils.deterministic.fill_uninitialized_memory would do it too, but only in deterministic mode, which changes
    the algorithms under test.
    """
    if request.node.get_closest_marker("serial"):
        return
    request.getfixturevalue("compiler_that_knows_torch")
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
