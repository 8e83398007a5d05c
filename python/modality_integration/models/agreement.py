"""Steps that either succeed in all processes or raise in all of them."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from modality_integration.models.placement import is_distributed

T = TypeVar("T")


@contextmanager
def all_or_none(together: bool = True) -> Iterator[None]:
    """Runs the block in every process; if it fails in one, the others raise the same error with that process's rank.

    With `together=False`, or in a single process, errors are not shared.
    """
    if not (together and is_distributed()):
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, None if failure is None else (type(failure).__name__, str(failure)))
    if failure is not None:
        raise failure
    for rank, other in enumerate(everyone):
        if other is not None:
            kind = getattr(builtins, other[0], RuntimeError)  # other classes become RuntimeError
            raise kind(f"{other[1]} (in process {rank})")


def from_first(value: T) -> T:
    """Returns the first process's value in every process, so that all of them decide alike."""
    if not is_distributed():
        return value
    given = [value]
    torch.distributed.broadcast_object_list(given, src=0)
    return given[0]
