"""FlagEmbedding's model classes over a table of embeddings, plain and fused."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fused_infonce.compat.flag_embedding import FusedEmbedderMixin

from .libraries import library, without_package

# FlagEmbedding's own __init__ imports its inference with peft and more; of its models only transformers and datasets
FINETUNE = "FlagEmbedding.finetune.embedder"
ORIGINALS = {
    "encoder": library(f"{FINETUNE}.encoder_only.base.modeling", without_package).BiEncoderOnlyEmbedderModel,
    "decoder": library(f"{FINETUNE}.decoder_only.base.modeling", without_package).BiDecoderOnlyEmbedderModel,
    "icl": library(f"{FINETUNE}.decoder_only.icl.modeling", without_package).BiDecoderOnlyEmbedderICLModel,
    "m3": library(f"{FINETUNE}.encoder_only.m3.modeling", without_package).EncoderOnlyEmbedderM3Model,
}
FUSED = {kind: type(model.__name__, (FusedEmbedderMixin, model), {}) for kind, model in ORIGINALS.items()}
TOKENS = 3


def exact(model: Any) -> type[nn.Module]:
    """Return the model with scores and losses in float64, of the embeddings as products would see them."""

    def widened(x):
        if isinstance(x, (list, tuple)):
            return type(x)(map(widened, x))
        if x is None or not torch.is_autocast_enabled("cpu"):
            return x if x is None else x.double()
        return x.to(torch.get_autocast_dtype("cpu")).double()

    return type(model.__name__, (model,), {"encode": lambda self, features: widened(model.encode(self, features))})


CLASSES = {"fused": FUSED, "plain": ORIGINALS, "exact": {kind: exact(model) for kind, model in ORIGINALS.items()}}


class Table(nn.Module):
    """A language model whose hidden state is the embedding of each token."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(weight.clone(), freeze=False)
        self.config = SimpleNamespace(vocab_size=len(weight))

    def forward(self, input_ids, attention_mask, return_dict):
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))


def table(n: int, passages: int, d: int, alike: float = 1.0) -> torch.Tensor:
    """Return embeddings of the tokens of n queries, then of n groups of passages with positives alike, in float64."""
    queries = torch.randn(n, TOKENS, d, dtype=torch.float64)
    own = torch.randn(n, passages // n, TOKENS, d, dtype=torch.float64)
    own[:, 0] += alike * queries
    return torch.cat([queries.flatten(0, 1), own.flatten(0, 2)])


def features(first: int, rows: int, parts: int = 1):
    """Return texts of TOKENS tokens each, as a batch or as a list of batches."""
    ids = torch.arange(first * TOKENS, (first + rows) * TOKENS).view(rows, TOKENS)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.chunk(parts)]
    return batches if parts > 1 else batches[0]


def make(kind: str, weight: torch.Tensor, which: str, **options) -> nn.Module:
    base = Table(weight)
    if kind == "m3":
        d = weight.shape[1]
        linear = {name: nn.Linear(d, size, dtype=weight.dtype) for name, size in (("colbert", 4), ("sparse", 1))}
        for layer in linear.values():
            nn.init.constant_(layer.weight, 0.1)
            nn.init.zeros_(layer.bias)
        base = {"model": base, "colbert_linear": linear["colbert"], "sparse_linear": linear["sparse"]}
        options = {"unified_finetuning": False} | options
    tokens = dict.fromkeys(("cls_token_id", "eos_token_id", "pad_token_id", "unk_token_id"), 0)
    tokenizer = SimpleNamespace(**tokens, padding_side="right")
    return CLASSES[which][kind](base, tokenizer, **options).train()


def gradient(model: nn.Module) -> torch.Tensor:
    return model.model.embedding.weight.grad
