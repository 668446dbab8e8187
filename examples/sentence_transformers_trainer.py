"""sentence-transformers' own trainer with the fused loss: `python examples/sentence_transformers_trainer.py [model]`.

Only the import of the loss differs from any script for sentence-transformers. Without the name or the path of a model a
tiny one is built here, so that nothing is downloaded. This file is not called sentence_transformers.py because Python
would then import it in place of the library.
"""

from __future__ import annotations

import itertools
import sys
import tempfile

import torch

try:
    import datasets
    import sentence_transformers
    import tokenizers
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
except ImportError as error:
    sys.exit(f"This example needs more packages ({error}):\n  pip install 'sentence-transformers[train]==6.2.*'")

from fused_infonce.compat.sentence_transformers import MultipleNegativesRankingLoss  # the line to change

ANIMALS = ("a cat", "the dog", "a horse", "the owl", "a mouse", "the fox", "a seal", "the goat")
ACTS = {
    "sleeps": "is fast asleep", "eats": "has a meal", "runs": "moves on quickly", "sings": "makes a melody",
    "hides": "cannot be seen", "swims": "crosses the water", "waits": "stays for long", "plays": "has some fun",
}  # fmt: skip


def sentences() -> dict[str, list[str]]:
    """Makes pairs of sentences that say one thing in two ways."""
    pairs = list(itertools.product(ANIMALS, ACTS))
    return {
        "anchor": [f"{animal} {act}" for animal, act in pairs],
        "positive": [f"{animal} {ACTS[act]}" for animal, act in pairs],
    }


def tiny_model(texts: list[str]) -> sentence_transformers.SentenceTransformer:
    """Builds a model that averages an embedding per word, over the words of `texts`."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return sentence_transformers.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=64)])


def main() -> None:
    """Trains a model on the pairs and prints a similarity before and after."""
    torch.manual_seed(0)
    pairs, given = sentences(), sys.argv[1:]
    texts = [*pairs["anchor"], *pairs["positive"]]
    model = sentence_transformers.SentenceTransformer(given[0]) if given else tiny_model(texts)
    example = ["a cat sleeps", "a cat is fast asleep", "a cat crosses the water"]
    loss = MultipleNegativesRankingLoss(model, scale=20.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=folder, num_train_epochs=20, per_device_train_batch_size=32,
            learning_rate=2e-5 if given else 2e-2, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = sentence_transformers.SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(pairs), loss=loss
        )
        for when in ("before", "after"):
            same, other = model.similarity(*[model.encode(example)] * 2)[0, 1:].tolist()
            print(f"{when}: '{example[0]}' is {same:.2f} like '{example[1]}', {other:.2f} like '{example[2]}'")
            if when == "before":
                trainer.train()


if __name__ == "__main__":
    main()
