"""The trained retriever on disk, and whether it is the one that a run would train."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .mining import Pair, sources
from .model import Encoder, embed, hashed_features
from .report import versions
from .settings import Settings
from .split import Split
from .text import words

MODEL_NAME = "model.pt"
# Files of this folder that decide which model a training ends in.
CODE = ("mining.py", "text.py", "split.py", "model.py", "train.py")


@dataclass(frozen=True)
class Retriever:
    """A trained encoder with every mined object and the embedding of its key (path, name, arguments; no docstring)."""

    encoder: Encoder
    pairs: list[Pair]
    held_out: frozenset[str]  # signatures
    keys: Tensor
    device: torch.device

    @classmethod
    def of(cls, encoder: Encoder, pairs: list[Pair], split: Split, device: torch.device) -> Retriever:
        keys = embed(encoder, hashed_features([pair.key for pair in pairs]), device)
        return cls(encoder, pairs, frozenset(pair.signature for pair in split.held_out), keys, device)

    def similarities(self, questions: Sequence[str]) -> Tensor:
        """Cosines (questions, objects)."""
        return embed(self.encoder, hashed_features([words(one) for one in questions]), self.device) @ self.keys.T


def made_with(settings: Settings) -> dict[str, Any]:
    """Everything that decides which model a training ends in, found without parsing a source."""
    here = Path(__file__).parent
    code = hashlib.sha256(b"".join((here / name).read_bytes() for name in CODE)).hexdigest()
    return {
        "--seed": settings.seed,
        "--max-pairs": settings.max_pairs,
        "--held-out": settings.held_out,
        "--epochs": settings.epochs,
        "--batch": settings.batch,
        "--dim": settings.dim,
        "--temperature": settings.temperature,
        "--source": str(settings.source.resolve()) if settings.source else "installed packages",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "sources that were read": _stamp(settings.source),
        "code of the demo": code,
    }


def changes(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One phrase for each way in which the saved model's making differs from the wanted one."""
    found = []
    for name in {**saved, **wanted}:
        before, now = saved.get(name), wanted.get(name)
        if before != now:
            is_digest = name in {"sources that were read", "code of the demo"}
            found.append(f"{name} changed" if is_digest else f"{name} was {before} and is {now}")
    return found


def save(settings: Settings, retriever: Retriever) -> Path:
    """Writes the model beside the report, whole or not at all."""
    path = settings.output / MODEL_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    content = {
        "made_with": made_with(settings),
        "date": time.strftime("%Y-%m-%d"),
        "encoder": retriever.encoder.state_dict(),
        "pairs": [[one.qualified_name, list(one.arguments), one.text, one.summary] for one in retriever.pairs],
        "held_out": sorted(retriever.held_out),
        "keys": retriever.keys,
    }
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load(settings: Settings, device: torch.device) -> Retriever | None:
    """The saved model where it is what these settings would train, else None; says which, and why."""
    path = settings.output / MODEL_NAME
    if not path.exists():
        print(f"No model is saved in {path} yet: training one. Later questions are answered from it.")
        return None
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        differing = changes(content["made_with"], made_with(settings))
        if differing:
            print(f"The saved model {path} was made otherwise ({'; '.join(differing)}): training again.")
            return None
        encoder = Encoder(settings.dim).to(device)
        encoder.load_state_dict(content["encoder"])
        pairs = [Pair(name, tuple(arguments), text, summary) for name, arguments, text, summary in content["pairs"]]
        held_out, keys, date = frozenset(content["held_out"]), content["keys"], content["date"]
    except Exception as error:  # a file of any content: torch.load's errors are of many types
        print(f"The saved model {path} cannot be read ({type(error).__name__}): training again.")
        return None
    print(f"Answering from {path}, trained on {date}; nothing is trained again.")
    return Retriever(encoder.eval(), pairs, held_out, keys, device)


def _stamp(source: Path | None) -> str:
    """A digest of the names, sizes and times of change of the sources to mine."""
    digest = hashlib.sha256()
    for package, root, path in sources(source):
        status = path.stat()
        digest.update(f"{package} {path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
