"""Tile sizes of the Triton kernels: tuning on a GPU, and the time of the host that launches them."""
