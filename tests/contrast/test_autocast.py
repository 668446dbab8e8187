"""Under autocast: inputs may mix dtypes and are multiplied in its dtype; everything else stays float32."""

import pytest
import torch
from support.helpers import (
    DEVICE,
    both_backends,
    cases,
    embeddings,
    error,
    evaluate,
    info_nce,
    loss_scale,
    on,
    oracle,
    stretch,
)

HALVES = [torch.bfloat16, torch.float16]


def rounded(x, dtype):
    """x as it is multiplied: in `dtype`, each row scaled by a power of two where float16 needs it."""
    if dtype == torch.bfloat16 or x.dtype == dtype:
        return x.to(dtype).double()
    scale = torch.exp2(torch.frexp(x.double().abs().amax(-1, keepdim=True)).exponent.double())
    return (x.double() / scale).to(dtype).double() * scale


def assert_bounds(backend, inputs, dtype, **options):
    """The bounds of 16-bit inputs, and each gradient in its input's dtype."""
    exact = {name: rounded(x, dtype) if name != "temperature" else x for name, x in inputs.items()}
    want = oracle(exact, **options)
    half = [g for name, g in want[1].items() if inputs[name].dtype == torch.float16]
    scale = loss_scale(torch.float16, half) if half else 1.0
    device = DEVICE[backend]
    with torch.autocast(device, dtype):
        loss, gradients = evaluate(
            info_nce, on(device, inputs), torch.full(want[0].shape, scale), backend=backend, **options
        )
    assert loss.dtype == torch.float32
    assert error(loss, want[0]) <= 1e-5
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert error(gradient.double() / scale, want[1][name]) <= (1e-4 if name == "temperature" else 5e-3), name


@cases(
    dtype=HALVES,
    mixed=[(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    options=[{}, {"symmetric": True}, {"reduction": "none"}, {"normalize": False}, {"negatives": True}],
)
def test_inputs_of_mixed_dtypes_keep_the_bounds(backend, dtype, mixed, options):
    options = dict(options)
    query, key, negatives = embeddings("medium", 24, 16, 10)
    inputs = {"query": query.to(mixed[0]), "positive_key": key.to(mixed[1]), "temperature": torch.tensor(0.1)}
    if options.pop("negatives", False):
        inputs["negative_keys"] = negatives.to(mixed[0])
    assert_bounds(backend, inputs, dtype, **options)


@cases(dtype=HALVES, size=[1e6, 1e-6, 1e12], negatives=["unpaired", "paired"], normalize=[False, True])
def test_rows_beyond_the_range_of_float16_keep_the_bounds(backend, dtype, size, negatives, normalize):
    query, key, extra = embeddings("medium", 24, 16, *((24, 5) if negatives == "paired" else (9,)))
    inputs = {
        "query": stretch(query, size / 30, size),
        "positive_key": stretch(key, 0.5, 2),
        "negative_keys": extra * size,
    }
    inputs = {name: x.float() for name, x in inputs.items()}
    inputs["positive_key"] *= size
    inputs["temperature"] = torch.tensor(0.1 if normalize else size**2 / 10)
    options = {"normalize": normalize, "negative_mode": negatives, "in_batch_negatives": True}
    assert_bounds(backend, inputs, dtype, **options)


@both_backends
@pytest.mark.parametrize("dtype", HALVES)
def test_float64_stays_float64(backend, dtype):
    device = DEVICE[backend]
    query, key = (x.to(device) for x in embeddings("medium", 12, 8)[:2])
    want = info_nce(query, key, backend=backend)
    with torch.autocast(device, dtype):
        assert torch.equal(info_nce(query, key, backend=backend), want)
        with pytest.raises(TypeError, match="positive_key must be"):
            info_nce(query, key.float(), backend=backend)
    with pytest.raises(TypeError, match=r"positive_key must be torch.bfloat16.*got torch.float32"):
        info_nce(query.bfloat16(), key.float(), backend=backend)


@both_backends
def test_products_are_made_in_the_autocast_dtype(backend):
    """The same as casting the inputs by hand; and not what float32 inputs give without autocast."""
    device = DEVICE[backend]
    query, key = (x.float().to(device) for x in embeddings("medium", 24, 16)[:2])
    with torch.autocast(device, torch.bfloat16):
        got = info_nce(query, key, backend=backend)
    assert torch.equal(got, info_nce(query.bfloat16(), key.bfloat16(), backend=backend))
    assert not torch.equal(got, info_nce(query, key, backend=backend))


@both_backends
@pytest.mark.parametrize("dtype", HALVES)
def test_backward_outside_of_autocast_and_inside_agree(backend, dtype):
    device = DEVICE[backend]
    query, key = (x.float().to(device).requires_grad_() for x in embeddings("medium", 24, 16)[:2])
    for options in ({}, {"symmetric": True}):
        with torch.autocast(device, dtype):
            loss = info_nce(query, key, backend=backend, **options)
            inside = torch.autograd.grad(loss, (query, key), retain_graph=True)
        outside = torch.autograd.grad(loss, (query, key))
        assert all(torch.equal(x, y) for x, y in zip(inside, outside, strict=True))


@both_backends
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_float16_tower_trains_under_a_gradient_scaler(backend, symmetric):
    """A float16 tower under a real GradScaler: finite, and as accurate as float16 activations allow."""
    device = DEVICE[backend]
    x, key = (x.float().to(device) for x in embeddings("tight", 32, 16)[:2])
    tower = torch.nn.Linear(16, 16).to(device)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    with torch.autocast(device, torch.float16):
        out = tower(x)
        out.retain_grad()
        loss = info_nce(out, key, temperature=0.05, symmetric=symmetric, backend=backend)
    scaler.scale(loss).backward()
    assert out.grad.dtype == torch.float16
    exact = {"query": out.detach(), "positive_key": key.half(), "temperature": torch.tensor(0.05)}
    _, want = oracle(exact, symmetric=symmetric)
    assert error(out.grad.double() / 2**12, want["query"]) <= 5e-3
    scaler.unscale_(optimizer)
    assert all(p.grad.isfinite().all() for p in tower.parameters())
    before = tower.weight.clone()
    scaler.step(optimizer)
    assert not torch.equal(before, tower.weight)  # a step with infinite gradients would be skipped
