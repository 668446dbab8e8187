"""What SigLIP's loss refuses, and how it says so."""

import math

import pytest
import torch
from support.helpers import elsewhere

from fused_infonce import SigLipLoss, siglip_loss

N, D = 7, 5
ONE = torch.ones(N, D)
IDS = torch.arange(N)
BAD = {
    "an array": ({"image_features": [[1.0]]}, TypeError, "image_features must be a tensor"),
    "fewer texts": ({"text_features": ONE[1:]}, ValueError, r"text_features must have shape \(7, 5\)"),
    "mixed dtypes": ({"text_features": ONE.double()}, TypeError, "text_features must be torch.float32"),
    "short negatives": ({"negative_text_features": ONE[:, 1:]}, ValueError, "negative_text_features must have 5 comp"),
    "negatives apart": ({"negative_text_features": ONE[:, None]}, ValueError, "negative_text_features must have 2 dim"),
    "mixed negatives": ({"negative_text_features": ONE.double()}, TypeError, "negative_text_features must be torch.f"),
    "no scale": ({"logit_scale": None}, TypeError, "logit_scale must be a number"),
    "negative scale": ({"logit_scale": torch.tensor(-1.0)}, ValueError, "logit_scale must be positive and finite"),
    "scales": ({"logit_scale": torch.ones(N + 1)}, ValueError, "logit_scale must be .*one value per row"),
    "bias": ({"logit_bias": "0"}, TypeError, "logit_bias must be a number or a one-element tensor, got str"),
    "boolean bias": ({"logit_bias": True}, TypeError, "logit_bias must be a number"),
    "integer bias": ({"logit_bias": torch.tensor(3)}, TypeError, "logit_bias must be a number or a floating"),
    "biases": ({"logit_bias": torch.ones(N)}, ValueError, "logit_bias must be a number or a one-element"),
    "infinite bias": ({"logit_bias": math.inf}, ValueError, "logit_bias must be finite, got inf"),
    "bias NaN": ({"logit_bias": torch.tensor(math.nan)}, ValueError, "logit_bias must be finite, got nan"),
    "bias elsewhere": ({"logit_bias": elsewhere(1)}, ValueError, "logit_bias must be on cpu"),
    "float ids": ({"text_ids": ONE[:, 0]}, TypeError, "text_ids must be an integer tensor"),
    "fewer ids": ({"text_ids": IDS[1:]}, ValueError, r"text_ids must have shape \(7,\)"),
    "image ids": ({"image_ids": IDS}, ValueError, "image_ids alone compare with nothing"),
    "negative ids": ({"negative_ids": IDS, "text_ids": IDS}, ValueError, "which were not given"),
    "negative ids alone": (
        {"negative_ids": IDS, "negative_text_features": ONE}, ValueError, "negative_ids alone compare with nothing",
    ),
    "weights": ({"weight": torch.ones(N - 1)}, ValueError, r"weight must be a floating tensor of shape \(7,\)"),
    "negative weight": ({"weight": -torch.ones(N)}, ValueError, "weight must not be negative"),
    "normalize": ({"normalize": "yes"}, ValueError, "normalize must be one of True, False"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "workspace": ({"workspace_limit": 0}, ValueError, "workspace_limit must be a number of bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_refused(what):
    replaced, kind, message = BAD[what]
    call = {"image_features": ONE, "text_features": ONE, "logit_scale": 10.0, "logit_bias": -10.0} | replaced
    with pytest.raises(kind, match=message):
        siglip_loss(**call)
    options = {k: v for k, v in call.items() if k in ("normalize", "reduction", "backend", "workspace_limit")}
    if options:
        with pytest.raises(kind, match=message):
            SigLipLoss(**options)
