"""Any call with several positives, ids, masks, places in a table, biases or a margin equals the reference."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.helpers import error, evaluate

from fused_infonce import info_nce
from fused_infonce.backends import plan


def call(draw, n, m, h):
    """Return the inputs and options of a call, of which options that do not go together are left out."""
    rows = {"query": (n, 4), "positive_key": (m, 4)}
    options = {"reduction": draw(st.sampled_from(["mean", "sum", "none"])), "normalize": draw(st.booleans())}
    inputs = {"temperature": 0.2 + torch.rand(n if draw(st.booleans()) else (), dtype=torch.float64)}
    several = draw(st.booleans())
    width = (n, draw(st.integers(1, 3))) if several else (n,)
    inputs["target"] = torch.randint(m, width).masked_fill_(torch.rand(width) < 0.3, -100)
    if several:
        options["positives"] = draw(st.sampled_from(["each", "all", "any"]))
        if options["positives"] != "any" and draw(st.booleans()):
            inputs["positive_weight"] = torch.rand(width).masked_fill_(torch.rand(width) < 0.2, 0)
    if draw(st.booleans()):
        options["margin"] = draw(st.sampled_from([0.1, 0.5]))
    negatives = draw(st.sampled_from(["none", "shared", "paired", "places"]))
    options["in_batch_negatives"] = negatives == "none" or draw(st.booleans())
    if negatives != "none":
        rows["negative_keys"] = (n, h, 4) if negatives == "paired" else (h, 4)
        options["negative_mode"] = "paired" if negatives == "paired" else "unpaired"
        if negatives == "paired" and draw(st.booleans()):
            inputs["negative_mask"] = torch.rand(n, h) < 0.6
        elif draw(st.booleans()):
            inputs["negative_bias"] = 3 * torch.randn(rows["negative_keys"][:-1], dtype=torch.float64)
        if negatives == "places":
            inputs["negative_index"] = torch.randint(-1, h, (n, draw(st.integers(0, 4))))
    if options["in_batch_negatives"] and draw(st.booleans()):
        inputs["key_bias"] = 3 * torch.randn(m, dtype=torch.float64)
        options["positive_bias"] = draw(st.booleans())
    if options["in_batch_negatives"] and draw(st.booleans()):
        columns = draw(st.sampled_from([(), (1,), (2,)]))
        inputs |= {"query_ids": torch.randint(4, (n, *columns)), "key_ids": torch.randint(4, (m, *columns))}
        if negatives != "none":
            inputs["negative_ids"] = torch.randint(4, (*rows["negative_keys"][:-1], *columns))
    return inputs | {name: torch.randn(shape, dtype=torch.float64) for name, shape in rows.items()}, options


@given(st.data(), st.integers(0, 9), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_call_equals_the_reference(monkeypatch, data, n, m, h, blocks, seed):
    torch.manual_seed(seed)
    monkeypatch.setattr(plan, "DENSE", 0 if blocks else 2**18)
    inputs, options = call(data.draw, n, m, h)
    weight = inputs.pop("positive_weight", None)
    options |= {} if weight is None else {"positive_weight": weight}
    got, want = (evaluate(info_nce, inputs, backend=backend, **options) for backend in ("torch", "reference"))
    assert error(got[0], want[0]) <= 1e-11
    for name, gradient in want[1].items():
        if gradient is None:
            assert got[1][name] is None or not got[1][name].any(), name
        else:
            assert error(got[1][name], gradient) <= 1e-9 or (gradient.norm() < 1e-12 > got[1][name].norm()), name
