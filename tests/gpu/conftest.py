"""Without a GPU the first call of every test here runs all the same, of few rows, in Triton's interpreter.

That proves that the tests run. What a GPU alone can answer is marked gpu.
"""

from pathlib import Path

import pytest
from support.helpers import COMPILED

from fused_infonce.backends import plan

HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    if COMPILED:
        return
    seen, others = set(), []
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("interpreter") and not item.get_closest_marker("gpu"):
            (others.append(item) if item.originalname in seen else seen.add(item.originalname))
    items[:] = [item for item in items if item not in set(others)]
    config.hook.pytest_deselected(items=others)


@pytest.fixture(autouse=True)
def every_plan(monkeypatch):
    """Let few and short rows take the plans that many and long ones take on a GPU."""
    if not COMPILED:
        for name, value in {
            "GPU_DENSE": 0,
            "GPU_DENSE_WIDE": 0,
            "GPU_ONEPASS_DIM": 17,
            "GPU_SCORES_DIM": 17,
            "STREAMING_ROWS": 1,
            "STREAMING_DIM": 16,
        }.items():
            monkeypatch.setattr(plan, name, value)
