"""The libraries that the drop-ins replace, as far as they are installed. `make test-compat` installs all of them."""

import importlib
import os
from types import ModuleType

import pytest

REQUIRED = os.environ.get("FUSED_INFONCE_COMPAT") == "1"  # then what is missing fails, where else it skips


def library(name: str, load=importlib.import_module) -> ModuleType:
    """A module of a library; at the top of a test module."""
    if REQUIRED:
        return load(name)
    try:
        return load(name)
    except ImportError as why:
        pytest.skip(f"{name} is not installed, which make test-compat does: {why}", allow_module_level=True)
