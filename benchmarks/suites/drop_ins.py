"""Every drop-in against the library that it replaces, on the same call: time and memory of a forward and backward.

    python -m benchmarks.suites.drop_ins                                all that are installed, as a table
    python -m benchmarks.suites.drop_ins --record results/drop_ins.csv  the same, appended to a CSV file

In turn, on fresh inputs each round, medians; first the losses and gradients of both must agree.
"""

from __future__ import annotations

import argparse
import gc
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import contestants, record
from benchmarks.cases import BIAS, OURS, SCALE
from benchmarks.contest import peak_bytes
from benchmarks.contestants import without_package

FIELDS = (
    *("date", "commit", "device", "torch", "library", "loss", "call", "contestant"),
    *("median_ms", "p20_ms", "p80_ms", "peak_extra_mib"),
)
CPU = torch.device("cpu")
Loss = Callable[..., Any]


class Match(NamedTuple):
    """A call of a library's loss and of ours."""

    package: str
    loss: str
    call: str
    make: Callable[[], tuple[Loss, Loss]]  # ours, theirs
    shapes: tuple[tuple[int, ...], ...]  # of the embeddings
    rest: Callable[[], tuple[Any, ...]] = tuple  # what follows them
    rounds: int = 5


def info_nce() -> tuple[Loss, Loss]:
    from info_nce import InfoNCE

    from fused_infonce.compat import info_nce as ours

    return ours.InfoNCE(temperature=0.05), InfoNCE(temperature=0.05)


def paired() -> tuple[Loss, Loss]:
    from info_nce import InfoNCE

    from fused_infonce.compat import info_nce as ours

    return ours.InfoNCE(0.05, negative_mode="paired"), InfoNCE(0.05, negative_mode="paired")


def open_clip() -> tuple[Loss, Loss]:
    theirs = without_package("open_clip.loss").ClipLoss()
    from fused_infonce.compat import open_clip as ours

    return unit(ours.ClipLoss()), unit(theirs)


def open_clip_siglip() -> tuple[Loss, Loss]:
    theirs = without_package("open_clip.loss").SigLipLoss()
    from fused_infonce.compat import open_clip as ours

    return unit(ours.SigLipLoss()), unit(theirs)


def lightly() -> tuple[Loss, Loss]:
    contestants.lightly()  # loads its modules
    from fused_infonce.compat import lightly as ours

    return ours.NTXentLoss(0.1), without_package("lightly.loss.ntx_ent_loss").NTXentLoss(0.1)


def metric_learning(name: str, **options: Any) -> Callable[[], tuple[Loss, Loss]]:
    def make() -> tuple[Loss, Loss]:
        from pytorch_metric_learning import losses

        from fused_infonce.compat import pytorch_metric_learning as ours

        return getattr(ours, name)(**options), getattr(losses, name)(**options)

    return make


def sentence_transformers(name: str, **options: Any) -> Callable[[], tuple[Loss, Loss]]:
    def make() -> tuple[Loss, Loss]:
        from sentence_transformers.sentence_transformer import losses

        from fused_infonce.compat import sentence_transformers as ours

        made = [getattr(module, name)(nn.Identity(), **options) for module in (ours, losses)]
        both = [lambda *x, loss=loss: loss.compute_loss_from_embeddings(list(x), None) for loss in made]
        return both[0], both[1]

    return make


class Given(nn.Sequential):
    """A model of sentence-transformers of which the losses see these embeddings."""

    max_seq_length = 8

    def __init__(self, key: str):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        super().__init__(nn.Identity())
        self.key = key
        words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features | {"sentence_embedding": features[self.key]}


def gist() -> tuple[Loss, Loss]:
    from sentence_transformers.sentence_transformer import losses

    from fused_infonce.compat import sentence_transformers as ours

    def make(module: Any) -> Loss:
        loss = module.GISTEmbedLoss(Given("rows"), Given("guide"), temperature=0.05)
        return lambda *x: loss([{"rows": row, "guide": row.detach().roll(1, 1)} for row in x], None)

    return make(ours), make(losses)


def flag_embedding() -> tuple[Loss, Loss]:
    original = without_package("FlagEmbedding.finetune.embedder.encoder_only.base.modeling").BiEncoderOnlyEmbedderModel
    from fused_infonce.compat.flag_embedding import FusedEmbedderMixin

    def make(model: Any) -> Loss:
        base: Any = nn.Identity()
        base.config = types.SimpleNamespace(vocab_size=1)
        built = model(base, types.SimpleNamespace(), temperature=0.02, normalize_embeddings=True)
        return lambda q, p: built._compute_in_batch_neg_loss(*(nn.functional.normalize(x, dim=1) for x in (q, p)))[1]

    return make(type("Fused", (FusedEmbedderMixin, original), {})), make(original)


