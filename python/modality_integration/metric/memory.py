"""How much memory a stream will take, told from the samples of it that have passed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mir_kernels.ops.moments.packed import entries
from mir_kernels.ops.moments.streaming import ROWS
from modality_integration.metric import MODALITIES
from modality_integration.metric.accumulator import LayerAccumulator

# d x d matrices of float64, about, that `compute()` has beside the accumulators and its merged copies of them.
SQUARES = 6
# Triangles of a layer that it has at once: both modalities merged, and one that is being merged in; with groups, both
# modalities again without the last group and without this one.
MERGED, MERGED_WITHOUT = 3, 7


class MemoryToCome(NamedTuple):
    """Bytes beyond what is held now: by device, and in the host's memory for finished groups of a device."""

    devices: dict[torch.device, int]
    host: int


def memory_to_come(layers: Sequence[LayerAccumulator], growth: float, groups: int | None = None) -> MemoryToCome:
    """About what the stream and `compute()` will take once `growth` times the tokens so far have passed.

    groups: as if samples were dealt into that many.
    """
    devices, host = Counter[torch.device](), 0
    at_once: dict[torch.device, int] = {}
    settled = 0
    for layer in layers:
        d, dealt = layer.hidden_size, max(layer.options.groups if groups is None else groups, 1)
        triangle = 8 * (entries(d) + 4 * d)
        block, row = ROWS.get(layer.device.type, ROWS["cuda"]), d * layer.dtype.itemsize
        for tokens in (layer.tokens[m].others for m in MODALITIES):
            rows = math.ceil(tokens.count() * growth)
            devices[layer.device] += max(min(rows, layer.hold) * row - tokens.held_bytes, 0)
            if rows <= layer.hold:
                continue  # nothing is released
            here = 1 if layer.moves else dealt
            devices[layer.device] += here * (triangle + (block + 1) * row)
            late = min(block + layer.hold, rows // dealt)  # gathered already, or held while their group ended
            host += (dealt - here) * (triangle + late * row)
        devices[layer.device] -= sum(moments.memory_bytes for moments in layer.moments.here)
        host -= layer.moments.away_bytes
        merged = MERGED if dealt == 1 else MERGED_WITHOUT + (0 if layer.moves else 2 * dealt)
        at_once[layer.device] = max(at_once.get(layer.device, 0), SQUARES * 8 * d * d + merged * triangle)
        settled = max(settled, 2 * dealt * triangle if layer.moves and dealt > 1 else 0)
    for device, needed in at_once.items():
        devices[device] += needed
    return MemoryToCome(dict(devices), max(host, 0) + settled)
