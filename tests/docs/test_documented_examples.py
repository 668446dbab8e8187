"""The examples of the documentation run, in the order in which they are read."""

import re
from pathlib import Path

import pytest
import torch

import fused_infonce

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


def test_examples_of_the_readme_run():
    """What the blocks leave to the reader is made here; the drop-ins are imported where their libraries are tested."""
    torch.manual_seed(0)
    n, m, d = 600, 900, 8  # rows enough for the plan that is shown
    names: dict[str, object] = {"torch": torch, "fused_infonce": fused_infonce, "model": torch.nn.Linear(d, d)}
    for name in ("query", "positive_key", "key", "image", "text"):
        names[name] = torch.randn(n, d, requires_grad=True)
    names |= {"keys": torch.randn(m, d), "negatives": torch.randn(m, d), "negative_keys": torch.randn(m, d)}
    names |= {"index": torch.randint(m, (n,)), "no_pair": torch.arange(n) == 2, "document": torch.arange(n) // 2}
    names |= {"their_document": torch.arange(m), "label": torch.arange(n) % 3, "w": torch.rand(n)}
    names |= {"per_row": torch.rand(n) + 0.05}
    ran = 0
    for block in blocks("../README.md"):
        code = "\n".join(line for line in block.splitlines() if not re.match(r"from (info_nce|.*compat)", line))
        if code.startswith(">>> "):
            printed = eval(code.splitlines()[0].removeprefix(">>> print(").removesuffix(")"), names)
            assert str(printed).startswith(code.splitlines()[1].removesuffix(", ...")), printed
        else:
            exec(code, names)
        ran += bool(code)
    assert ran >= 6


@pytest.mark.parametrize("name", ["losses.md"])
def test_examples_of_the_documentation_run(name):
    torch.manual_seed(0)
    names: dict[str, object] = {}
    code = blocks(name)
    assert len(code) > 5
    for block in code:
        for line in block.splitlines():
            exec(line, names)  # a line at a time, so that a value can be looked at
            if re.match(r"\w+Loss\(.*\)\(", line):
                value = eval(line.partition("#")[0].removesuffix(".backward()"), names)
                assert value.dim() == 0
                assert value.isfinite()


def test_every_loss_has_a_row_and_an_example():
    text, code = (DOCS / "losses.md").read_text(), "".join(blocks("losses.md"))
    for name in fused_infonce.__all__:
        if name.endswith("Loss"):
            assert f"| `{name}` |" in text, name
            assert f"{name}(" in code, name
