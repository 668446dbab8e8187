"""Hooks of pytest by which a test that breaks the GPU's context fails alone.

After an illegal access every call of its process fails. So whatever a test has launched ends within the test; and where
the GPU answers no more, the process ends with it. With pytest-xdist the tests after it go to a new process; without,
they are not run.
"""

import os
import sys

import pytest
import torch


def synchronize() -> None:
    """Wait for what was launched on a GPU, whose failures are raised here."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    synchronize()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    result = yield
    try:
        synchronize()
    except Exception as error:
        said = f"{item.nodeid} broke the GPU's context: {error}"
        if hasattr(item.config, "workerinput"):  # a process of pytest-xdist, which starts another
            print(said, file=sys.stderr, flush=True)
            os._exit(1)
        item.session.shouldfail = f"{said}; the tests after it were not run"
    return result
