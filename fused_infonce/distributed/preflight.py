"""What ranks tell each other before the tensors of a call travel: every rank goes on, or every rank raises."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from .communicator import Communicator

OK, FAILED = 0, 1
SIZES = 5  # numbers of rows that a message holds: eight words of 8 bytes, with the call's number, status and signature
TEXT = 2048  # bytes of what is said about a call that cannot go on


def agree(communicator: Communicator, number: int, signature: str, sizes: Sequence[int]) -> list[list[int]]:
    """Return the sizes of all ranks, in rank order, once each has come to the same call with the same signature.

    number: how many calls this rank has made before. signature: all that must be the same on every rank.

    Raises:
        RuntimeError: another rank raised an error before it came here, which is named. ValueError: the ranks differ,
        and this one or another from the first; all are named.
    """
    if len(sizes) > SIZES:
        raise ValueError(f"a call sends at most {SIZES} sizes, got {len(sizes)}")
    digest = int.from_bytes(hashlib.blake2b(signature.encode(), digest_size=7).digest(), "big")
    said = _gathered(communicator, [number, OK, digest, *sizes, *[0] * (SIZES - len(sizes))])
    if any(words[1] == FAILED for words in said):
        _raise_for_others(communicator, _texts(communicator, ""))
    if any(words[0] != number or words[2] != digest for words in said):
        raise _difference(_texts(communicator, f"call {number} of this process: {signature}"))
    return [words[3 : 3 + len(sizes)] for words in said]


def compare(communicator: Communicator, number: int, text: str) -> None:
    """Raise a ValueError where a rank says another text of the call of this number than the first does."""
    texts = _texts(communicator, f"call {number} of this process: {text}")
    if any(other != texts[0] for other in texts):
        raise _difference(texts)


def _difference(texts: Sequence[str]) -> ValueError:
    """Return the error of ranks that say other things of a call than the first, which are named."""
    first, *others = texts
    different = [f"rank {rank}: {text}" for rank, text in enumerate(others, 1) if text != first]
    return ValueError("the ranks' calls differ. rank 0: " + "; ".join([first, *different]))


def report(communicator: Communicator, number: int, error: BaseException) -> None:
    """Tell the other ranks, which wait in `agree`, that this one raised an error and will not come."""
    said = _gathered(communicator, [number, FAILED, 0, *[0] * SIZES])
    assert said[communicator.rank][1] == FAILED
    _texts(communicator, f"{type(error).__name__}: {error}")


def _raise_for_others(communicator: Communicator, texts: Sequence[str]) -> None:
    guilty = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
    raise RuntimeError(guilty)


def _gathered(communicator: Communicator, words: Sequence[int]) -> list[list[int]]:
    found = communicator.all_gather_host(torch.tensor(words, dtype=torch.int64).view(torch.uint8))
    numbers: list[list[int]] = found.contiguous().view(torch.int64).tolist()
    return numbers


def _texts(communicator: Communicator, text: str) -> list[str]:
    """Return what every rank says, cut at `TEXT` bytes."""
    encoded = text.encode()[:TEXT]
    padded = torch.zeros(TEXT, dtype=torch.uint8)
    if encoded:
        padded[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    found = communicator.all_gather_host(padded)
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in found]
