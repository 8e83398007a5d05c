"""Sums over ranks that count no row twice: each rank also sends the identifiers of the earlier sums that it holds."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor, distributed

ROOM = 4  # identifiers sent with the sums; a rank that holds more of them requires a second all_reduce


def add_up(sums: Tensor, held: frozenset[int], group: distributed.ProcessGroup | None) -> tuple[Tensor, frozenset[int]]:
    """The sum of `sums` (k,) float64 over the ranks of `group`, and the new value of `held`. Changes no argument.

    held: the identifiers of the earlier sums whose totals this rank contributes. The first rank draws the identifier of
    a sum: 52 random bits, which float64 represents exactly. A sum without rows or of a single rank needs none. sums[0]
    is the number of rows.

    Raises:
        RuntimeError: Two ranks hold the same sum. Raised on every rank with the same message.
    """
    ranks, rank, own = distributed.get_world_size(group), distributed.get_rank(group), sorted(held)
    told = sums.new_zeros(ranks, 2 + ROOM)
    mine = [len(own), secrets.randbits(52), *own[:ROOM]]
    told[rank, : len(mine)] = torch.tensor(mine, dtype=sums.dtype, device=sums.device)
    total = torch.cat([sums, told.flatten()])
    distributed.all_reduce(total, group=group)
    total, told = total[: len(sums)], total[len(sums) :].view(ranks, -1)
    rows = [[int(number) for number in row] for row in told.tolist()]
    counts = [row[0] for row in rows]
    names = [row[2 : 2 + count] for row, count in zip(rows, counts, strict=True)]
    if max(counts) > ROOM:
        first = sum(counts[:rank])
        every = sums.new_zeros(sum(counts))
        every[first : first + len(own)] = torch.tensor(own, dtype=sums.dtype, device=sums.device)
        distributed.all_reduce(every, group=group)
        names = [[int(name) for name in part.tolist()] for part in every.split(counts)]
    holders: dict[int, int] = {}
    for other, of_other in enumerate(names):
        for name in of_other:
            if name in holders:
                raise RuntimeError(
                    f"all_reduce: ranks {holders[name]} and {other} of the group both hold the rows of an earlier "
                    "all_reduce, which would be counted twice; to read intermediate totals, reduce a copy with "
                    "copy.deepcopy(moments).all_reduce(), or call reset() after each all_reduce"
                )
            holders[name] = other
    if ranks > 1 and float(total[0]) > 0:
        holders[rows[0][1]] = rank
    return total, frozenset(holders)