def unit(loss: Loss) -> Loss:
    """CLIP's and SigLIP's models return unit rows."""
    return lambda a, b, *rest: loss(nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1), *rest)


def classes(n: int, count: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.arange(n) % count,)


MATCHES = [
    Match("info-nce-pytorch", "InfoNCE", "8192 pairs, D = 384", info_nce, ((8192, 384),) * 2),
    Match(
        "info-nce-pytorch", "InfoNCE", "4096, 16 own negatives, D = 384", paired,
        ((4096, 384), (4096, 384), (4096, 16, 384)),
    ),
    Match("open_clip", "ClipLoss", "8192 pairs, D = 512", open_clip, ((8192, 512),) * 2, lambda: (torch.tensor(20.0),)),
    Match(
        "open_clip", "SigLipLoss", "8192 pairs, D = 768", open_clip_siglip, ((8192, 768),) * 2,
        lambda: (torch.tensor(SCALE), torch.tensor(BIAS)),
    ),
    Match("lightly", "NTXentLoss", "4096 pairs, D = 128", lightly, ((4096, 128),) * 2),
    Match(
        "pytorch-metric-learning", "NTXentLoss", "256 in 32 classes, D = 128",
        metric_learning("NTXentLoss", temperature=0.1), ((256, 128),), classes(256, 32), 3,
    ),
    Match(
        "pytorch-metric-learning", "SupConLoss", "4096 in 64 classes, D = 128",
        metric_learning("SupConLoss", temperature=0.1), ((4096, 128),), classes(4096, 64), 3,
    ),
    Match(
        "sentence-transformers", "MultipleNegativesRankingLoss", "4096, a hard negative each, D = 384",
        sentence_transformers("MultipleNegativesRankingLoss"), ((4096, 384),) * 3,
    ),
    Match(
        "sentence-transformers", "MultipleNegativesRankingLoss", "4096, four directions, D = 384",
        sentence_transformers(
            "MultipleNegativesRankingLoss",
            directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
        ),
        ((4096, 384),) * 2,
    ),
    Match("sentence-transformers", "GISTEmbedLoss", "512, a negative each, D = 384", gist, ((512, 384),) * 3),
    Match(
        "FlagEmbedding", "BiEncoderOnlyEmbedderModel", "1024 groups of 8, D = 768", flag_embedding,
        ((1024, 768), (8192, 768)),
    ),
]  # fmt: skip


def inputs(match: Match, seed: int) -> tuple[Any, ...]:
    """Normal rows, and positives that are alike where a guide judges them, which must not toss a coin."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(shape, generator=generator) for shape in match.shapes]
    if match.loss == "GISTEmbedLoss":
        rows[1] += rows[0]
    return *(x.requires_grad_() for x in rows), *match.rest()


def step(loss: Loss, given: tuple[Any, ...]) -> list[Tensor]:
    value = loss(*given)
    value.backward()
    return [value.detach(), *(x.grad for x in given if isinstance(x, Tensor) and x.grad is not None)]


def play(match: Match) -> list[dict[str, object]]:
    """Time one match, and return a CSV row for either side."""
    losses = dict(zip((OURS, match.package), match.make(), strict=True))
    peaks, results = {}, []
    for name, loss in losses.items():
        given = inputs(match, 0)
        peaks[name], result = peak_bytes(partial(step, loss, given), CPU)
        results.append(result)
        gc.collect()
    for ours, theirs in zip(*results, strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error <= 1e-3:
            raise AssertionError(f"{match.package} {match.loss}: the results differ by {error:.1e}")
    times: dict[str, list[float]] = {name: [] for name in losses}
    for seed in range(match.rounds):
        for name, loss in losses.items():
            given = inputs(match, seed + 1)
            start = time.perf_counter()
            step(loss, given)
            times[name].append(1e3 * (time.perf_counter() - start))
    about = {k: v for k, v in record.provenance(CPU).items() if k in FIELDS}
    return [
        {
            **about, "library": match.package, "loss": match.loss, "call": match.call, "contestant": name,
            "median_ms": f"{np.median(t):.4g}", "p20_ms": f"{np.percentile(t, 20):.4g}",
            "p80_ms": f"{np.percentile(t, 80):.4g}", "peak_extra_mib": f"{peaks[name] / 2**20:.1f}",
        }
        for name, t in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", help="append the results to this CSV file, absolute or relative to benchmarks/")
    parser.add_argument("--only", default="", help="a library")
    options = parser.parse_args()
    for match in MATCHES:
        if options.only not in match.package:
            continue
        try:
            results = play(match)
        except ImportError as why:
            print(f"{match.package} is left out: {why}")
            continue
        for row in results:
            print(*(f"{row[name]!s:>24}" for name in ("loss", "call", "contestant", "median_ms", "peak_extra_mib")))
        if options.record:
            record.append(options.record, results, FIELDS)


if __name__ == "__main__":
    main()
