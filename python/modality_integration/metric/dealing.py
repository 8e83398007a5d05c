"""Assignment of samples to groups for the standard error."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, Tensor)


def dealt(
    first: int, count: int, groups: int, samples: int | None = None, *, process: int = 0, processes: int = 1
) -> Tensor:
    """The groups of a process's samples `first` ... `first + count - 1`: (count,), uint8; all 0 if groups is 0.

    Without `samples`, samples go to groups round-robin. Each process starts at a different group, so that groups fill
    evenly even when every process has few samples.
    samples: the total over all processes. Groups are then consecutive blocks of samples: process p of P
    has every P-th entry of a shared list, so its sample i is number n = i P + p overall and goes to group
    floor(n groups / samples). ValueError for a sample beyond that total.
    """
    numbers = torch.arange(first, first + count, dtype=torch.int64, device="cpu")
    if samples is None:
        return ((numbers + process) % max(groups, 1)).to(torch.uint8)
    numbers = numbers * processes + process
    if count and int(numbers[-1]) >= samples:
        raise ValueError(f"samples: expected at most {samples}, got sample number {int(numbers[-1]) + 1}")
    return group_of(numbers, max(groups, 1), samples).to(torch.uint8)


def group_of(number: Number, groups: int, samples: int) -> Number:
    """The group of sample `number` if groups are consecutive blocks of samples."""
    return number * groups // samples


def ends_of_groups(groups: int, samples: int) -> list[int]:
    """The number of the first sample after each group if groups are consecutive blocks of samples."""
    return [-(-samples * (group + 1) // groups) for group in range(groups)]


def sharing(items: Iterable[Iterable[Hashable]]) -> list[list[int]]:
    """Lists of item numbers connected by shared keys, directly or through other items, in order of the items.

    Such items must go to the same group.
    """
    leader: list[int] = []

    def find(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    first: dict[Hashable, int] = {}
    for number, keys in enumerate(items):
        leader.append(number)
        for key in keys:
            leader[find(number)] = find(first.setdefault(key, number))
    together: dict[int, list[int]] = {}
    for number in range(len(leader)):
        together.setdefault(find(number), []).append(number)
    return list(together.values())


def share(samples: int, process: int, processes: int) -> int:
    """How many of all samples belong to one process."""
    return len(range(process, samples, processes))
