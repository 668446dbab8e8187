"""Chunks of `cached` by tokens: what they hold, what is cut off, and that gradients stay as they were."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from support.encoders import D, Text, assert_gradients, gradients, softmax_loss
from torch import Tensor

from fused_infonce import cached
from fused_infonce.wrappers.chunks import Batch


def texts(n: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and a mask, padded left, right or on both sides, some rows empty, some full."""
    draw = random.Random(seed)
    mask = torch.zeros(n, length, dtype=torch.int64)
    for row in range(n):
        start, end = sorted(draw.choices(range(length + 1), k=2))
        mask[row, {0: 0, 1: start}.get(draw.randrange(3), start) : end] = 1
        if draw.random() < 0.1:
            mask[row] = draw.randrange(2)
    return torch.randint(20, (n, length)), mask


@pytest.mark.parametrize("seed", range(40))
def test_chunks_are_rows_in_order_within_the_budget_and_lose_padding_alone(seed):
    draw = random.Random(seed)
    n, length, tokens = draw.randrange(1, 30), draw.randrange(1, 12), draw.randrange(1, 60)
    ids, mask = texts(n, length, seed)
    wide = torch.randn(n, length, 3)
    other = torch.randn(n, 12)  # has the rows but not the columns
    inputs = {"input_ids": ids, "x": [wide], "attention_mask": mask, "y": ids[0], "z": other}
    batch = Batch("inputs", inputs, 64, tokens)
    row = 0
    for i, chunk in enumerate(batch):
        place = batch.chunks[i]
        assert place.rows.start == row
        row = place.rows.stop
        rows, columns = chunk["attention_mask"].shape
        assert rows > 0
        assert columns > 0
        assert rows * columns <= tokens or rows == 1
        assert chunk["attention_mask"].sum() == mask[place.rows].sum()  # no token is lost
        seen = chunk["attention_mask"].bool()
        assert (seen[:, 0].any() and seen[:, -1].any()) or not seen.any()  # no padding is kept
        assert torch.equal(chunk["input_ids"], ids[place.rows, place.columns])
        assert torch.equal(chunk["x"][0], wide[place.rows, place.columns])
        assert torch.equal(chunk["z"], other[place.rows])
        assert len(chunk["y"]) == (length if length != n else rows)
        if i + 1 < len(batch):  # one more row would have been too many
            more = mask[place.rows.start : row + 1].any(0).nonzero()
            assert (rows + 1) * (more.max() + 1 - more.min()) > tokens if len(more) else True
    assert row == n


def test_gradients_are_those_of_uncut_chunks():
    torch.manual_seed(0)
    models = Text(), Text()
    given = [texts(60, 12, seed) for seed in range(2)]
    for _, mask in given:
        mask[:, 5] = 1
    parameters = [x for model in models for x in model.parameters()]
    embeddings = [model(*batch)["pooler_output"] for model, batch in zip(models, given, strict=True)]
    wanted = gradients(softmax_loss(*embeddings), parameters)
    for model in models:
        model.seen.clear()
    towers = [
        (model, {"input_ids": ids, "attention_mask": mask}) for model, (ids, mask) in zip(models, given, strict=True)
    ]
    cached(softmax_loss, *towers, pick="pooler_output", tokens=[48, 100]).backward()
    assert_gradients(parameters, wanted)
    for model, tokens in zip(models, (48, 100), strict=True):
        assert all(rows * columns <= tokens for rows, columns in model.seen)
        assert len(model.seen) > 2 * 60 * 12 * 0.5 / tokens
        assert min(columns for _, columns in model.seen) < 12


@dataclass
class Query:
    ids: Tensor
    attention_mask: Tensor


def test_a_mask_is_found_at_any_depth_and_of_any_dtype():
    ids, mask = texts(8, 5, 1)
    for inputs in (Query(ids, mask.bool()), ({"attention_mask": mask.float()}, ids), [{"deep": Query(ids, mask)}]):
        batch = Batch("inputs", inputs, 64, 10)
        assert [x.rows for x in batch.chunks] == [x.rows for x in Batch("i", {"attention_mask": mask}, 64, 10).chunks]


@pytest.mark.parametrize("shape", [(8,), (8, 1, 5), (7, 5)], ids=str)
def test_another_mask_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask of shape \(8, L\) in inputs, got float32 \("):
        Batch("inputs", {"ids": torch.zeros(8, 5), "attention_mask": torch.ones(shape)}, 64, 10)


def test_rows_without_a_token_keep_one_column():
    batch = Batch("inputs", {"attention_mask": torch.zeros(10, 5)}, 64, 4)
    assert [tuple(x["attention_mask"].shape) for x in batch] == [(4, 1), (4, 1), (2, 1)]


def test_no_rows_and_no_columns():
    model = Text()
    for n, length in ((0, 5), (3, 0)):
        ids, mask = torch.zeros(2, n, length, dtype=torch.int64)
        given = {"input_ids": ids, "attention_mask": mask}
        value = cached(lambda x: x.sum() + x.shape[0], (model, given), pick="pooler_output", tokens=8)
        assert value == n
        value.backward()
    assert model.table.weight.shape == (20, D)
