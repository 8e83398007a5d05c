"""One rank of test_all_reduce.py. Arguments: folder, row boundaries of both ranks, this rank."""

import sys
from pathlib import Path

import torch
from torch import distributed

from mir_kernels.ops.moments import StreamingMoments

folder, *split, rank = sys.argv[1:]
folder, split, rank = Path(folder), [int(n) for n in split], int(rank)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
moments = StreamingMoments(70)
for part in torch.load(folder / "x.pt")[split[rank] : split[rank + 1]].split(100):
    moments.update(part)
moments.all_reduce()
torch.save({"count": moments.count, "mean": moments.mean, "covariance": moments.covariance()}, folder / f"{rank}.pt")
distributed.destroy_process_group()
