"""`python -m examples.retrieval`; see `--help`."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from .settings import parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where everything the demo claims was shown, else 1."""
    settings = parse_arguments(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows each line as it comes
    # Only now: worker processes import this module, and need no torch.
    if settings.temperatures is None:
        from .show import run
    else:
        from .temperature import run
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
