"""`fused_infonce.statistics`: values and gradients of each field against the matrix of logits in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.helpers import DEVICE, FACTORS, TRITON, bounds, cases, error, make_call, on, valid
from torch import Tensor

from fused_infonce import RowStatistics, Statistics, statistics

N, M, D, H = 6, 8, 5, 3
every_backend = pytest.mark.parametrize("backend", ["torch", "reference", TRITON])
OPTIONS = ("normalize", "temperature", "negatives", "in_batch", "symmetric", "target", "ids")
QUIET = {"rtol": 1e-11, "atol": 1e-11}


def named(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `info_nce` under the names that `statistics` has for them."""
    return {"key" if name == "positive_key" else name: x for name, x in inputs.items()}


def dense(
    query: Tensor, key: Tensor, negative_keys: Tensor | None = None, temperature: Any = 0.1, *, columns: bool = False,
    negative_mode: str = "unpaired", normalize: bool = True, in_batch_negatives: bool | None = None,
    target: Tensor | None = None, query_ids: Tensor | None = None, key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
) -> RowStatistics | Statistics:  # fmt: skip
    """Return statistics by one list of negatives a row: differentiable in pos and neg."""

    def unit(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=-1) if normalize else x

    n, q, k = len(query), unit(query), unit(key)
    t = torch.as_tensor(temperature, dtype=query.dtype).expand(n)
    y = torch.arange(n) if target is None else target
    if query_ids is None and key_ids is not None:
        query_ids = key_ids[y.clamp(0)]

    def differs(i: int, ids: Tensor | None) -> Tensor | bool:
        return True if ids is None or query_ids is None else ids != query_ids[i]

    def fields(pos: Tensor, s: Tensor) -> list[Tensor]:
        neg = torch.logsumexp(s, 0) if len(s) else s.sum() - math.inf
        p = (s - neg).exp()
        largest = s.amax() if len(s) else torch.full_like(pos, -math.inf)
        return [pos, neg, (p * s).sum(), largest, 1 / (s - largest).exp().sum() if len(s) else torch.zeros_like(pos)]

    def stacked(rows: list[list[Tensor]]) -> RowStatistics:
        return RowStatistics(*map(torch.stack, zip(*rows, strict=True)))

    rows, scores = [], q @ k.T / t[:, None]
    in_batch = negative_keys is None if in_batch_negatives is None else in_batch_negatives
    for i in range(n):
        parts = []
        if in_batch:
            parts.append(scores[i][torch.arange(len(k)).ne(y[i]) & differs(i, key_ids)])
        if negative_keys is not None:
            paired = negative_mode == "paired"
            extra = unit(negative_keys[i] if paired else negative_keys)
            ids = None if negative_ids is None else negative_ids[i] if paired else negative_ids
            parts.append((extra @ q[i] / t[i])[torch.ones(len(extra), dtype=torch.bool) & differs(i, ids)])
        rows.append(fields(scores[i, y[i]] if y[i] >= 0 else scores.new_zeros(()), torch.cat(parts)))
    if not columns:
        return stacked(rows)
    others = []
    for j in range(n):  # against the queries of other ids, at the temperature of row j
        kept = torch.arange(n).ne(j)
        if query_ids is not None and key_ids is not None:
            kept &= query_ids != key_ids[j]
        others.append(fields(scores[j, j], (q @ k[j] / t[j])[kept]))
    return Statistics(stacked(rows), stacked(others))


def directions(found: RowStatistics | Statistics) -> list[RowStatistics]:
    return [found] if isinstance(found, RowStatistics) else [x for x in found if x is not None]


