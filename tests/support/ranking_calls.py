"""Calls of multiple negatives ranking, and dense code that holds every score of every direction."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

N, D = 4, 5
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
JOINT = [("query_to_doc", *some) for k in range(4) for some in itertools.combinations(OTHERS, k)]
SOFTMAXES = [("joint", directions) for directions in JOINT]
SOFTMAXES += [("per_direction", ("query_to_doc",)), ("per_direction", ("query_to_doc", "doc_to_query"))]
KINDS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


def call(n=N, hard=1, spare=0, d=D, dtype=torch.float64, device="cpu", grad=True):
    """[queries, positives, hard negatives...] of n samples and `spare` before and after them; a sample's are alike."""
    every = torch.randn(n + 2 * spare, d, dtype=torch.float64)
    tensors = [every, *(k * every + torch.randn(every.shape, dtype=torch.float64) for k in (2, *[1] * hard))]
    return [x.to(device, dtype).requires_grad_(grad) for x in tensors]


def dense(
    query, documents, temperature=0.05, *, directions=("query_to_doc",), partition="joint", hardness=None,
    hardness_strength=0.0, offset=0, all_queries=None, normalize=True, reduction="mean",
):  # fmt: skip
    every = query if all_queries is None else all_queries
    n, m = len(query), len(documents[0])
    if normalize:
        query, every, *documents = (F.normalize(x, dim=1) for x in (query, every, *documents))
    t = temperature.reshape(-1, 1) if isinstance(temperature, torch.Tensor) else temperature
    mine = documents[0][offset : offset + n]
    column = torch.arange(m, device=query.device).repeat(len(documents))
    own = column == torch.arange(offset, offset + n, device=query.device)[:, None]
    hard = (torch.arange(len(column), device=query.device) >= m).expand_as(own)
    cosine = query @ torch.cat(documents).T
    penalised = torch.zeros_like(own)
    if hardness in ("in_batch_negatives", "all_negatives"):
        penalised |= ~own
    if hardness in ("hard_negatives", "all_negatives"):
        penalised |= own & hard
    scores = {"query_to_doc": cosine / t + hardness_strength * cosine.detach() * penalised}
    scores["query_to_query"] = (query @ every.T / t).masked_fill(own[:, :m], -torch.inf)
    scores["doc_to_query"] = mine @ every.T / t
    scores["doc_to_doc"] = (mine @ torch.cat(documents).T / t).masked_fill(own, -torch.inf)
    pos = scores["query_to_doc"][own & ~hard]
    chosen = [scores[direction] for direction in directions]
    if partition == "joint":
        rows = torch.logsumexp(torch.cat(chosen, dim=1), dim=1) - pos
    else:
        rows = sum(torch.logsumexp(x, dim=1) for x in chosen) / len(chosen) - pos
    return {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]


def arguments(tensors, spare, options):
    """The tensors of `call`, and after them perhaps a temperature, as a function takes them."""
    query, *documents = tensors
    given = dict(options)
    if "temperature" not in options:
        *documents, given["temperature"] = documents
    if spare:
        given |= {"offset": spare, "all_queries": query}
    return {"query": query[spare : len(query) - spare], "documents": documents} | given


def run(function, tensors, spare, options):
    """[value, *gradients]"""
    value = function(**arguments(tensors, spare, options))
    upstream = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    grads = torch.autograd.grad(value, tensors, upstream, allow_unused=True)
    return [value, *(torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True))]
