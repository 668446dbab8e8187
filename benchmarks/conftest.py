"""Options of pytest for the microbenchmarks."""

import pytest
from support.broken_context import pytest_runtest_call, pytest_runtest_protocol  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --record and --at-leisure."""
    parser.addoption("--record", help="append the results to this CSV file, absolute or relative to benchmarks/")
    parser.addoption("--at-leisure", action="store_true", help="5 rounds for the large cases too, and no time limit")
