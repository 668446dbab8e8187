"""Triton kernels, installed as ``fused_infonce.kernels``.

This file imports nothing and sets nothing: with the repository root as working directory, other libraries'
``import kernels`` finds it in place of the unrelated PyPI package of that name.
"""
