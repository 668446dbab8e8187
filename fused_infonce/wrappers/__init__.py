"""Losses that take another loss as an argument."""
