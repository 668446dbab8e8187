"""The examples of the documentation run, in the order in which they are read."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["losses.md"])
def test_examples_run(name):
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
    import fused_infonce

    text, code = (DOCS / "losses.md").read_text(), "".join(blocks("losses.md"))
    for name in fused_infonce.__all__:
        if name.endswith("Loss"):
            assert f"| `{name}` |" in text, name
            assert f"{name}(" in code, name
