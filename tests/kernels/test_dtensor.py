"""DTensors: cut along leading axes or whole on every rank, every operation gives what it gives of the whole tensor."""

import pytest
import torch
import torch.multiprocessing as mp

from kernels import dtensor_rank


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_dtensors_give_what_the_whole_tensors_give(tmp_path):
    mp.spawn(dtensor_rank.compare, (f"file://{tmp_path}/rendezvous",), nprocs=dtensor_rank.RANKS)
