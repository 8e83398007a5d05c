"""The state of `ModalityIntegrationRate` in one safetensors file, written atomically and verified on reading."""

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
    """Write atomically: the old file or the new one exists, never a partial one."""
    state = {key: value.contiguous() for key, value in state.items()}
    words = json.dumps(asdict(options))
    metadata = {"format": FORMAT, "version": str(VERSION), "options": words, "sha256": _digest(state, words)}
    with written_whole(path) as partial:
        save_file(state, partial, metadata=metadata)


def read_options(path: str | Path) -> MetricOptions:
    """The options a state was gathered with. ValueError if the file is not such a state."""
    return _options(path, _metadata(path))


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors. ValueError if the file is not such a state, or is damaged."""
    metadata = _metadata(path)
    _options(path, metadata)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    # Otherwise a flipped bit would silently change the result.
    if metadata.get("sha256") != _digest(state, metadata["options"]):
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    return state


def _metadata(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path} is not a state of ModalityIntegrationRate: expected format {FORMAT} version {VERSION}, "
            f"got {metadata.get('format')} version {metadata.get('version')}"
        )
    return metadata


def _options(path: str | Path, metadata: dict[str, str]) -> MetricOptions:
    try:
        options = MetricOptions(**json.loads(metadata["options"])).checked()
        if not all(isinstance(flag, bool) for flag in (options.normalize, options.bounds)):
            raise TypeError("normalize, bounds: expected true or false")
        if any(isinstance(number, float) for number in (options.hold, options.groups, options.samples)):
            raise TypeError("hold, groups, samples: expected integers")
        if options.outliers == "median":
            raise ValueError('outliers: "median" cannot be computed in one pass')
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a state of ModalityIntegrationRate: its options are invalid ({error!r})"
        ) from error
    return options


def _digest(state: dict[str, Tensor], options: str) -> str:
    hashed = hashlib.sha256(options.encode())
    for name in sorted(state):
        value = state[name].detach()
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content: Any = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashed.update(content)
    return hashed.hexdigest()
