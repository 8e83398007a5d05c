"""Images and texts that occur more than once in a probe: groups of samples that share one are not independent."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modality_integration.metric.dealing import dealt, ends_of_groups, sharing

Contents = list[set[str]]  # the image and text of each row of a batch


def contents(batch: Mapping[str, Any], rows: int) -> Contents:
    """The contents of each row of a batch, "image <hash>" and "text <hash>": equal if all values are equal.

    All floating-point inputs count as images. If they do not have one row per row of `input_ids` (such as patches of
    several images), two rows are equal if they have the same position in equal batches.
    """
    ids, attention = batch.get("input_ids"), batch.get("attention_mask")
    pictures = [v for v in batch.values() if isinstance(v, Tensor) and v.is_floating_point() and v is not attention]
    named = [_names(picture, rows) for picture in pictures]
    shown: Contents = []
    for row in range(rows):
        seen = [names[row] for names in named]
        content = {f"image {' '.join(seen)}"} if seen else set()
        if isinstance(ids, Tensor):
            mask = attention if isinstance(attention, Tensor) and attention.shape == ids.shape else None
            content.add(f"text {_hash(ids[row] if mask is None else ids[row][mask[row].bool()])}")
        shown.append(content)
    return shown


def order_apart(batches: Sequence[Contents], groups: int, shuffled: Sequence[int]) -> list[int]:
    """Reorders the batch numbers `shuffled` so that batches with shared contents are adjacent, within one group.

    Groups are consecutive blocks of rows. Contents that do not fit into one group still end up in several.
    """
    rows = [len(batch) for batch in batches]
    ends = ends_of_groups(groups, sum(rows))
    several = [members for members in sharing(set().union(*batch) for batch in batches) if len(members) > 1]
    several.sort(key=lambda members: -sum(rows[i] for i in members))
    room = [end - start for start, end in pairwise([0, *ends])]
    placed: list[list[int]] = [[] for _ in range(groups)]
    for members in several:
        widest = max(range(groups), key=room.__getitem__)
        placed[widest] += members
        room[widest] -= sum(rows[i] for i in members)
    taken = {i for members in several for i in members}
    alone = deque(i for i in shuffled if i not in taken)
    order: list[int] = []
    count = 0
    for group, end in enumerate(ends):
        order += placed[group]
        count += sum(rows[i] for i in placed[group])
        while alone and (count < end or group == groups - 1):
            order.append(alone.popleft())
            count += rows[order[-1]]
    return order


def shared(batches: Sequence[Contents], groups: int, samples: int | None, process: int, processes: int) -> str:
    """If groups share contents, the kinds with fewer distinct ones than rows, in words ("3 images"), otherwise "".

    Groups are those into which `ModalityIntegrationRate` divides the rows of these batches. samples: the number
    announced to it; None if it assigns rows to groups round-robin.
    """
    rows = [row for batch in batches for row in batch]
    of = dealt(0, len(rows), groups, samples, process=process, processes=processes).tolist()
    seen: dict[str, set[int]] = defaultdict(set)
    for group, row in zip(of, rows, strict=True):
        for content in row:
            seen[content].add(group)
    if not any(len(groups_of) > 1 for groups_of in seen.values()):
        return ""
    distinct = [(kind, sum(content.startswith(kind) for content in seen)) for kind in ("image", "text")]
    return " and ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in distinct if 0 < n < len(rows))


def shuffled(count: int) -> list[int]:
    """The numbers of `count` batches in a random order that is the same every time."""
    return random.Random("order of the probe").sample(range(count), count)


def _names(value: Tensor, rows: int) -> list[str]:
    """A name for the value of an input in each row."""
    if value.dim() > 1 and len(value) == rows:
        return [_hash(row) for row in value]
    whole = _hash(value)
    return [f"{whole}/{row}" for row in range(rows)]


def _hash(value: Tensor) -> str:
    plain = value.detach().cpu().contiguous()
    return hashlib.blake2b(plain.view(-1).view(torch.uint8).numpy().tobytes(), digest_size=12).hexdigest()
