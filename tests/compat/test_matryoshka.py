"""MatryoshkaLoss beside sentence-transformers' own, over multiple negatives ranking."""

import random

import pytest
import torch
from support.libraries import library
from torch import nn

from fused_infonce import FusedInfoNCELoss, MatryoshkaLoss

originals = library("sentence_transformers.sentence_transformer.losses")


class Rows(nn.Module):
    """A model whose embeddings are its input."""

    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, features):
        return dict(features)

    def get_embedding_dimension(self):
        return self.d


@pytest.mark.parametrize("number", range(200))
def test_equals_the_original(number):
    draw = random.Random(number)
    torch.manual_seed(number)
    dtype = draw.choice([torch.float32, torch.float32, torch.float64])
    n, d, number = draw.randint(2, 20), draw.randint(3, 40), draw.randint(2, 3)
    dims = draw.sample(range(1, d + 1), draw.randint(1, 3))
    weights = draw.choice([None, [draw.uniform(0, 2) for _ in dims]])
    scale = draw.choice([1.0, 10.0, 20.0])
    columns = [torch.randn(n, d, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(number)]
    ours = MatryoshkaLoss(FusedInfoNCELoss(1 / scale, in_batch_negatives=True), dims, weights)(*columns)
    results = [(ours, *torch.autograd.grad(ours, columns))]
    for kind in (dtype, torch.float64):
        model = Rows(d)
        ranking = originals.MultipleNegativesRankingLoss(model, scale=scale)
        loss = originals.MatryoshkaLoss(model, ranking, dims, weights)
        rows = [x.detach().to(kind).requires_grad_() for x in columns]
        value = loss([{"sentence_embedding": x} for x in rows], torch.empty(0))
        results.append((value, *torch.autograd.grad(value, rows)))
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    for a, b, true in zip(*results, strict=True):
        assert a.dtype == b.dtype
        a, b = a.double(), b.double()
        # where theirs is itself that exact: it cancels in logsumexp - positive, and of one component all do
        assert (a - b).norm() <= bound * true.norm() + 2 * (b - true).norm() + 1e-12
        assert (a - true).norm() <= bound * true.norm() + 2 * (b - true).norm() + 1e-12


ARGUMENTS = [
    ([], None), ([0], None), ([4, -1], None), ([9], None), ([4, 2], [1.0]), ([8, 4], [1, 2, 3]), ([4, 4], None),
    ([8], [0.5]),
]  # fmt: skip


@pytest.mark.parametrize(("dims", "weights"), ARGUMENTS)
def test_takes_the_arguments_that_the_original_takes(dims, weights):
    x = torch.randn(3, 8)

    def original():
        model = Rows(8)
        ranking = originals.MultipleNegativesRankingLoss(model)
        originals.MatryoshkaLoss(model, ranking, dims, weights)([{"sentence_embedding": x}] * 2, torch.empty(0))

    outcomes = []
    for function in (original, lambda: MatryoshkaLoss(FusedInfoNCELoss(), dims, weights)(x, x)):
        try:
            function()
            outcomes.append(None)
        except Exception as why:
            outcomes.append(type(why))
    assert outcomes[0] == outcomes[1]
