"""Cross-device negatives in two processes, gathered by FlagEmbedding's own gather."""

import pytest
import torch
import torch.distributed as dist
from support.flag_models import make
from support.flag_processes import in_one_of_two_processes
from support.processes import in_two_processes


@pytest.mark.timeout(300)
@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
def test_two_processes_give_what_the_original_gives(tmp_path):
    in_two_processes(in_one_of_two_processes, tmp_path)


def test_without_processes_the_original_says_so():
    for which in ("fused", "plain"):
        with pytest.raises(ValueError, match="Distributed training has not been initialized"):
            make("encoder", torch.zeros(2, 2), which, negatives_cross_device=True)