def assert_same(found: RowStatistics | Statistics, want: RowStatistics | Statistics, **tolerance: float) -> None:
    assert type(found) is type(want)
    for ours, exact in zip(directions(found), directions(want), strict=True):
        for name, x, y in zip(RowStatistics._fields, ours, exact, strict=True):
            torch.testing.assert_close(
                x.cpu(), y, **(tolerance or QUIET), check_dtype=False, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


def valid_here(case: dict[str, Any]) -> bool:
    return valid(case | {"reduction": "none"})


@cases(valid_here, pairs=True, together=True, **{name: FACTORS[name] for name in OPTIONS})
def test_every_pair_of_options_gives_the_fields_of_dense_code(backend, case):
    inputs, options = make_call(N, M, D, H, **case, reduction="none")
    columns = options.pop("symmetric")
    del options["reduction"]
    want = dense(
        **named({k: x.clamp(-1) if k == "target" else x for k, x in inputs.items()}), columns=columns, **options
    )
    for name in (backend, "reference"):
        got = statistics(**named(on(DEVICE[backend], inputs)), columns=columns, **options, backend=name)
        assert_same(got, want)


def call(backend: str, columns: bool, t: Any = 0.3) -> tuple[list[Tensor], dict[str, Any]]:
    """Return query, key and temperature of a call with gradients, and its options: equal ids and negatives besides."""
    device = DEVICE.get(backend, "cpu")
    leaves = [torch.randn(N, D, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    more = {"negative_keys": torch.randn(H, D, dtype=torch.float64, device=device), "in_batch_negatives": True}
    more |= {"key_ids": torch.tensor([0, 1, 0, 2, 3, 4], device=device), "columns": columns, "backend": backend}
    temperature = torch.as_tensor(t, dtype=torch.float64, device=device).clone().requires_grad_()
    return [*leaves, temperature], more


@every_backend
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("t", [0.3, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]], ids=["shared", "per row"])
def test_pos_and_neg_have_the_gradients_of_finite_differences(backend, columns, t):
    leaves, options = call(backend, columns, t)

    def differentiable(query: Tensor, key: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        found = directions(statistics(query, key, temperature=temperature, **options))
        return tuple(x for rows in found for x in (rows.pos, rows.neg))

    slow = columns or backend == "triton"  # where every component in turn takes half a minute
    assert torch.autograd.gradcheck(differentiable, leaves, fast_mode=slow)


@every_backend
def test_the_other_fields_have_no_gradient(backend):
    leaves, options = call(backend, columns=True)
    for rows in directions(statistics(*leaves[:2], temperature=leaves[2], **options)):
        assert [x.requires_grad for x in rows] == [True, True, False, False, False]


@every_backend
@pytest.mark.parametrize("columns", [False, True])
def test_gradients_change_no_value(backend, columns):
    """A forward without gradients computes every field all the same."""
    leaves, options = call(backend, columns)
    found = statistics(*leaves[:2], temperature=leaves[2], **options)
    with torch.no_grad():
        plain = statistics(*leaves[:2], temperature=leaves[2], **options)
    assert_same(plain, found)


@every_backend
@pytest.mark.parametrize("t", [1.0, 0.05, 0.002, "tensor"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_maximum_is_the_largest_logit(backend, t, normalize, gradients):
    """Also where every exponential is known to fit, and no maximum is needed to add them."""
    device = DEVICE.get(backend, "cpu")
    query, key = (torch.randn(40, 16, device=device, requires_grad=gradients) for _ in range(2))
    given = torch.tensor(0.05, device=device) if t == "tensor" else t
    found = statistics(query, key, temperature=given, normalize=normalize, columns=True, backend=backend)
    number = 0.05 if t == "tensor" else t
    want = dense(
        query.cpu().detach().double(), key.cpu().detach().double(), None, number, normalize=normalize, columns=True
    )
    for ours, exact in zip(directions(found), directions(want), strict=True):
        size = exact.maximum.abs().max().item()
        torch.testing.assert_close(ours.maximum.double().cpu(), exact.maximum, rtol=0, atol=1e-6 * size)
        # as a pair: neg is what maximum and scale say together
        torch.testing.assert_close(ours.maximum - ours.scale.log(), ours.neg.detach(), rtol=0, atol=2e-6 * size)


@every_backend
def test_a_row_without_negatives_and_one_that_is_ignored(backend):
    device = DEVICE.get(backend, "cpu")
    query, key = (torch.randn(4, D, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    ids, target = torch.tensor([0, 1, 1, 1], device=device), torch.tensor([0, 1, -100, 3], device=device)
    rows = statistics(query[1:], key[1:], key_ids=ids[1:], backend=backend)
    assert torch.equal(rows.neg, torch.full_like(rows.neg, -math.inf))
    assert torch.equal(rows.maximum, rows.neg)
    assert not rows.mean.any()
    assert not rows.scale.any()
    gradients = torch.autograd.grad((rows.pos + torch.nn.functional.softplus(rows.neg - rows.pos)).sum(), (query, key))
    assert all(x.isfinite().all() for x in gradients)
    ignored = statistics(query, key, target=target, backend=backend)
    assert ignored.pos[2] == 0
    assert ignored.neg.isfinite().all()  # all keys are the negatives of a row without a positive
    (gradient,) = torch.autograd.grad(ignored.pos.sum(), query)
    assert not gradient[2].any()


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value, backend):
    device = DEVICE.get(backend, "cpu")
    query, key = (torch.randn(5, D, device=device) for _ in range(2))
    query[2, 1] = value
    found = statistics(query, key, columns=True, backend=backend)
    rows, columns = directions(found)
    for name, x in zip(RowStatistics._fields, rows, strict=True):
        assert x.isnan().tolist() == [i == 2 for i in range(5)], name
    for name, x in list(zip(RowStatistics._fields, columns, strict=True))[1:]:
        assert x.isnan().tolist() == [i != 2 for i in range(5)], name  # every key but its own sees the query
    poisoned = key.clone()
    poisoned[0, 0] = value
    assert statistics(torch.randn(5, D, device=device), poisoned, backend=backend).neg.isnan().tolist() == [
        False
    ] + 4 * [True]


@pytest.mark.parametrize("backend", ["torch", TRITON])  # the reference multiplies in the inputs' dtype
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_fields_are_float32_within_the_bounds(backend, dtype):
    device = DEVICE.get(backend, "cpu")
    query, key = (torch.randn(33, 24, device=device).to(dtype) for _ in range(2))
    found = statistics(query, key, temperature=0.05, backend=backend)
    want = dense(query.cpu().double(), key.cpu().double(), None, 0.05)
    for name, x, y in zip(RowStatistics._fields, found, want, strict=True):
        assert x.dtype == torch.float32
        assert x.shape == (33,)
        assert error(x, y) <= bounds(dtype, 0.05)[0], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_both_directions_with_negatives_apart_are_rounded_once(dtype):
    """Two problems, whose 16-bit gradients autograd would add after rounding each."""
    wide = [(torch.randn(256, 64) + 3 * torch.randn(64)).to(dtype).float().requires_grad_() for _ in range(2)]
    narrow = [x.detach().to(dtype).requires_grad_() for x in wide]
    negatives = torch.randn(64, 64).to(dtype)

    def gradients(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        given = negatives.to(query.dtype)
        found = statistics(query, key, given, temperature=8.0, columns=True, normalize=False)
        return torch.autograd.grad(sum(x.neg.sum() - x.pos.sum() for x in directions(found)), (query, key))

    for got, want in zip(gradients(*narrow), gradients(*wide), strict=True):
        assert torch.equal(got, want.to(dtype))


@every_backend
def test_a_loss_of_ones_own_has_the_gradients_of_the_librarys(backend):
    from fused_infonce import info_nce

    device = DEVICE.get(backend, "cpu")
    inputs = [torch.randn(20, 8, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rows, columns = statistics(*inputs, temperature=0.2, columns=True, backend=backend)
    own = sum(torch.nn.functional.softplus(x.neg - x.pos).mean() for x in (rows, columns)) / 2
    theirs = info_nce(*inputs, temperature=0.2, symmetric=True, backend=backend)
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=0)
    for x, y in zip(torch.autograd.grad(own, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@every_backend
def test_no_rows_and_no_keys(backend):
    device = DEVICE.get(backend, "cpu")
    for n, m in ((0, 0), (0, 4), (3, 0)):
        target = torch.full((n,), -100, device=device)
        rows = statistics(
            torch.randn(n, D, device=device), torch.randn(m, D, device=device), target=target, backend=backend
        )
        assert [x.shape for x in rows] == [(n,)] * 5
        assert (rows.neg == -math.inf).all()


def test_mistakes_are_refused():
    query, key = torch.randn(4, D), torch.randn(5, D)
    with pytest.raises(ValueError, match=r"^key must have 4 rows as query has"):
        statistics(query, key)
    with pytest.raises(ValueError, match=r"^columns=True .* cannot be used with target"):
        statistics(query, key, target=torch.arange(4), columns=True)
    with pytest.raises(TypeError, match=r"^key must be a tensor"):
        statistics(query, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"^key must have {D} components"):
        statistics(query, query[:, 1:])
    with pytest.raises(ValueError, match="backend must be one of"):
        statistics(query, query, backend="cuda")
    x = query.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(statistics(x, query).neg.sum(), x, create_graph=True)
