"""Pairs of equal ids and their logits against the N x M matrix."""

import pytest
import torch
from support.memory import MIB, PeakMemory

from fused_infonce.compose.positives import equal_pairs, members, pair_margins, sums


def dense(neg, x, y, rows, keys):
    return neg[rows] - (x @ y.T)[rows, keys]


def some(n, m, d, pairs, dtype=torch.float64):
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((n,), (n, d), (m, d))]
    return inputs, torch.randint(max(n, 1), (pairs,)), torch.randint(max(m, 1), (pairs,))


@pytest.mark.parametrize(("n", "m", "classes"), [(1, 1, 1), (7, 5, 3), (30, 40, 4), (30, 40, 1), (30, 40, 200)])
@pytest.mark.parametrize("own", ["none", "some", "all"])
def test_equal_pairs_are_those_of_the_matrix(n, m, classes, own):
    row_ids, key_ids = torch.randint(-classes, classes, (n,)), torch.randint(-classes, classes, (m,))
    equal = row_ids[:, None] == key_ids
    order, first, count = members(row_ids, key_ids)
    assert torch.equal(count, equal.sum(1))
    for i in range(n):
        assert torch.equal(order[first[i] : first[i] + count[i]], equal[i].nonzero()[:, 0])
    left_out = None
    if own != "none":
        left_out = torch.where(equal.any(1), equal.long().argmax(1), -1)
        left_out[torch.rand(n) < (0.5 if own == "some" else 0)] = -1
        equal[left_out >= 0, left_out[left_out >= 0]] = False
    for got, want in zip(equal_pairs(row_ids, key_ids, left_out), torch.where(equal), strict=True):
        assert got.dtype == torch.int64
        assert torch.equal(got, want)


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0), (3, 3)])
def test_without_pairs_there_are_no_margins_and_no_gradients(n, m):
    inputs, _, _ = some(n, m, 2, 0)
    pairs = equal_pairs(torch.zeros(n, dtype=torch.long), torch.ones(m, dtype=torch.long))
    assert [len(x) for x in pairs] == [0, 0]
    margins = pair_margins(*inputs, *pairs)
    assert margins.shape == (0,)
    assert not any(g.any() for g in torch.autograd.grad(margins.sum(), inputs))


@pytest.mark.parametrize("limit", [None, 1, 500])  # bytes: all pairs, one and a few at a time
@pytest.mark.parametrize("pairs", [1, 2, 61])
def test_margins_and_gradients_are_those_of_the_matrix(limit, pairs):
    """In any order, with pairs that repeat and rows that have none."""
    inputs, rows, keys = some(6, 5, 3, pairs)
    assert torch.autograd.gradcheck(lambda *x: pair_margins(*x, rows, keys, limit), inputs)
    upstream = torch.randn(pairs, dtype=torch.float64)
    results = [
        [values, *torch.autograd.grad(values, inputs, upstream)]
        for values in (pair_margins(*inputs, rows, keys, limit), dense(*inputs, rows, keys))
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_rows_that_are_their_own_keys_get_both_gradients():
    (neg, x, _), rows, keys = some(6, 6, 3, 20)
    assert torch.autograd.gradcheck(lambda neg, x: pair_margins(neg, x, x, rows, keys), (neg, x))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_some_inputs_need_a_gradient(wanted):
    inputs, rows, keys = some(6, 5, 3, 20)
    want = torch.autograd.grad(pair_margins(*inputs, rows, keys).sum(), inputs)[wanted]
    leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    pair_margins(*leaves, rows, keys).sum().backward()
    assert [x.grad is not None for x in leaves] == [i == wanted for i in range(3)]
    assert torch.equal(leaves[wanted].grad, want)


def test_rows_without_negatives_have_a_margin_of_minus_infinity_and_no_nan():
    """A margin of -inf, and where its loss has no gradient no NaN."""
    (neg, x, y), rows, keys = some(6, 5, 3, 20)
    neg = neg.detach().index_fill(0, torch.tensor([2]), -torch.inf).requires_grad_()
    margins = pair_margins(neg, x, y, rows, keys)
    assert torch.equal(margins == -torch.inf, rows == 2)
    for gradient in torch.autograd.grad(torch.nn.functional.softplus(margins).sum(), (neg, x, y)):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_several_threads_give_the_same_bits():
    inputs, rows, keys = some(64, 48, 32, 30000, torch.float32)
    upstream = torch.randn(len(rows))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = [torch.autograd.grad(pair_margins(*inputs, rows, keys, MIB), inputs, upstream) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_memory_is_that_of_vectors():
    """P = 262144 pairs of D = 256: a copy of a row for each would be 256 MiB."""
    inputs, rows, keys = some(512, 512, 256, 2**18, torch.float32)
    with PeakMemory() as memory:
        pair_margins(*inputs, rows, keys, 4 * MIB).sum().backward()
    assert memory.peak <= 4 * MIB + 12 * rows.nbytes + 8 * inputs[1].nbytes


def test_weighted_rows_are_summed_where_they_belong():
    place, index, weight, rows = (
        torch.tensor([3, 0, 3]),
        torch.tensor([1, 0, 0]),
        torch.tensor([2.0, 3.0, 5.0]),
        torch.eye(2),
    )
    assert torch.equal(sums(place, 5, index, weight, rows), torch.tensor([[3.0, 0], [0, 0], [0, 0], [5, 2], [0, 0]]))


def test_double_backward_is_refused():
    inputs, rows, keys = some(6, 5, 3, 20)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(pair_margins(*inputs, rows, keys).sum(), inputs, create_graph=True)
