"""Calls of multiple negatives ranking."""

from __future__ import annotations

import itertools

import torch

N, D = 4, 5
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
JOINT = [("query_to_doc", *some) for k in range(4) for some in itertools.combinations(OTHERS, k)]
SOFTMAXES = [("joint", directions) for directions in JOINT]
SOFTMAXES += [("per_direction", ("query_to_doc",)), ("per_direction", ("query_to_doc", "doc_to_query"))]
KINDS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


def call(n=N, hard=1, spare=0, d=D, dtype=torch.float64, device="cpu", grad=True):
    """Return queries, positives and hard negatives of n samples, with `spare` samples before and after them."""
    every = torch.randn(n + 2 * spare, d, dtype=torch.float64)
    tensors = [every, *(k * every + torch.randn(every.shape, dtype=torch.float64) for k in (2, *[1] * hard))]
    return [x.to(device, dtype).requires_grad_(grad) for x in tensors]


def arguments(tensors, spare, options):
    """Return the tensors of `call`, and the temperature that may follow them, as arguments by name."""
    query, *documents = tensors
    given = dict(options)
    if "temperature" not in options:
        *documents, given["temperature"] = documents
    if spare:
        given |= {"offset": spare, "all_queries": query}
    return {"query": query[spare : len(query) - spare], "documents": documents} | given


def run(function, tensors, spare, options):
    """Return the value and the gradients of a function of the tensors of `call`."""
    value = function(**arguments(tensors, spare, options))
    upstream = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    grads = torch.autograd.grad(value, tensors, upstream, allow_unused=True)
    return [value, *(torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True))]
