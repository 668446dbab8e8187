"""Columns gathered across two processes by sentence-transformers' own gather."""

from __future__ import annotations

import pytest
import torch
from support.libraries import library
from support.processes import in_two_processes
from support.side_by_side import refuse_fallback

library("sentence_transformers")

from support.sentence_models import CACHED, PLAIN, assert_same_in, configuration, drop_in  # noqa: E402


def in_one_of_two_processes(rank):
    """Its rows against the candidates of both."""
    for seed in range(30):
        for name in (PLAIN, CACHED):
            torch.manual_seed(100 * seed + rank)
            with pytest.MonkeyPatch.context() as patch:
                refuse_fallback(patch, drop_in)
                assert_same_in(configuration(seed), name, gather_across_devices=True)


def test_two_processes_give_what_the_original_gives(tmp_path):
    in_two_processes(in_one_of_two_processes, tmp_path)
