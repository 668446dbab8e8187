"""The work of each process of test_flag_embedding_distributed; it is run by its path, so that imports are absolute."""

import contextlib
import random
import warnings
from unittest import mock

import pytest
import torch

from support.flag_models import ORIGINALS, features, gradient, make, table
from support.processes import WORLD


def configuration(seed):
    """Return a random call, whose options are the same in all processes."""
    draw = random.Random(seed)
    kind = list(ORIGINALS)[seed % len(ORIGINALS)]
    n, g, d = draw.randint(1, 8), draw.randint(1, 4), draw.randint(3, 24)
    options = {
        "temperature": draw.choice([1, 0.1, 0.05, 0.02]),
        "normalize_embeddings": True,
        "kd_loss_type": draw.choice(["kl_div", "m3_kd_loss"]),
        "negatives_cross_device": True,
    }
    if kind != "m3" and draw.random() < 0.3:
        options |= {"use_mrl": True, "mrl_dims": [d, (d + 1) // 2]}
    dtype, autocast = draw.choice(
        [(torch.float32, None)] * 4 + [(torch.float64, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)]
    )
    return kind, (n, g), d, options, draw.random() < 0.6, dtype, autocast


def run(which, kind, weight, shape, options, teacher, autocast):
    """Return the loss and the gradient of this process, and the shapes of what it gathered."""
    n, g = shape
    model = make(kind, weight, which, **options)
    gathered = mock.Mock(side_effect=model._dist_gather_tensor)
    with (
        mock.patch.object(model, "_dist_gather_tensor", gathered),
        torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext(),
    ):
        loss = model(features(0, n), features(n, n * g), teacher).loss
    loss.backward()
    return loss.detach(), gradient(model), [tuple(call.args[0].shape) for call in gathered.call_args_list]


def compare(rank, seed):
    kind, (n, g), d, options, taught, dtype, autocast = configuration(seed)
    torch.manual_seed(100 * seed + rank)
    weight = table(n, n * g, d).to(dtype)
    teacher = torch.randn(n * g).tolist() if taught else None
    call = (kind, weight, (n, g), options, teacher, autocast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = run("fused", *call)
    theirs, exact = run("plain", *call), run("exact", *call)
    assert ours[2] == theirs[2]  # the same collectives in the same order
    assert len(ours[2]) >= 2
    narrow = dtype == torch.bfloat16 or autocast
    bound = 1e-2 if narrow else 1e-10 if dtype == torch.float64 else 1e-5 * max(1, 0.05 / options["temperature"])
    for a, b, true in zip(ours[:2], theirs[:2], exact[:2], strict=True):
        assert a.dtype == b.dtype
        a, b, true = a.double(), b.double(), true.double()
        allowed = bound * true.norm() + 2 * (b - true).norm() + 1e-12
        assert (a - b).norm() <= allowed, configuration(seed)
        assert (a - true).norm() <= allowed, configuration(seed)


def compare_with_one_process(rank):
    """Assert that without a teacher every process has the loss of all batches in one."""
    n, g, d = 5, 3, 8
    torch.manual_seed(0)
    weights = [table(n, n * g, d) for _ in range(WORLD)]
    options = {"temperature": 0.1, "normalize_embeddings": True}
    model = make("encoder", weights[rank], "fused", **options, negatives_cross_device=True)
    got = model(features(0, n), features(n, n * g)).loss
    whole = make("encoder", torch.cat(weights), "plain", **options)
    size = n * (g + 1)
    queries, passages = (
        {name: torch.cat([features(first + r * size, rows)[name] for r in range(WORLD)]) for name in features(0, 1)}
        for first, rows in ((0, n), (n, n * g))
    )
    torch.testing.assert_close(got, whole(queries, passages).loss, rtol=1e-12, atol=0)


def exact(rank):
    """Assert that with `distributed` a loss and its gradients are those of all batches in one, with a teacher too."""
    n, g, d = 5, 3, 8
    for kind in (None, "kl_div", "m3_kd_loss"):
        torch.manual_seed(0)
        weights = [table(n, n * g, d) for _ in range(WORLD)]
        teachers = [None if kind is None else torch.randn(n * g).tolist() for _ in range(WORLD)]
        options = {"temperature": 0.1, "normalize_embeddings": True, "kd_loss_type": kind or "kl_div"}
        model = make("encoder", weights[rank], "fused", **options, negatives_cross_device=True)
        model.distributed = True
        value = model(features(0, n), features(n, n * g), teachers[rank]).loss
        value.backward()
        whole = make("encoder", torch.cat(weights), "plain", **options)
        size = n * (g + 1)
        queries, passages = (
            {name: torch.cat([features(first + r * size, rows)[name] for r in range(WORLD)]) for name in features(0, 1)}
            for first, rows in ((0, n), (n, n * g))
        )
        want = whole(queries, passages, None if kind is None else [*teachers[0], *teachers[1]]).loss
        want.backward()
        torch.testing.assert_close(value, want, rtol=1e-6, atol=0)
        own = gradient(whole).chunk(WORLD)[rank]
        torch.testing.assert_close(gradient(model) / WORLD, own, rtol=1e-5, atol=1e-8)
    model.temperature = -1.0 if rank else 0.1
    with pytest.raises(ValueError if rank else RuntimeError, match=r"the temperature -1.0 is not a positive number"):
        model(features(0, n), features(n, n * g))


def in_one_of_two_processes(rank):
    for seed in range(60):
        compare(rank, seed)
    compare_with_one_process(rank)
    exact(rank)
