"""Conversion of the state of `ModalityIntegrationRate` to plain tensors and back, with checks of every entry."""

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

VERSION = 3  # of the state layout
_PLACE = re.compile(r"0|[1-9]\d{0,5}", re.ASCII)  # layer numbers in state keys


def to_tensors(layers: Sequence[LayerAccumulator], samples: int) -> dict[str, Tensor]:
    """`version`, `samples`, and under `layers.<k>.` the state of each layer (see `LayerAccumulator`).

    Tensors are shared with the layers where possible; copy them to keep them across further updates.
    """
    numbers = {"version": VERSION, "samples": samples}
    state = {name: number(value) for name, value in numbers.items()}
    for k, layer in enumerate(layers):
        state |= {f"layers.{k}.{key}": value for key, value in layer.state_dict().items()}
    return state


@dataclass
class ReadState:
    """Result of `from_tensors`: layers and samples, unless something was missing or invalid.

    missing, unexpected: keys. error: message, or None.
    """

    layers: list[LayerAccumulator] = field(default_factory=list)
    samples: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def whole(self) -> bool:
        """Whether layers and samples are usable; there may be unexpected keys."""
        return not self.missing and self.error is None


def from_tensors(
    state: Mapping[str, Tensor], options: MetricOptions, device: torch.device, host: HostMemory, *, strict: bool
) -> ReadState:
    """Read the result of `to_tensors` onto `device`, and accumulators of finished groups to `host` if it serves it.

    strict: stop reading if there are unexpected keys.
    """
    entries = dict(state)
    read = ReadState(missing=[key for key in ("version", "samples") if key not in entries][:1])
    if read.missing:
        return read
    version, samples = entries.pop("version"), entries.pop("samples")
    try:
        number, read.samples = _checks.whole_number("version", version), _checks.whole_number("samples", samples)
        if number != VERSION:
            raise ValueError(f"version: expected {VERSION}, got {number}")
        layers = _by_layer(entries, read.unexpected)
        if strict and read.unexpected:
            return read
        read.layers = [_layer(layers, k, options, device, host) for k in range(len(layers))]
    except (TypeError, ValueError) as error:
        read.error = str(error)
        return read
    if any(layer.keeps_all != (options.outliers == "none") for layer in read.layers):
        read.error = f'was gathered with a different outlier rule than outliers="{options.outliers}"'
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
    """Layer k of a state; errors name the layer."""
    if k not in layers:
        raise ValueError(f"layers.{k}: is missing among {len(layers)} layers")
    state = layers[k]
    for key in ("vision.held", "text_norms"):
        if not isinstance(state.get(key), Tensor):
            raise ValueError(f"layers.{k}.{key}: expected a tensor, got {type(state.get(key)).__name__}")
    groups, held = state["text_norms"].numel(), state["vision.held"]
    if groups != max(options.groups, 1):
        raise ValueError(f"was gathered in {groups} groups, but this metric has groups={options.groups}")
    for modality in MODALITIES:
        rows, norms = (state.get(f"{modality}.sinks.{name}") for name in ("held", "norms"))
        if not isinstance(rows, Tensor) or not isinstance(norms, Tensor) or norms.numel() == 0:
            continue
        if (rows.numel() > 0) != options.counts_sinks:
            raise ValueError(f'was gathered with a different handling of attention sinks than sinks="{options.sinks}"')
    _checks.tokens(f"layers.{k}.vision.held", held)
    layer = LayerAccumulator(k + 1, held.shape[-1], held.dtype, device, options, host=host)
    try:
        layer.load_state_dict(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"layers.{k}.{error}") from error
    return layer
