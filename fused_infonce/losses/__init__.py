"""The losses: one file each, named after it, with its function and its module."""
