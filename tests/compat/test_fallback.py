"""A drop-in hands on to the original what the fused loss refuses, and nothing else."""

from __future__ import annotations

import warnings

import pytest

from fused_infonce.compat import common


def refuse(why: str = "what was expected, got another"):
    raise ValueError(why)


def test_a_refused_call_is_the_originals_and_said_once():
    common.say_once.cache_clear()
    with pytest.warns(UserWarning, match="what was expected$"):
        assert common.fused_or(lambda: 2, "a loss", refuse) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert common.fused_or(lambda: 2, "a loss", refuse) == 2


def test_an_error_after_the_fused_loss_is_no_refusal():
    """A backward that fails, in a user's hook say, must not run the original's as well."""
    with pytest.raises(ValueError, match="a hook"):
        common.fused_or(lambda: 2, "a loss", lambda: 1, lambda _: refuse("a hook"))
    assert common.fused_or(lambda: 2, "a loss", lambda: 1, lambda x: x + 2) == 3
