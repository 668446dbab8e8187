"""Entry point of `python -m examples.retrieval`; see `--help`."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from .settings import parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the options name and returns the exit status: 1 where `--strict` found a claim not shown, else 0."""
    settings = parse_arguments(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows each line as it comes
    # Worker processes import this module and need no torch, so it is imported here.
    if settings.questions:
        from .answers import run
    else:
        from .show import run
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
