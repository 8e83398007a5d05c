"""Makes a process one of DeepSpeed's, on CPUs."""

import importlib
import logging
import os

import torch.distributed as dist


def begin(rank, store, processes):
    """Meets the other processes at the file `store`; gives deepspeed, which then has a process group already."""
    # DeepSpeed and accelerate ask for these, and connect to nobody where there is a process group.
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    deepspeed = importlib.import_module("deepspeed")
    logging.disable(logging.WARNING)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # it compiles one, for speed alone
    return deepspeed
