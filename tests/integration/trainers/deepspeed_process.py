"""Sets up a process for DeepSpeed on CPUs."""

import importlib
import logging
import os

import torch.distributed as dist


def begin(rank, store, processes):
    """Joins the other processes through the file `store` and returns deepspeed, with the process group initialised."""
    # DeepSpeed and accelerate require these variables, but open no connection if there is a process group.
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    deepspeed = importlib.import_module("deepspeed")
    logging.disable(logging.WARNING)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # would compile an optional speed-up
    return deepspeed
