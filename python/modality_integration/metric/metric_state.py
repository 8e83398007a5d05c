"""The state of `ModalityIntegrationRate` as plain tensors under one prefix, and back, checked entry by entry."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mir_kernels import _checks
from mir_kernels.ops.moments.state import number
from modality_integration.metric import MODALITIES
from modality_integration.metric.accumulator import LayerAccumulator
from modality_integration.metric.host_memory import HostMemory
from modality_integration.metric.options import MetricOptions

VERSION = 3  # of the state's layout
_PLACE = re.compile(r"0|[1-9]\d{0,5}", re.ASCII)  # a layer in the keys of a state


def to_tensors(layers: Sequence[LayerAccumulator], samples: int) -> dict[str, Tensor]:
    """`version`, `samples`, and under `layers.<k>.` the state of each layer (see `LayerAccumulator`).

    The layers' own tensors, where they can be: copy them to keep them through what comes next.
    """
    numbers = {"version": VERSION, "samples": samples}
    state = {name: number(value) for name, value in numbers.items()}
    for k, layer in enumerate(layers):
        state |= {f"layers.{k}.{key}": value for key, value in layer.state_dict().items()}
    return state


@dataclass
class ReadState:
    """What `from_tensors` found: layers and samples, unless something was missing or wrong.

    missing, unexpected: keys. error: what does not fit, or None.
    """

    layers: list[LayerAccumulator] = field(default_factory=list)
    samples: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def whole(self) -> bool:
        """Whether layers and samples can be taken over, whatever else was in the state."""
        return not self.missing and self.error is None


def from_tensors(
    state: Mapping[str, Tensor], options: MetricOptions, device: torch.device, host: HostMemory, *, strict: bool
) -> ReadState:
    """Read what `to_tensors` gave, onto `device`, and finished groups' accumulators into `host` where it is for it.

    strict: unexpected keys are a reason to read no further.
    """
    entries = dict(state)
    read = ReadState(missing=[key for key in ("version", "samples") if key not in entries][:1])
    if read.missing:
        return read
    version, samples = entries.pop("version"), entries.pop("samples")
    try:
        number, read.samples = _checks.whole_number("version", version), _checks.whole_number("samples", samples)
        if number != VERSION:
            raise ValueError(f"version: takes {VERSION}, got {number}")
        layers = _by_layer(entries, read.unexpected)
        if strict and read.unexpected:
            return read
        read.layers = [_layer(layers, k, options, device, host) for k in range(len(layers))]
    except (TypeError, ValueError) as error:
        read.error = str(error)
        return read
    if any(layer.keeps_all != (options.outliers == "none") for layer in read.layers):
        read.error = f'was gathered with another outlier rule than outliers="{options.outliers}"'
    return read


def _by_layer(entries: Mapping[str, Tensor], unexpected: list[str]) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in entries.items():
        place, _, rest = key.removeprefix("layers.").partition(".")
        if key.startswith("layers.") and _PLACE.fullmatch(place):
            layers.setdefault(int(place), {})[rest] = value
        else:
            unexpected.append(key)
    return layers


def _layer(
    layers: Mapping[int, dict[str, Tensor]], k: int, options: MetricOptions, device: torch.device, host: HostMemory
) -> LayerAccumulator:
    """Layer k of a state, or an error that names it."""
    if k not in layers:
        raise ValueError(f"layers.{k}: is missing, of {len(layers)} layers")
    state = layers[k]
    for key in ("vision.held", "text_norms"):
        if not isinstance(state.get(key), Tensor):
            raise ValueError(f"layers.{k}.{key}: takes a tensor, got {type(state.get(key)).__name__}")
    groups, held = state["text_norms"].numel(), state["vision.held"]
    if groups != max(options.groups, 1):
        raise ValueError(f"was gathered in {groups} groups, takes groups={options.groups}")
    for modality in MODALITIES:
        rows, norms = (state.get(f"{modality}.sinks.{name}") for name in ("held", "norms"))
        if not isinstance(rows, Tensor) or not isinstance(norms, Tensor) or norms.numel() == 0:
            continue
        if (rows.numel() > 0) != options.counts_sinks:
            raise ValueError(f'was gathered with another handling of attention sinks than sinks="{options.sinks}"')
    _checks.tokens(f"layers.{k}.vision.held", held)
    layer = LayerAccumulator(k + 1, held.shape[-1], held.dtype, device, options, host=host)
    try:
        layer.load_state_dict(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"layers.{k}.{error}") from error
    return layer
