"""The classes of the losses as a user meets them: the order of arguments, and a docstring that stands alone."""

from __future__ import annotations

import inspect
import re

import pytest

import fused_infonce

CLASSES = [
    name for name in fused_infonce.__all__
    if inspect.isclass(getattr(fused_infonce, name)) and hasattr(getattr(fused_infonce, name), "forward")
]  # fmt: skip
# What may be passed by position: the first argument, or as many as the class of that name elsewhere takes so.
POSITIONAL = {
    "ClipLoss": [],
    "FusedInfoNCELoss": ["temperature", "reduction", "negative_mode"],  # of info-nce-pytorch
    "GlobalContrastiveLoss": ["samples"],
    "GroupedInfoNCELoss": ["group_size"],
    "MatryoshkaLoss": ["loss", "dims", "weights", "n_dims_per_step"],  # of sentence-transformers
    "MoCoLoss": ["dim"],
    "SigLipLoss": [],
}
every_class = pytest.mark.parametrize("name", CLASSES)


@every_class
def test_options_are_keyword_only(name):
    parameters = inspect.signature(getattr(fused_infonce, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert positional == POSITIONAL.get(name, ["temperature"])


@every_class
def test_the_docstring_says_what_every_option_means(name):
    doc = inspect.getdoc(getattr(fused_infonce, name))
    options, _, _ = doc.partition("\nArgs:\n")[2].partition("\n\n")
    said = re.findall(r"^ {4}(\w+): (.+)", options, re.MULTILINE)
    assert [option for option, _ in said] == list(inspect.signature(getattr(fused_infonce, name)).parameters)
    assert "as in `" not in options
    assert doc[0].isupper()
    assert doc.partition("\n\n")[0].endswith(".")
