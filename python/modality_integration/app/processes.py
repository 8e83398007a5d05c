"""Several processes in one run, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from modality_integration.app.checkpoint import Passage


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, number of processes); joins the group that torchrun announces, and leaves it again."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = world_size()
    if world == 1 or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    # Objects travel over gloo, from any device; NCCL would put them on the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def agreed(passage: Passage, world: int) -> Passage:
    """Where to go on, every process in the same pass: a kill between two passes leaves some without their first one."""
    if world == 1:
        return passage
    passages: list[Any] = [None] * world
    dist.all_gather_object(passages, passage)
    return passage if len({other.number for other in passages}) == 1 else Passage()
