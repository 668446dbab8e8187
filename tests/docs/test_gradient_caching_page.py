"""The snippets of docs/gradient-caching.md that need a GPU, a cluster or another library: they are Python, and what
they pass to `cached` is what it takes."""

from __future__ import annotations

import ast
import inspect
import re

from support.documentation import DOCS

from fused_infonce import cached


def test_snippets_that_are_not_run_use_what_there_is():
    text = (DOCS / "gradient-caching.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    calls = [
        node
        for snippet in snippets
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cached"
    ]
    assert len(calls) == len(snippets) == 5
    options = set(inspect.signature(cached).parameters)
    for call in calls:
        assert {keyword.arg for keyword in call.keywords} <= options
