"""Synchronisation of a metric between processes: every process gathers all layers and merges them in rank order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mir_kernels._checks import FLOATS
from modality_integration.metric import MODALITIES
from modality_integration.metric.accumulator import LayerAccumulator
from modality_integration.metric.group_moments import Slot, prefix_of, slots
from modality_integration.metric.host_memory import HostMemory
from modality_integration.metric.options import MetricOptions

Gather = Callable[[Tensor], "list[Tensor]"]


def transport_device(group: Any) -> torch.device:
    """The device for communication: the CPU if the group has a backend for it, else (NCCL) this process's GPU.

    It does not depend on where the data are: the processes must agree, and some may have no data.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or "cpu:" in torch.distributed.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def gathered(
    layers: list[LayerAccumulator],
    samples: int,
    options: MetricOptions,
    gather: Gather,
    device: torch.device,
    host: HostMemory,
) -> tuple[list[LayerAccumulator], int]:
    """New layers with the tokens of all processes, and their number of samples. `layers` does not change, and may be
    empty on some processes.

    Accumulators of finished groups go to `host` if it serves the layers' device.
    gather(tensor): the tensors of all processes, in rank order; sizes may differ, the number of dimensions may not.
    ValueError on every process if the processes' layers do not match.
    """
    places = slots(options)
    # First row: settings and samples. Then one row per layer: d, dtype, and whether each slot has an accumulator.
    about = [
        [layer.hidden_size, FLOATS.index(layer.dtype), *(int(slot in layer.moments) for slot in places)]
        for layer in layers
    ]
    first = [int(options.counts_sinks), int(options.outliers == "none"), samples]
    first += [0] * (2 + len(places) - len(first))
    rows = torch.tensor([first, *about], dtype=torch.int64, device=device)
    everyone = [rows.cpu() for rows in gather(rows)]
    for rank, rows in enumerate(everyone):
        if rows.shape[1] != 2 + len(places):
            raise ValueError(f"groups: expected the same number on all processes, process {rank} has a different one")
        for column, name in enumerate(("sinks", "outliers")):
            if rows[0, column] != everyone[0][0, column]:
                raise ValueError(
                    f"{name}: expected the same setting on all processes, process {rank} has a different one"
                )
    samples = sum(int(rows[0, 2]) for rows in everyone)
    everyone = [rows[1:] for rows in everyone]
    present = [rank for rank, rows in enumerate(everyone) if len(rows)]
    if not present:
        return [], samples
    layout = everyone[present[0]]
    for rank in present:
        if everyone[rank][:, :2].tolist() != layout[:, :2].tolist():
            raise ValueError(
                f"processes {present[0]} and {rank} have different layers: (d, dtype) "
                f"{_describe(layout)} and {_describe(everyone[rank])}"
            )
    result = []
    for k, (hidden_size, dtype_code, *_) in enumerate(layout.tolist()):
        accumulated = [slot for i, slot in enumerate(places) if any(int(everyone[r][k, 2 + i]) for r in present)]
        place = layers[k].device if layers else device

        def blank(
            k: int = k, hidden_size: int = hidden_size, dtype_code: int = dtype_code, place: torch.device = place
        ) -> LayerAccumulator:
            return LayerAccumulator(k + 1, hidden_size, FLOATS[dtype_code], place, options, host=host)

        mine = layers[k] if layers else blank()
        parts = _gather_state(mine, blank(), accumulated, gather, device)
        merged = blank()
        for rank in present:
            part = blank()
            lacks = tuple(prefix_of(slot) for i, slot in enumerate(places) if not int(everyone[rank][k, 2 + i]))
            part.load_state_dict({key: v for key, v in parts[rank].items() if not key.startswith(lacks)})
            merged.merge(part)
            if rank == present[0]:
                for m in MODALITIES:
                    merged.tokens[m].others.limits = part.tokens[m].limits
        result.append(merged)
    return result, samples


def _gather_state(
    mine: LayerAccumulator, blank: LayerAccumulator, accumulated: list[Slot], gather: Gather, device: torch.device
) -> list[dict[str, Tensor]]:
    """Every process's state_dict of one layer; processes without an accumulator send an empty one."""
    state = mine.state_dict()
    for slot in accumulated:
        if slot not in mine.moments:
            empty = blank.accumulator(blank.options.precision)._live_state()
            state |= {f"{prefix_of(slot)}{key}": value for key, value in empty.items()}
    parts: list[dict[str, Tensor]] = []
    for key in sorted(state):
        tensor = state[key].to(device).contiguous()
        # Rows are sent as bytes, as not every backend supports every floating dtype. Empty ones may differ in dtype.
        as_bytes = key.endswith((".held", ".pending"))
        if as_bytes:
            tensor = tensor.to(mine.dtype)
        received = gather(tensor.view(torch.uint8) if as_bytes else tensor)
        parts = parts or [{} for _ in received]
        for part, value in zip(parts, received, strict=True):
            part[key] = (value.contiguous().view(tensor.dtype) if as_bytes else value).to(state[key].device)
    return parts


def _describe(layout: Tensor) -> list[tuple[int, str]]:
    return [(int(row[0]), str(FLOATS[int(row[1])]).removeprefix("torch.")) for row in layout]
