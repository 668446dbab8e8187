"""A model trained with the drop-in losses and with the originals, by sentence-transformers' own trainer."""

from __future__ import annotations

import random

import pytest
import torch
from support.helpers import error
from support.libraries import library
from support.side_by_side import refuse_fallback

originals = library("sentence_transformers.sentence_transformer.losses")
transformers = library("transformers")
datasets = library("datasets")

from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

from fused_infonce.compat import sentence_transformers as drop_in  # noqa: E402

WORDS = [f"word{i}" for i in range(60)]
STEPS = 8


def bert(path, words, size):
    """A BERT of two layers and its tokenizer."""
    vocabulary = path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=size, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * size, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return bert(tmp_path_factory.mktemp("bert"), WORDS, 32)


@pytest.fixture(scope="module")
def guides(tmp_path_factory):
    """One with the model's tokenizer, one with its own. No cosine of theirs is so near a tie that rounding decides."""
    return {
        "guide": bert(tmp_path_factory.mktemp("guide"), WORDS, 24),
        "foreign guide": bert(tmp_path_factory.mktemp("foreign"), WORDS[::-1], 16),
    }


def load(checkpoint):
    transformer = Transformer(checkpoint)
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def triplets(n):
    """Sentences whose positives share half of their words, and hard negatives that share two."""
    draw = random.Random(0)
    rows = {"anchor": [], "positive": [], "negative": []}
    for _ in range(n):
        words = draw.sample(WORDS, 8)
        rows["anchor"].append(" ".join(words))
        rows["positive"].append(" ".join(words[:4] + draw.sample(WORDS, draw.randint(2, 6))))
        rows["negative"].append(" ".join(words[6:] + draw.sample(WORDS, draw.randint(2, 6))))
    return datasets.Dataset.from_dict(rows)


def train(where, name, checkpoint, folder, wrap, precision, options):
    """(losses of steps and of the evaluation, parameters before and after)"""
    transformers.set_seed(3)
    model = load(checkpoint)
    options = options | ({"guide": load(options["guide"])} if "guide" in options else {})
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss = getattr(where, name)(model, **options)
    if wrap:
        loss = originals.MatryoshkaLoss(model, loss, [32, 16])
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=16, learning_rate=0.02, optim="sgd",
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3,
        bf16=precision == "bf16", gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=triplets(96), eval_dataset=triplets(20), loss=loss
    )
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    model.save_pretrained(str(folder))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.tensor([*losses, evaluated], dtype=torch.float64), before, after


GTE = {
    "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
    "hardness_mode": "hard_negatives",
    "hardness_strength": 5.0,
}


@pytest.mark.parametrize(
    ("name", "wrap", "precision", "options"),
    [
        ("MultipleNegativesRankingLoss", False, "fp32", {}),
        ("MultipleNegativesRankingLoss", True, "fp32", GTE),
        ("MultipleNegativesRankingLoss", False, "bf16", {}),
        ("CachedMultipleNegativesRankingLoss", False, "fp32", GTE | {"mini_batch_size": 5}),
        ("CachedMultipleNegativesRankingLoss", True, "fp32", {"mini_batch_size": 5}),
        ("GISTEmbedLoss", False, "fp32", {"guide": "guide", "temperature": 0.05}),
        ("GISTEmbedLoss", True, "fp32", {"guide": "foreign guide", "temperature": 0.05, "margin": 0.05}),
        ("CachedGISTEmbedLoss", False, "fp32", {"guide": "guide", "temperature": 0.05, "mini_batch_size": 5}),
    ],
)
def test_the_same_curves(name, wrap, precision, options, checkpoint, guides, tmp_path, monkeypatch):
    refuse_fallback(monkeypatch, drop_in)
    options = options | ({"guide": guides[options["guide"]]} if "guide" in options else {})
    ours, theirs = (
        train(where, name, checkpoint, tmp_path, wrap, precision, options) for where in (drop_in, originals)
    )
    assert torch.equal(ours[1], theirs[1])
    assert ours[0][:-1].diff().abs().min() > 1e-3  # it learns something at every step
    bound = 1e-5 if precision == "fp32" else 2e-2
    assert error(ours[0], theirs[0]) <= bound
    assert error(ours[2] - ours[1], theirs[2] - theirs[1]) <= 10 * bound  # what training changed
    assert ("MatryoshkaLoss" if wrap else name) in (tmp_path / "README.md").read_text()
