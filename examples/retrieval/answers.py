"""Questions to the trained retriever: the user's own, and some whose right answer is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from . import saved
from .saved import Retriever
from .settings import Settings
from .split import Split
from .train import TrainingData, prepare, train, training_options

ANSWERS = 3
HELD_OUT_SHOWN = 10
# Questions in our own words, and which objects answer them. They were written before the answers were seen, and all are
# shown, whether answered or not.
KNOWN = (
    ("list the most common elements and their counts", ("collections.Counter.most_common",)),
    ("lower the learning rate when the metric stops improving", ("torch.optim.lr_scheduler.ReduceLROnPlateau",)),
    ("solve a system of linear equations", ("numpy.linalg.*.solve", "torch.linalg.solve")),
    ("randomly zero some elements of the input with probability p", ("torch.nn.*.Dropout", "torch.nn.*.dropout")),
    ("compress bytes with gzip", ("gzip.compress",)),
    ("shuffle a list in place", ("random.*.shuffle",)),
    ("join two paths", ("posixpath.join", "ntpath.join")),
    ("copy a directory tree", ("shutil.copytree",)),
    ("escape html characters", ("html.escape",)),
    ("send an email through a server", ("smtplib.SMTP.sendmail", "smtplib.SMTP.send_message")),
)


@dataclass(frozen=True)
class Answer:
    """One object found for a question."""

    signature: str
    summary: str
    similarity: float
    held_out: bool


@dataclass(frozen=True)
class Known:
    """A question whose right answer is known: at which rank it was found, and what was found first instead."""

    question: str
    right: str
    right_held_out: bool
    rank: int
    first: str


def run(settings: Settings) -> int:
    """Answers the user's questions, from the saved model where it fits the settings."""
    started = time.perf_counter()
    options = training_options(settings)
    retriever = saved.load(settings, options.device)
    if retriever is None:
        pairs, split = prepare(settings)
        trained = train(TrainingData.of(split.train), options, label="fused loss")
        retriever = Retriever.of(trained.encoder, pairs, split, options.device)
        saved.save(settings, retriever)
    print_answers(ask(retriever, settings.questions))
    print(f"\n({time.perf_counter() - started:.0f} s in all)")
    return 0


def ask(retriever: Retriever, questions: Sequence[str]) -> dict[str, list[Answer]]:
    """For each question, the objects whose key is nearest to it."""
    nearest = retriever.similarities(questions).topk(min(ANSWERS, len(retriever.pairs)))
    answers = {}
    for question, similarities, indices in zip(
        questions, nearest.values.tolist(), nearest.indices.tolist(), strict=True
    ):
        found = [(retriever.pairs[index], similarity) for index, similarity in zip(indices, similarities, strict=True)]
        answers[question] = [
            Answer(pair.signature, pair.summary, similarity, pair.signature in retriever.held_out)
            for pair, similarity in found
        ]
    return answers


def known_answers(retriever: Retriever) -> list[Known]:
    """Our own questions with the rank of the best right answer, the best first; none where nothing right was mined."""
    asked = []
    for question, patterns in KNOWN:
        right = [
            index
            for index, pair in enumerate(retriever.pairs)
            if any(fnmatchcase(pair.qualified_name, pattern) for pattern in patterns)
        ]
        if right:
            asked.append((question, right))
    return _ranked(retriever, asked)


def held_out_answers(retriever: Retriever, split: Split) -> list[Known]:
    """Held-out docstrings, their names removed, asked of all objects, the best found first."""
    index_of = {pair.signature: index for index, pair in enumerate(retriever.pairs)}
    return _ranked(retriever, [(pair.text, [index_of[pair.signature]]) for pair in split.held_out])


def evenly(split: Split) -> Split:
    """Every n-th held-out pair: a sample that knows nothing of how well each was answered."""
    return Split(split.train, split.held_out[:: max(1, len(split.held_out) // HELD_OUT_SHOWN)][:HELD_OUT_SHOWN])


def _ranked(retriever: Retriever, asked: list[tuple[str, list[int]]]) -> list[Known]:
    found = []
    similarities = retriever.similarities([question for question, _ in asked]) if asked else torch.empty(0, 0)
    for (question, right), similarity in zip(asked, similarities, strict=True):
        best = max(right, key=lambda index: float(similarity[index]))
        # A tie with a wrong object counts as a miss; another right one is none.
        rivals = similarity.clone()
        rivals[right] = -torch.inf
        pair, first = retriever.pairs[best], retriever.pairs[int(similarity.argmax())]
        rank = 1 + int((rivals >= similarity[best]).sum())
        found.append(Known(question, pair.signature, pair.signature in retriever.held_out, rank, first.signature))
    return sorted(found, key=lambda one: one.rank)


def print_known(known: list[Known], held_out: list[Known], of_held_out: list[Known], objects: int) -> None:
    """Prints the shown held-out questions and our own, right and wrong answers alike."""
    shares = [sum(one.rank <= rank for one in of_held_out) / max(1, len(of_held_out)) for rank in (1, 10)]
    asked = len(of_held_out)
    print(f"\nAnswers from paths, names and arguments alone, among all {objects} objects (the scores above: {asked}).")
    print(f"Of the {asked} held-out docstrings, their names removed, {shares[0]:.0%} find their own object first and")
    print(f"{shares[1]:.0%} among the first ten. Evenly spaced ones, whatever came out, best rank first:")
    _print_ranked(held_out)
    if known:
        right = sum(one.rank == 1 for one in known)
        print(f"\nQuestions in our own words, {right} of {len(known)} answered right first; best rank first:")
        _print_ranked(known)


def _print_ranked(known: list[Known]) -> None:
    for one in known:
        print(f"\n  {'right' if one.rank == 1 else 'wrong'}  {_shortened(one.question.rstrip('.'))}")
        print(f"         found            {_shortened(one.first, 90)}")
        if one.rank > 1:
            print(f"         right, rank {one.rank:<5}{_shortened(one.right, 90)}")


def print_answers(answers: dict[str, list[Answer]]) -> None:
    """Prints the nearest objects of each question with their cosines."""
    print("\nAnswers from paths, names and arguments alone; * was held out from training:")
    for question, found in answers.items():
        print(f"\n  {question}?")
        for one in found:
            mark = "*" if one.held_out else " "
            print(f"    {one.similarity:.2f} {mark} {_shortened(one.signature)}\n           {_shortened(one.summary)}")


def as_report(known: list[Known]) -> list[dict[str, Any]]:
    """The same as plain values, for the report."""
    return [asdict(one) for one in known]


def _shortened(text: str, width: int = 100) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."
