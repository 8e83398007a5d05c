"""Which group of samples, for the standard error, a sample is dealt into."""

from __future__ import annotations

import torch
from torch import Tensor


def dealt(
    first: int, count: int, groups: int, samples: int | None = None, *, process: int = 0, processes: int = 1
) -> Tensor:
    """The groups of a process's samples `first` ... `first + count - 1`: (count,), uint8; 0 throughout without groups.

    Without `samples` in turn, each process beginning with another group: with few samples each they fill all alike.
    samples: how many all processes have together. Groups then come one after the other: sample i of process p, of P,
    is number n = i P + p of all, as processes share a list that each takes every P-th of, and goes to group
    n groups / samples, rounded down. ValueError for a sample beyond that number.
    """
    numbers = torch.arange(first, first + count, dtype=torch.int64, device="cpu")
    if samples is None:
        return ((numbers + process) % max(groups, 1)).to(torch.uint8)
    numbers = numbers * processes + process
    if count and int(numbers[-1]) >= samples:
        raise ValueError(f"samples: {samples} were announced, got sample number {int(numbers[-1]) + 1}")
    return (numbers * max(groups, 1) // samples).to(torch.uint8)


def share(samples: int, process: int, processes: int) -> int:
    """How many of all samples are a process's own."""
    return len(range(process, samples, processes))
