"""The standard deviation of every row's scores, and a distillation of standardised logits by it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.helpers import DEVICE, both, both_backends, embeddings, error
from support.memory import PeakMemory

from fused_infonce import distilled_info_nce, score_std


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("correction", [0, 1, 3])
def test_it_is_that_of_the_scores(normalize, correction):
    """Its gradients too, which are those of finite differences."""
    query, key = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    inputs = [query.requires_grad_(), key.requires_grad_()]

    def ours(x, y):
        return score_std(x, y, normalize=normalize, correction=correction)

    def dense(x, y):
        x, y = (F.normalize(z, dim=1) if normalize else z for z in (x, y))
        return (x @ y.T).std(1, correction=correction)

    assert torch.autograd.gradcheck(ours, inputs)
    for got, want in both([ours, dense], inputs):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["tight", "loose", "cone_90", "cone_98"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_keeps_the_digits_of_its_inputs(kind, dtype):
    """In a cone too, where the mean of the scores is far larger than how they differ."""
    query, key = (x.to(dtype) for x in embeddings(kind, 60, 24)[:2])
    got = score_std(query, key)
    x, y = (F.normalize(z.double(), dim=1) for z in (query, key))
    assert got.dtype == torch.float32
    assert error(got, (x @ y.T).std(1)) <= 2e-6


def lskd(student, teacher, tau):
    """The divergence of standardised logits as the authors' code computes it."""

    def standardized(logits):
        return (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))

    log_p, p = F.log_softmax(standardized(student) / tau, 1), F.softmax(standardized(teacher) / tau, 1)
    return F.kl_div(log_p, p, reduction="none").sum(1).mean()


@both_backends
def test_a_distillation_of_standardised_logits_is_that_of_the_authors(backend):
    """With the gradient through the student's standard deviations."""
    device = DEVICE[backend]
    query, key = (torch.randn(n, 5, dtype=torch.float64, device=device, requires_grad=True) for n in (7, 9))
    teacher = [torch.randn(n, 3, dtype=torch.float64, device=device) for n in (7, 9)]

    def ours(q, k):
        return distilled_info_nce(
            q, k, *teacher, temperature=2.0 * score_std(q, k), teacher_temperature=2.0 * score_std(*teacher),
            objective="kl_div", backend=backend,
        )  # fmt: skip

    def theirs(q, k):
        x, y, z, w = (F.normalize(rows, dim=1) for rows in (q, k, *teacher))
        return lskd(x @ y.T, z @ w.T, 2.0)

    for got, want in both([ours, theirs], [query, key]):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-9)  # for their 1e-7


def test_no_scores_are_held():
    query, key = torch.randn(3000, 16), torch.randn(4000, 16)
    with PeakMemory() as memory:
        score_std(query, key)
    assert memory.largest <= key.nbytes


ROWS = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"key": ROWS[:1]}, ValueError, "key must have more rows than the correction, 1, got 1"),
        ({"key": ROWS[:, 1:]}, ValueError, "key must have 3 components as query has, got 2"),
        ({"key": ROWS.double()}, TypeError, "key must be torch.float32 as query is"),
        ({"correction": -1}, ValueError, "correction must be 0 or more, got -1"),
        ({"query": ROWS.long()}, TypeError, "query must be float16"),
    ],
)
def test_a_bad_argument_is_refused(bad, kind, message):
    with pytest.raises(kind, match=message):
        score_std(**({"query": ROWS, "key": ROWS} | bad))


def test_a_row_of_equal_scores_has_none():
    got = score_std(torch.randn(3, 4), ROWS.new_ones(5, 4))
    assert torch.equal(got, torch.zeros(3))


def test_a_row_of_zeros_poisons_no_other():
    query, key = torch.randn(4, 8), torch.randn(5, 8)
    query[2] = 0
    got, want = [], []
    for found, function in ((got, score_std), (want, lambda x, y: (F.normalize(x) @ F.normalize(y).T).std(1))):
        leaves = [x.clone().requires_grad_() for x in (query, key)]
        value = function(*leaves)
        found += [value.detach(), *torch.autograd.grad(value[[0, 1, 3]].sum(), leaves)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    score_std(*leaves).sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
