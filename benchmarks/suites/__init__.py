"""Benchmarks that run from end to end, each a command or a file for pytest."""
