"""Memory: nothing of the size of the logits is ever allocated, and nothing but O((N + M) D) is saved."""

import pytest
import torch
from oracles import info_nce as dense
from support.memory import MIB, PeakMemory

from fused_infonce import grouped_info_nce, info_nce, nt_xent


def leaves(n, m, d, dtype=torch.float32):
    return [torch.randn(size, d).to(dtype).requires_grad_() for size in (n, m)]


def measure(n, m, d, loss_of=info_nce, dtype=torch.float32, **options):
    """(peak of a forward and backward, bytes of inputs, in float32)."""
    query, key = leaves(n, m, d, dtype)
    if n != m:
        options["target"] = torch.randint(m, (n,))
    with PeakMemory() as memory:
        loss = loss_of(query, key, **options)
        loss.backward(torch.ones_like(loss))
    del loss
    assert query.grad.any()
    assert key.grad.any()
    return memory, (n + m) * d * 4


def test_the_measure_sees_a_dense_loss():
    """Else it could not fail: scores, probabilities and their gradient."""
    memory, _ = measure(1024, 1024, 16, loss_of=dense.info_nce)
    assert memory.peak > 3 * 1024 * 1024 * 4
    assert memory.largest >= 1024 * 1024 * 4


def test_the_measure_forgets_what_is_freed():
    with PeakMemory() as memory:
        for _ in range(4):
            x = torch.ones(MIB)
            x = x[1:].view(-1)  # a view is not new memory
    assert 4 * MIB <= memory.peak <= 2 * 4 * MIB
    del x
    assert memory.now == 0


# The workspace, the keys and queries as the logits see them, their accumulated gradients and those returned.
PER_INPUT = 4


@pytest.mark.parametrize(
    ("n", "m", "options"),
    [
        (8192, 8192, {}),
        (8192, 8192, {"symmetric": True}),
        (6144, 6144, {"reduction": "none"}),
        (1536, 30000, {}),
        (30000, 1536, {}),
    ],
    ids=str,
)
def test_the_peak_of_a_call_is_the_limit_and_four_times_its_inputs(n, m, options):
    """D = 64. The dense loss would need three times N M floats: 768 MiB for the first of these."""
    memory, inputs = measure(n, m, 64, **options)
    assert memory.peak <= 64 * MIB + PER_INPUT * inputs
    assert memory.peak <= n * m * 4 / 2


def test_the_peak_of_16_bit_inputs_is_that_of_float32_ones():
    """Theirs are the rows as the logits see them and the gradients in float32, and the returned ones in 16."""
    memory, inputs = measure(4096, 4096, 64, dtype=torch.bfloat16, workspace_limit=4 * MIB)
    assert memory.peak <= 4 * MIB + PER_INPUT * inputs


def test_the_peak_of_two_views_is_one_copy_more():
    """Two views are put into one first."""
    memory, inputs = measure(2048, 2048, 64, loss_of=nt_xent, workspace_limit=4 * MIB)
    assert memory.peak <= 4 * MIB + (PER_INPUT + 1) * inputs


@pytest.mark.parametrize("limit", [MIB // 4, MIB, 4 * MIB])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"reduction": "none"}, {"ids": True}, {"per_row": True, "symmetric": True}],
    ids=str,
)  # fmt: skip
def test_the_workspace_limit_holds(limit, options):
    options = dict(options)
    if options.pop("ids", False):
        options["key_ids"] = torch.arange(2048) // 2
    if options.pop("per_row", False):
        options["temperature"] = torch.full((2048,), 0.1)
    memory, inputs = measure(2048, 2048, 32, workspace_limit=limit, **options)
    assert memory.peak <= limit + PER_INPUT * inputs


@pytest.mark.parametrize("in_batch", [None, True])
def test_paired_negatives_are_not_copied(in_batch):
    """(N, H, D) negatives need their gradient, at most once saved and once scaled by the upstream one, and no copy."""
    query, key = leaves(1024, 1024, 32)
    negatives = torch.randn(1024, 256, 32, requires_grad=True)  # 32 MiB
    with PeakMemory() as memory:
        options = {"negative_mode": "paired", "in_batch_negatives": in_batch, "workspace_limit": 4 * MIB}
        info_nce(query, key, negatives, **options).backward()
    whole = negatives.nbytes
    assert memory.peak <= 2 * whole + 4 * MIB + PER_INPUT * (query.nbytes + key.nbytes) + 8 * 1024 * 256 * 4


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("distilled", [False, True])
def test_long_groups_are_worked_on_a_few_at_a_time(distilled, normalize):
    """A distillation needs the gradient of all passages twice more, and no unit rows or scores of all groups."""
    n, size, limit = 32, 2500, MIB // 4
    query, passages = leaves(n, n * size, 4)
    options = {"distillation": "kl_div", "teacher_scores": torch.randn(n, size)} if distilled else {}
    with PeakMemory() as memory:
        loss = grouped_info_nce(query, passages, size, normalize=normalize, workspace_limit=limit, **options)
        assert memory.peak <= limit + (1.3 if normalize else 0.3) * passages.nbytes
        loss.backward()
    assert passages.grad.any()
    assert memory.peak <= limit + (3.5 if normalize else 1.1 + 2 * distilled) * passages.nbytes


def test_forward_alone_needs_no_gradients():
    query, key = (x.detach() for x in leaves(8192, 8192, 64))
    with PeakMemory() as memory:
        info_nce(query, key)
    assert memory.peak <= 64 * MIB + 3 * (query.nbytes + key.nbytes)


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"reduction": "none"}, {"workspace_limit": MIB}, {"ids": True}], ids=str
)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_what_is_saved_is_the_inputs_or_their_gradients_once(backend, options):
    """O((N + M) D): each input or its gradient once, and some vectors. The logits are 16 times that."""
    n, d = (2048, 64) if backend == "torch" else (96, 4)
    options, storages = dict(options), {}
    if options.pop("ids", False):
        options |= {"key_ids": torch.arange(n) // 2, "query_ids": torch.arange(n)}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    query, key = leaves(n, n, d)
    t = torch.tensor(0.1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = info_nce(query, key, temperature=t, backend=backend, **options)
    assert storages
    assert sum(storages.values()) <= 2 * n * d * 4 + 20 * n * 4
    assert max(storages.values()) <= n * d * 4
    loss.sum().backward()
