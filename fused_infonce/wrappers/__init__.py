"""Losses that take a loss as an argument."""
