"""Helpers that the tests share: inputs, comparisons, memory, processes, libraries, compilation ahead of time."""
