"""The demo proper: mine, train, evaluate, compare with the reference and the dense loss, report, answer questions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .cost import measure_costs
from .evaluate import FORMS, Scores, encoder_scores, tfidf_scores
from .mining import Pair, mine
from .model import Encoder, embed, hashed_features
from .report import Claim, draw_demo, environment, print_claims, print_table, write_json
from .settings import Settings
from .split import Split, drop_repeats, split_pairs
from .text import words
from .train import Training, TrainingData, TrainingOptions, new_encoder, train

CHECKED_STEPS = 20
CURVE_TOLERANCE = 1e-4
WANTED_GAIN = 1.5
ANSWERS = 3
FORM_TITLES = {"strict": "every word of the name removed", "plain": "the name removed"}


@dataclass(frozen=True)
class Answer:
    signature: str
    summary: str
    similarity: float
    held_out: bool


def choose_device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def training_options(settings: Settings) -> TrainingOptions:
    return TrainingOptions(
        dim=settings.dim,
        batch=settings.batch,
        epochs=settings.epochs,
        temperature=settings.temperature,
        seed=settings.seed,
        device=choose_device(settings.device),
    )


def prepare(settings: Settings) -> tuple[list[Pair], Split]:
    """All mined pairs and their split, with a line or two on both."""
    print("Parsing the sources of", settings.source or "torch, numpy and the standard library", "...")
    started = time.perf_counter()
    pairs = drop_repeats(mine(settings.max_pairs, settings.source))
    split = split_pairs(pairs, settings.held_out, settings.seed)
    seconds = time.perf_counter() - started
    print(f"Mined {len(pairs)} pairs by parsing sources, in {seconds:.0f} s: {len(split.train)} to train on,")
    print(f"{len(split.held_out)} held out, nearly equal texts and equal names kept on one side. One of them:")
    print(f"  query  {split.held_out[0].query}\n  key    {split.held_out[0].key}\n")
    return pairs, split


def run(settings: Settings) -> int:
    started = time.perf_counter()
    options = training_options(settings)
    pairs, split = prepare(settings)
    data = TrainingData.of(split.train)

    trained = train(data, options, label="fused loss")
    reference = train(data, options, backend="reference", label="reference loss")
    print(f"Trained {len(trained.losses)} steps of {min(options.batch, len(data))} pairs in {trained.seconds:.0f} s")

    tfidf = tfidf_scores(split.train, split.held_out)
    # The best on the held-out pairs themselves, for each form: a choice that favours TF-IDF.
    best = {form: max(tfidf, key=lambda setting: tfidf[setting][form].recall_at_1) for form in FORMS}
    scores = {
        "untrained": encoder_scores(new_encoder(options).eval(), split.held_out, options.device),
        "TF-IDF": {form: tfidf[best[form]][form] for form in FORMS},
        "trained": encoder_scores(trained.encoder, split.held_out, options.device),
    }
    costs = measure_costs(list(settings.cost_batches), options.dim, options.temperature, options.device)
    claims = [*retrieval_claims(scores), curve_claim(trained, reference)]
    answers = ask(settings.questions, trained.encoder, pairs, split, options.device)

    seconds = time.perf_counter() - started
    report = {
        **environment(options.device),
        "seed": settings.seed,
        "seconds": seconds,
        "training": {
            "pairs": len(split.train), "held_out": len(split.held_out), "epochs": options.epochs,
            "batch": min(options.batch, len(data)), "dim": options.dim, "temperature": options.temperature,
            "seconds": trained.seconds, "reference_seconds": reference.seconds,
        },
        "retrieval": {name: {form: asdict(of_form) for form, of_form in by.items()} for name, by in scores.items()},
        "tfidf_best": best,
        "tfidf_settings": {name: {form: asdict(of_form) for form, of_form in by.items()} for name, by in tfidf.items()},
        "loss": {"fused": trained.losses, "reference": reference.losses},
        "cost": [asdict(cost) for cost in costs],
        "claims": [asdict(claim) for claim in claims],
        "answers": {question: [asdict(found) for found in of_question] for question, of_question in answers.items()},
    }  # fmt: skip
    write_json(settings.output / "report.json", report)
    draw_demo(settings.output / "demo.png", report)
    print_retrieval(scores)
    print_costs(report)
    shown = print_claims(claims)
    print_answers(answers)
    print(f"\nPicture and figures: {settings.output}/demo.png, {settings.output}/report.json ({seconds:.0f} s in all)")
    return 0 if shown else 1


def retrieval_claims(scores: dict[str, dict[str, Scores]]) -> list[Claim]:
    """The gain is claimed where no word of the name helps; with them left in, matching words alone goes a long way."""
    recalls = {name: {form: by[form].recall_at_1 for form in FORMS} for name, by in scores.items()}
    trained, untrained = recalls["trained"]["strict"], recalls["untrained"]["strict"]
    gain = Claim(
        f"R@1 at least {WANTED_GAIN} x the untrained encoder's, {FORM_TITLES['strict']}",
        trained > 0 and trained >= WANTED_GAIN * untrained,
        f"{trained:.3f} and {untrained:.3f}, {trained / max(untrained, 1e-9):.2f} x",
    )
    above = [
        Claim(
            f"R@1 above TF-IDF's, {FORM_TITLES[form]}",
            recalls["trained"][form] > recalls["TF-IDF"][form],
            f"{recalls['trained'][form]:.3f} and {recalls['TF-IDF'][form]:.3f}",
        )
        for form in FORMS
    ]
    return [gain, *above]


def curve_claim(trained: Training, reference: Training) -> Claim:
    steps = min(CHECKED_STEPS, len(trained.losses))
    apart = max(abs(a - b) for a, b in zip(trained.losses[:steps], reference.losses[:steps], strict=True))
    return Claim(
        f"fused and reference loss agree to {CURVE_TOLERANCE:g} over {steps} steps",
        apart <= CURVE_TOLERANCE,
        f"largest difference {apart:.1e}",
    )


def ask(
    questions: Sequence[str], encoder: Encoder, pairs: list[Pair], split: Split, device: torch.device
) -> dict[str, list[Answer]]:
    """For each question, the mined objects whose key (path, name, arguments; not the docstring) is nearest to it."""
    keys = embed(encoder, hashed_features([pair.key for pair in pairs]), device)
    queries = embed(encoder, hashed_features([words(question) for question in questions]), device)
    nearest = (queries @ keys.T).topk(min(ANSWERS, len(pairs)))
    held_out = {pair.signature for pair in split.held_out}
    answers = {}
    for question, similarities, indices in zip(
        questions, nearest.values.tolist(), nearest.indices.tolist(), strict=True
    ):
        found = [(pairs[index], similarity) for index, similarity in zip(indices, similarities, strict=True)]
        answers[question] = [
            Answer(pair.signature, pair.summary, similarity, pair.signature in held_out) for pair, similarity in found
        ]
    return answers


def print_retrieval(scores: dict[str, dict[str, Scores]]) -> None:
    rows = [
        [name if name != "TF-IDF" else "TF-IDF, best setting"]
        + [f"{value:.3f}" for form in FORMS for value in (by[form].recall_at_1, by[form].mrr_at_10)]
        for name, by in scores.items()
    ]
    print(f"\nHeld-out docstrings that find their own object; (a) {FORM_TITLES['strict']}, (b) {FORM_TITLES['plain']}:")
    print_table(["", "R@1 (a)", "MRR@10 (a)", "R@1 (b)", "MRR@10 (b)"], rows)


def print_costs(report: dict[str, Any]) -> None:
    if not report["cost"]:
        return
    print("\nForward and backward of the loss alone:")
    rows = []
    for fused, dense in zip(report["cost"][::2], report["cost"][1::2], strict=True):
        peaks = ["-" if cost["peak_mib"] is None else f"{cost['peak_mib']:.0f}" for cost in (fused, dense)]
        rows.append([str(fused["batch"]), *(f"{cost['milliseconds']:.1f}" for cost in (fused, dense)), *peaks])
    print_table(["batch", "fused ms", "dense ms", "fused MiB", "dense MiB"], rows)


def print_answers(answers: dict[str, list[Answer]]) -> None:
    print("\nQuestions, answered from paths, names and arguments alone; * was held out from training:")
    for question, found in answers.items():
        print(f"\n  {question}?")
        for one in found:
            mark = "*" if one.held_out else " "
            print(f"    {one.similarity:.2f} {mark} {_shortened(one.signature)}\n           {_shortened(one.summary)}")


def _shortened(text: str, width: int = 100) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."
