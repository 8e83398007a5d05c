"""The state of `ModalityIntegrationRate` in one safetensors file, written in one step and checked when it is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modality_integration.metric.files import written_whole
from modality_integration.metric.metric_state import VERSION
from modality_integration.metric.options import MetricOptions

FORMAT = "modality-integration-rate-state"


def write(path: Path, state: dict[str, Tensor], options: MetricOptions) -> None:
    """The old file or the new one is there, never half."""
    state = {key: value.contiguous() for key, value in state.items()}
    words = json.dumps(asdict(options))
    metadata = {"format": FORMAT, "version": str(VERSION), "options": words, "sha256": _digest(state, words)}
    with written_whole(path) as partial:
        save_file(state, partial, metadata=metadata)


def read_options(path: str | Path) -> MetricOptions:
    """The options a state was gathered with. ValueError if the file is none of ours."""
    return _options(path, _metadata(path))


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors. ValueError if the file is none of ours, or not as it was written."""
    metadata = _metadata(path)
    _options(path, metadata)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error})") from error
    # A flipped bit in a sum would only show as another result.
    if metadata.get("sha256") != _digest(state, metadata["options"]):
        raise ValueError(f"{path} is damaged: its content does not have the checksum that it was written with")
    return state


def _metadata(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path} is no state of ModalityIntegrationRate: takes format {FORMAT} version {VERSION}, "
            f"got {metadata.get('format')} version {metadata.get('version')}"
        )
    return metadata


def _options(path: str | Path, metadata: dict[str, str]) -> MetricOptions:
    try:
        options = MetricOptions(**json.loads(metadata["options"])).checked()
        if not all(isinstance(flag, bool) for flag in (options.normalize, options.bounds)):
            raise TypeError("normalize, bounds: take true or false")
        if any(isinstance(number, float) for number in (options.hold, options.groups, options.samples)):
            raise TypeError("hold, groups, samples: take integers")
        if options.outliers == "median":
            raise ValueError('outliers: "median" cannot be gathered in one pass')
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no state of ModalityIntegrationRate: its options are none ({error!r})") from error
    return options


def _digest(state: dict[str, Tensor], options: str) -> str:
    hashed = hashlib.sha256(options.encode())
    for name in sorted(state):
        value = state[name].detach()
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content: Any = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashed.update(content)
    return hashed.hexdigest()
