"""The libraries that the drop-ins replace, as far as they are installed; `make test-compat` installs all of them."""

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

REQUIRED = os.environ.get("FUSED_INFONCE_COMPAT") == "1"  # then what is missing fails, where else it skips


def seeds(count: int) -> range:
    """Return the seeds of random calls: all of them in `make test-compat`, every fourth of them in `make test`."""
    return range(0, count, 1 if REQUIRED else 4)


def library(name: str, load=importlib.import_module) -> ModuleType:
    """Return a module of a library, or skip the test module that asks for it where the library is missing."""
    if REQUIRED:
        return load(name)
    try:
        return load(name)
    except ImportError as why:
        pytest.skip(f"{name} is not installed, which make test-compat does: {why}", allow_module_level=True)


def without_package(name: str) -> ModuleType:
    """Return a module of a package, with its parents replaced by empty ones that run no imports of their own."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            spec = importlib.util.find_spec(parent)
            if spec is None or spec.submodule_search_locations is None:
                raise ImportError(f"no package {parent}")
            module = ModuleType(parent)
            module.__path__ = list(spec.submodule_search_locations)
            sys.modules[parent] = module
            if depth > 1:
                setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
    module = importlib.import_module(name)
    setattr(sys.modules[".".join(parts[:-1])], parts[-1], module)
    return module


def of_lightly(name: str) -> ModuleType:
    """Return a module of lightly.

    What gathers a bank's rows is in a module that imports a class of torchvision, for models: where that is not
    installed another class stands in while the module loads.
    """
    names = [] if importlib.util.find_spec("torchvision") else ["torchvision", "torchvision.ops"]
    stubs: dict[str, Any] = {x: ModuleType(x) for x in names}
    for stub in stubs.values():
        stub.StochasticDepth = torch.nn.Identity
    sys.modules.update(stubs)
    try:
        without_package("lightly.models.utils")
        return without_package(name)
    finally:
        for stub in stubs:
            del sys.modules[stub]
