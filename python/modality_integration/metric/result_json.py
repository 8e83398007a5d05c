"""JSON form of a `MIRResult`: schema, non-finite numbers, and validation on reading."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

from modality_integration.metric import MODALITIES
from modality_integration.metric.files import json_text
from modality_integration.metric.options import Sinks

SCHEMA = "modality-integration-rate"
VERSION = 5
COUNTS = ("kept", "removed", "missed", "massive")
TERMS = ("mean", "trace_vision", "trace_text", "trace_root", "deviations")
BOUNDS = ("root_lower", "root_upper", "mean_lower", "mean_upper")


def encode(document: dict[str, Any]) -> str:
    """The document with schema and version, as JSON text."""
    return json_text({"schema": SCHEMA, "version": VERSION, **document})


def parse(source: str | Path) -> tuple[dict[str, Any], str]:
    """The document from a file or from JSON text, and its name for messages. ValueError if it is not a MIR result."""
    text, name = str(source), "the text"
    try:
        if isinstance(source, Path) or not text.lstrip().startswith("{"):
            name = str(source)
            text = Path(source).read_text(encoding="utf-8")
        document = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f'{name} is not a MIR result: expected JSON with "schema": "{SCHEMA}"')
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{name} has version {version} of the schema; this reader supports version {VERSION}")
    return document, name


def fields(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of `MIRResult`, with "terms" as mappings. An invalid entry raises the error it causes."""
    layers = document["layers"]
    if not isinstance(layers, list) or not layers:
        raise TypeError(f"layers: expected a list of at least one layer, got {layers!r}")
    if not isinstance(document["outliers"], str) or not isinstance(document["normalize"], bool):
        raise TypeError("outliers, normalize: expected a string and a boolean")
    if document["sinks"] not in get_args(Sinks):
        raise ValueError(f"sinks: expected one of {get_args(Sinks)}, got {document['sinks']!r}")
    if not isinstance(document["notes"], list) or not all(isinstance(note, str) for note in document["notes"]):
        raise TypeError("notes: expected a list of strings")
    settings = document["settings"]
    if not isinstance(settings, dict) or not all(map(_plain, settings.values())):
        raise TypeError(f"settings: expected an object of strings, numbers, true, false and null, got {settings!r}")
    without_sinks = [layer["without_sinks"] for layer in layers]
    if without_sinks.count(None) not in (0, len(layers)):
        raise ValueError("without_sinks: expected a number in every layer, or null in every layer")
    if any(isinstance(distance, int | float) and distance < 0 for distance in without_sinks):
        raise ValueError("without_sinks: expected distances, got one below 0")
    left_out: list[Any] = [layer["left_out"] for layer in layers]
    if left_out.count(None) not in (0, len(left_out)) or len({len(values or ()) for values in left_out}) > 1:
        raise ValueError("left_out: expected the same number of values in every layer")
    if any(values is not None and len(values) == 0 for values in left_out):
        raise ValueError("left_out: expected at least one number, or null")
    return {
        "terms": [_terms(layer) for layer in layers],
        "alpha": [_number(layer["alpha"]) for layer in layers],
        **{name: {m: [_count(layer[name][m]) for layer in layers] for m in MODALITIES} for name in COUNTS},
        "left_out": None if None in left_out else [[_number(x, finite=False) for x in values] for values in left_out],
        "outliers": document["outliers"],
        "normalize": document["normalize"],
        "sinks": document["sinks"],
        "sink_positions": {m: _positions(document["sink_positions"][m]) for m in MODALITIES},
        "without_sinks": None if None in without_sinks else [_number(distance) for distance in without_sinks],
        "notes": document["notes"],
        "settings": settings,
    }


def _terms(layer: dict[str, Any]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {name: _number(layer[name]) for name in TERMS}
    return numbers | {n: None if layer[n] is None else _number(layer[n], finite=False) for n in BOUNDS}


def _number(value: Any, *, finite: bool = True) -> float:
    if value in ("inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool)):
        number = float(value)
        if math.isfinite(number) or (not finite and not math.isnan(number)):
            return number
    raise TypeError(f"expected a {'finite ' if finite else ''}number, got {value!r}")


def _positions(value: Any) -> dict[int, int]:
    if not isinstance(value, dict) or not all(re.fullmatch(r"0|[1-9]\d{0,9}", place, re.ASCII) for place in value):
        raise TypeError(f"sink_positions: expected counts by position, got {value!r}")
    return {int(place): _count(count) for place, count in value.items()}


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _count(value: Any) -> int:
    if type(value) is int and value >= 0:
        return value
    raise TypeError(f"expected a number of tokens, got {value!r}")
