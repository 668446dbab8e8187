"""The whole demo: mine, train, evaluate, compare with the reference and the dense loss, answer questions, report."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial

from . import saved
from .answers import as_report, evenly, held_out_answers, known_answers, print_known
from .cost import WORTH_IT, Cost, disturbed, faster_from, measure_costs, step_savings, with_other_load
from .evaluate import FORMS, Scores, encoder_scores, tfidf_scores
from .picture import draw_demo
from .report import FORM_TITLES, Claim, environment, print_claims, print_table, write_json
from .saved import Retriever
from .settings import Settings
from .train import Training, TrainingData, new_encoder, prepare, train, training_options

CHECKED_STEPS = 20
REFERENCE_STEPS = 20  # enough to see that the curves are one; the rest would only take its time
CURVE_TOLERANCE = 1e-4
WANTED_GAIN = 1.5


def run(settings: Settings) -> int:
    """Runs and reports the whole demo, saves its model, and returns the exit status."""
    started = time.perf_counter()
    options = training_options(settings)
    pairs, split = prepare(settings)
    data = TrainingData.of(split.train)
    batch = min(options.batch, len(data))

    trained, training_load = with_other_load(partial(train, data, options, label="fused loss"))
    reference = train(data, options, backend="reference", max_steps=REFERENCE_STEPS, label="reference loss")
    step, reference_step = (1e3 * one.seconds / max(1, len(one.losses)) for one in (trained, reference))
    print(f"Trained {len(trained.losses)} steps of {batch} pairs in {trained.seconds:.0f} s with the fused loss, and")
    print(f"{len(reference.losses)} of the same steps with the dense reference.")
    retriever = Retriever.of(trained.encoder, pairs, split, options.device)
    model = saved.save(settings, retriever)

    tfidf = tfidf_scores(split.train, split.held_out)
    # The best on the held-out pairs themselves, for each form: a choice that favours TF-IDF.
    best = {form: max(tfidf, key=lambda setting: tfidf[setting][form].recall_at_1) for form in FORMS}
    scores = {
        "untrained": encoder_scores(new_encoder(options).eval(), split.held_out, options.device),
        "TF-IDF": {form: tfidf[best[form]][form] for form in FORMS},
        "trained": encoder_scores(trained.encoder, split.held_out, options.device),
    }
    costs = measure_costs(list(settings.cost_batches), options.dim, options.temperature, options.device)
    load = disturbed([training_load, *(cost.others for cost in costs)])
    savings = None if load else step_savings(costs, batch, step)
    claims = [*retrieval_claims(scores), curve_claim(trained, reference)]
    known = known_answers(retriever)
    of_held_out = held_out_answers(retriever, split)
    shown_held_out = held_out_answers(retriever, evenly(split))

    seconds = time.perf_counter() - started
    report = {
        **environment(options.device),
        "seed": settings.seed,
        "seconds": seconds,
        "training": {
            "pairs": len(split.train), "held_out": len(split.held_out), "epochs": options.epochs, "batch": batch,
            "dim": options.dim, "temperature": options.temperature, "seconds": trained.seconds,
            "step_milliseconds": step, "reference_step_milliseconds": reference_step,
        },
        "retrieval": {name: {form: asdict(of_form) for form, of_form in by.items()} for name, by in scores.items()},
        "tfidf_best": best,
        "tfidf_settings": {name: {form: asdict(of_form) for form, of_form in by.items()} for name, by in tfidf.items()},
        "loss": {"fused": trained.losses, "reference": reference.losses},
        "cost": [asdict(cost) for cost in costs],
        "other_load": load,
        "faster_from": None if load else faster_from(costs),
        "step_savings": savings,
        "claims": [asdict(claim) for claim in claims],
        "answers": {
            "held_out_ranks": [one.rank for one in of_held_out],
            "held_out": as_report(shown_held_out),
            "known": as_report(known),
        },
    }  # fmt: skip
    write_json(settings.output / "report.json", report)
    draw_demo(settings.output / "demo.png", report)
    print_retrieval(scores)
    print_costs(costs)
    print_gain(costs, load, batch, (step, reference_step), savings)
    print_known(known, shown_held_out, of_held_out, len(pairs))
    status = print_claims(claims, settings.strict)
    output = settings.output
    print(f"\nPicture, figures and model: {output}/demo.png, {output}/report.json, {model} ({seconds:.0f} s in all)")
    print(f"Ask it something, answered from the model in seconds: {settings.next_command}")
    return status


def retrieval_claims(scores: dict[str, dict[str, Scores]]) -> list[Claim]:
    """Claims on R@1. The gain is claimed where no word of the name helps: with them, matching words goes a long way."""
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
    """The claim that training follows one curve with either loss."""
    steps = min(CHECKED_STEPS, len(reference.losses))
    pairs = zip(trained.losses[:steps], reference.losses[:steps], strict=True)
    apart = max((abs(a - b) for a, b in pairs), default=0.0)
    return Claim(
        f"fused and reference loss agree to {CURVE_TOLERANCE:g} over {steps} steps",
        steps > 0 and apart <= CURVE_TOLERANCE,
        f"largest difference {apart:.1e}",
    )


def print_retrieval(scores: dict[str, dict[str, Scores]]) -> None:
    """Prints R@1 and MRR@10 of the trained encoder, the untrained one and TF-IDF."""
    rows = [
        [name if name != "TF-IDF" else "TF-IDF, best setting"]
        + [f"{value:.3f}" for form in FORMS for value in (by[form].recall_at_1, by[form].mrr_at_10)]
        for name, by in scores.items()
    ]
    print(f"\nHeld-out docstrings that find their own object; (a) {FORM_TITLES['strict']}, (b) {FORM_TITLES['plain']}:")
    print_table(["", "R@1 (a)", "MRR@10 (a)", "R@1 (b)", "MRR@10 (b)"], rows)


def print_costs(costs: list[Cost]) -> None:
    """Prints time and memory of the loss alone, the spread of the rounds beside every median."""
    if not costs:
        return
    rows = []
    for fused, dense in zip(costs[::2], costs[1::2], strict=True):
        times = [cell for cost in (fused, dense) for cell in (f"{cost.milliseconds:.1f}", _spread(cost.spread, 1))]
        peaks = ["-" if cost.peak_mib is None else f"{cost.peak_mib:.0f}" for cost in (fused, dense)]
        speedup = [f"{fused.speedup:.2f}", _spread(fused.speedup_spread, 2)]
        others = "-" if fused.others is None else f"{fused.others:.0%}"
        rows.append([str(fused.batch), *times, *speedup, *peaks, str(fused.rounds), others])
    print("\nForward and backward of the loss alone, in turn; medians, and the middle half of the rounds beside them:")
    print_table(
        [
            "batch",
            "fused ms",
            "",
            "dense ms",
            "",
            "dense / fused",
            "",
            "fused MiB",
            "dense MiB",
            "rounds",
            "other load",
        ],
        rows,
    )


def print_gain(
    costs: list[Cost], load: float | None, batch: int, steps: tuple[float, float], savings: dict[int, float] | None
) -> None:
    """Says from which batch the fused loss is faster by itself, and from which a training is shorter for it.

    `steps` are the milliseconds of a training step with the fused loss and with the reference.
    """
    if not costs:
        return
    if load is not None:
        print(f"Other programs used up to {load:.0%} of the processor meanwhile: the times above decide nothing, the")
        print("memory does. Run it again on an idle machine to see which loss is faster.")
        return
    largest = max(cost.batch for cost in costs)
    alone = faster_from(costs)
    print(
        f"The fused loss alone is faster from batch {alone} on."
        if alone is not None
        else f"The fused loss alone is not faster beyond the spread, up to batch {largest}."
    )
    if savings is None:
        return
    share = next(cost for cost in costs if cost.batch == batch).milliseconds / steps[0]
    print(
        f"A training step at batch {batch} took {steps[0]:.0f} ms, {share:.1%} of it the loss; with the dense reference"
    )
    print(f"it took {steps[1]:.0f} ms. Estimated, as if all but the loss grew with the batch,")
    shares = ", ".join(f"{saved:.1%} at {size}" for size, saved in savings.items())
    print(f"the fused loss shortens a step by {shares}.")
    paying = [size for size in savings if all(savings[other] >= WORTH_IT for other in savings if other >= size)]
    if paying:
        print(f"So in this small model it pays in training time ({WORTH_IT:.0%} or more) from batch {paying[0]} on.")
    else:
        print(f"So it does not pay in training time up to batch {largest}; the table says what it saves in memory.")


def _spread(spread: tuple[float, float], digits: int) -> str:
    return f"{spread[0]:.{digits}f}-{spread[1]:.{digits}f}"
