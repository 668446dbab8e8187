"""The page on several processes runs as it stands in two of them; only the start of the processes is the test's own.

Its snippets of frameworks run in tests/compat/test_frameworks.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.documentation import DOCS, blocks
from support.processes import in_two_processes


def page_in_one_of_two_processes(rank: int) -> None:
    torch.manual_seed(rank)
    dist.init_process_group = lambda *engine, **given: None  # there is one
    names: dict[str, object] = {}
    for code in blocks("docs/distributed.md"):
        exec(code.replace("range(100)", "range(3)"), names)
    values: list[object] = [None, None]
    value = names["value"]
    assert isinstance(value, torch.Tensor)
    dist.all_gather_object(values, value.item())
    assert values[0] == values[1]


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_the_page_runs_in_two_processes(tmp_path: Path) -> None:
    in_two_processes(page_in_one_of_two_processes, tmp_path)


def test_the_snippets_of_frameworks_are_python() -> None:
    snippets = (DOCS / "distributed.md").read_text().split("```py\n")[1:]
    assert len(snippets) == 4
    for snippet in snippets:
        ast.parse(snippet.partition("```")[0])
