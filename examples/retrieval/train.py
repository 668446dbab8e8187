"""Training of the bi-encoder with FusedInfoNCELoss and in-batch negatives."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from tqdm import tqdm

from fused_infonce import FusedInfoNCELoss
from fused_infonce.backends import BackendName

from .mining import Pair, mine
from .model import Bags, Encoder, hashed_features
from .settings import Settings
from .split import Split, drop_repeats, split_pairs


@dataclass(frozen=True)
class TrainingData:
    """Features of both forms of every query, one above the other, and of the keys."""

    queries: csr_matrix
    keys: csr_matrix

    @classmethod
    def of(cls, pairs: list[Pair]) -> TrainingData:
        plain = hashed_features([pair.query for pair in pairs])
        strict = hashed_features([pair.strict_query for pair in pairs])
        return cls(vstack([plain, strict]).tocsr(), hashed_features([pair.key for pair in pairs]))

    def __len__(self) -> int:
        return self.keys.shape[0]


@dataclass(frozen=True)
class TrainingOptions:
    """The options of a training, besides its data."""

    dim: int = 256
    batch: int = 1024
    epochs: int = 5
    temperature: float = 0.05
    learning_rate: float = 2e-3
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Training:
    """A trained encoder, the loss of every step, and how long it took."""

    encoder: Encoder
    losses: list[float]
    seconds: float


def choose_device(name: str) -> torch.device:
    """Resolves "auto" to a GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def training_options(settings: Settings) -> TrainingOptions:
    """Picks what the training needs from the command line's options."""
    return TrainingOptions(
        dim=settings.dim,
        batch=settings.batch,
        epochs=settings.epochs,
        temperature=settings.temperature,
        seed=settings.seed,
        device=choose_device(settings.device),
    )


def prepare(settings: Settings) -> tuple[list[Pair], Split]:
    """Mines and splits the pairs, and prints a line or two on both."""
    print("Parsing the sources of", settings.source or "torch, numpy and the standard library", "...")
    started = time.perf_counter()
    pairs = drop_repeats(mine(settings.max_pairs, settings.source))
    split = split_pairs(pairs, settings.held_out, settings.seed)
    seconds = time.perf_counter() - started
    print(f"Mined {len(pairs)} pairs by parsing sources, in {seconds:.0f} s: {len(split.train)} to train on,")
    print(f"{len(split.held_out)} held out, nearly equal texts and equal names kept on one side. One of them:")
    print(f"  query  {split.held_out[0].query}\n  key    {split.held_out[0].key}\n")
    return pairs, split


def new_encoder(options: TrainingOptions) -> Encoder:
    """Makes the untrained encoder of a seed."""
    torch.manual_seed(options.seed)
    return Encoder(options.dim).to(options.device)


def train(
    data: TrainingData,
    options: TrainingOptions,
    *,
    backend: BackendName = "auto",
    max_steps: int | None = None,
    label: str = "training",
) -> Training:
    """Trains a fresh encoder on `data`. Everything but the loss's backend follows from the seed."""
    encoder = new_encoder(options)
    criterion = FusedInfoNCELoss(temperature=options.temperature, backend=backend)
    batch = min(options.batch, len(data))
    per_epoch = len(data) // batch
    total = options.epochs * per_epoch
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=options.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=total + 1, pct_start=0.1
    )
    steps = total if max_steps is None else min(max_steps, total)
    rng = torch.Generator().manual_seed(options.seed)
    losses: list[Tensor] = []
    started = time.perf_counter()
    # disable=None: no bar where stderr is not a terminal
    with tqdm(total=steps, desc=label, unit="step", disable=None, file=sys.stderr) as bar:
        while len(losses) < steps:
            order = torch.randperm(len(data), generator=rng)
            # Each time, a pair shows its query with or without the words that it shares with the name.
            form = torch.randint(2, (len(data),), generator=rng)
            for chosen in order[: per_epoch * batch].split(batch)[: steps - len(losses)]:
                query_rows = data.queries[(chosen + form[chosen] * len(data)).numpy()]
                query = encoder(Bags.of(query_rows, options.device))
                key = encoder(Bags.of(data.keys[chosen.numpy()], options.device))
                loss = criterion(query, key)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                bar.update()
                if not bar.disable and bar.n % 4 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
    values = torch.stack(losses).tolist() if losses else []
    return Training(encoder.eval(), values, time.perf_counter() - started)
