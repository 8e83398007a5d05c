"""Runs over several processes, as started by torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from modality_integration.app.checkpoint import Passage
from modality_integration.app.errors import InputError


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, number of processes); joins torchrun's process group and leaves it at the end."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = world_size()
    if world == 1 or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    # Python objects go over gloo, whatever the device; NCCL would move them to the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes started by torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_one_process(what: str) -> None:
    """InputError under torchrun with more than one process."""
    if world_size() > 1:
        raise InputError(f"{what}: runs in one process only; start it without torchrun")


def agreed(passage: Passage, world: int) -> Passage:
    """Where to resume, with all processes in the same pass: a kill between passes can leave them in different ones."""
    if world == 1:
        return passage
    passages: list[Any] = [None] * world
    dist.all_gather_object(passages, passage)
    return passage if len({other.number for other in passages}) == 1 else Passage()


@contextlib.contextmanager
def all_or_none(world: int) -> Iterator[None]:
    """Around a step of every process: if it fails in one, the others stop with an InputError that says why.

    No process waits for one that has exited, and an error reads the same whichever process raised it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if world == 1:
            raise
        failure = error
    if world == 1:
        return
    failures: list[Any] = [None] * world
    dist.all_gather_object(failures, None if failure is None else (type(failure).__name__, str(failure)))
    if failure is not None:
        raise failure
    for rank, other in enumerate(failures):
        if other is not None:
            name, words = other
            raise InputError(f"process {rank}: {words or name}")
