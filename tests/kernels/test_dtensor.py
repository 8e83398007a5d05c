"""DTensors: every operation has the same results for sharded and replicated tensors as for the full tensor."""

import pytest
import torch
import torch.multiprocessing as mp

from kernels import dtensor_rank


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_dtensors_give_what_the_whole_tensors_give(tmp_path):
    mp.spawn(dtensor_rank.compare, (str(tmp_path),), nprocs=dtensor_rank.RANKS)
    assert [(tmp_path / str(rank)).read_text() for rank in range(dtensor_rank.RANKS)] == [""] * dtensor_rank.RANKS
