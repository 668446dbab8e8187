"""Words and documented objects that the tests of the demo share."""

from __future__ import annotations

from examples.retrieval import mining

WORDS = """
matrix vector tensor row column diagonal inverse rank trace norm solve factor product shape stride offset scalar
socket server client packet header request reply timeout address port session cookie proxy tunnel handshake frame
thread process queue lock event signal worker task future barrier pool pipe schedule priority latch channel
"""
TOPICS = WORDS.split()


def make(name: str, docstring: str) -> mining.Pair:
    pair = mining.make_pair(name, (), docstring)
    assert pair is not None
    return pair
