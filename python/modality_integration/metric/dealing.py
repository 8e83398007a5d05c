"""Which group of samples, for the standard error, a sample is dealt into."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, Tensor)


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
    return group_of(numbers, max(groups, 1), samples).to(torch.uint8)


def group_of(number: Number, groups: int, samples: int) -> Number:
    """The group of a sample, by its number, where groups come one after the other."""
    return number * groups // samples


def ends_of_groups(groups: int, samples: int) -> list[int]:
    """The number of the first sample after each group, where groups come one after the other."""
    return [-(-samples * (group + 1) // groups) for group in range(groups)]


def sharing(items: Iterable[Iterable[Hashable]]) -> list[list[int]]:
    """The numbers of items that have a key in common, directly or through others, in lists, all in the items' order:
    what is to be in one group.
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
    """How many of all samples are a process's own."""
    return len(range(process, samples, processes))
