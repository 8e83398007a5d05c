"""Estimate of a stream's memory from the samples seen so far."""

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

# Approximate number of float64 d x d matrices that `compute()` needs in addition to the accumulators and merged copies.
SQUARES = 6
# Triangles of a layer that `compute()` holds at once: both modalities merged and one being merged in; with groups, also
# both modalities without the previous group and without the current one.
MERGED, MERGED_WITHOUT = 3, 7


class MemoryToCome(NamedTuple):
    """Bytes in addition to those held now: by device, and in host memory for finished groups of a device."""

    devices: dict[torch.device, int]
    host: int


def memory_to_come(layers: Sequence[LayerAccumulator], growth: float, groups: int | None = None) -> MemoryToCome:
    """Estimated memory of the stream and `compute()` after `growth` times the tokens seen so far.

    groups: assume this number of groups of samples.
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
            late = min(block + layer.hold, rows // dealt)  # gathered already, or held when their group ended
            host += (dealt - here) * (triangle + late * row)
        devices[layer.device] -= sum(moments.memory_bytes for moments in layer.moments.here)
        host -= layer.moments.away_bytes
        merged = MERGED if dealt == 1 else MERGED_WITHOUT + (0 if layer.moves else 2 * dealt)
        at_once[layer.device] = max(at_once.get(layer.device, 0), SQUARES * 8 * d * d + merged * triangle)
        settled = max(settled, 2 * dealt * triangle if layer.moves and dealt > 1 else 0)
    for device, needed in at_once.items():
        devices[device] += needed
    return MemoryToCome(dict(devices), max(host, 0) + settled)
