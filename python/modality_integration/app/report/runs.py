"""Reads the files of a run for the report: mir.json, run.json, history.json and the tables of studies."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modality_integration.app.errors import InputError
from modality_integration.app.out_folder import CHECKPOINT, HISTORY
from modality_integration.app.saved_results import read_result
from modality_integration.metric.differing_settings import VERSION
from modality_integration.metric.files import read_json
from modality_integration.metric.result import MIRResult


@dataclass
class Card:
    """A sample: its name, the beginning of its prose, and a base64 JPEG, or None without a picture."""

    name: str
    text: str
    jpeg: str | None


@dataclass
class History:
    """Measurements of a demo's training: MIR, its standard error and the held-out loss at `steps`, and the training
    loss as (step, loss)."""

    steps: list[int]
    mir: list[float]
    error: list[float | None]
    held_out_loss: list[float]
    loss: list[tuple[int, float]]


@dataclass
class Study:
    """A study's table as text; `name` as in study_<name>.csv."""

    name: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Run:
    """A run and its label. result: None for a folder with studies only. record: run.json, or None without one."""

    label: str
    result: MIRResult | None
    record: dict[str, Any] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    history: History | None = None
    studies: list[Study] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the value, without versions."""
        if self.result is None:
            return {}
        own = {"outliers": self.result.outliers, "normalize": self.result.normalize, "sinks": self.result.sinks}
        rest = {name: value for name, value in self.result.settings.items() if not name.endswith(VERSION)}
        return {**rest, **own}

    @property
    def versions(self) -> dict[str, str]:
        """Package versions by name."""
        settings, record = self.result.settings if self.result else {}, self.record or {}
        known = {**settings, **record}
        known = {name.removesuffix(VERSION): value for name, value in known.items() if name.endswith(VERSION)}
        known |= record.get("versions", {})
        return {n.replace("_", "-"): "not installed" if v is None else str(v) for n, v in known.items()}

    @property
    def circumstances(self) -> dict[str, Any]:
        """How the run was executed: facts of run.json that do not determine the value."""
        record = self.record or {}
        known = {**record.get("options", {}), **record.get("arguments", {}), **record}
        names = ("images", "text", "device", "device_map", "threads", "seconds")
        return {name: known[name] for name in names if known.get(name) is not None}


def read(path: Path, label: str) -> Run:
    """Read the run in a folder, or one result file: mir.json with the files next to it, any other name alone.

    Raises InputError, naming the file, if a file is missing or its contents are invalid.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file() and path.name != "mir.json":
        return Run(label, read_result(path))
    folder = path if path.is_dir() else path.parent
    record = _record(folder / "run.json")
    run = Run(label, read_result(folder) if (folder / "mir.json").exists() else None, record)
    if record is not None:
        run.skipped = _skipped(record, folder / "run.json")
        run.cards = _cards(record, folder / "run.json")
    run.history = _history(folder / HISTORY)
    run.studies = [_study(file) for file in sorted(folder.glob("study_*.csv"))]
    if run.result is None and run.history is None and not run.studies:
        raise InputError(f"{folder} holds no mir.json, history.json or study_*.csv: {_why_empty(folder)}")
    return run


def _why_empty(folder: Path) -> str:
    if (folder / CHECKPOINT).is_dir():
        return "its run is not finished; repeat the mir compute command to resume it"
    if inside := sorted(str(file.parent) for file in folder.glob("*/mir.json")):
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        return f"pass the folders that do: {', '.join(inside[:3])}{more}"
    return "it is not the folder of a run"


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error


def _record(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    record = _json(file)
    if not isinstance(record, dict):
        raise InputError(f"{file}: expected an object, got {type(record).__name__}")
    for name in ("options", "arguments", "versions"):
        if not isinstance(record.get(name, {}), dict):
            raise InputError(f"{file}: {name}: expected an object, got {record[name]!r}")
    return record


def _skipped(record: dict[str, Any], file: Path) -> list[tuple[str, str]]:
    entries = _objects(record, "skipped", file)
    return [(str(entry.get("name", "")), str(entry.get("reason", ""))) for entry in entries]


def _cards(record: dict[str, Any], file: Path) -> list[Card]:
    entries = _objects(record, "samples", file)
    return [Card(str(e.get("name", "")), str(e.get("text", "")), _jpeg(e.get("jpeg"))) for e in entries]


def _objects(record: dict[str, Any], name: str, file: Path) -> list[dict[str, Any]]:
    entries = record.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{file}: {name}: expected a list of objects, got {str(entries)[:80]}")
    return entries


def _jpeg(text: Any) -> str | None:
    """The text if it is a base64 JPEG, else None, so that only pictures are embedded in the page."""
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except binascii.Error:
        return None
    return text if data.startswith(b"\xff\xd8\xff") else None


def _history(file: Path) -> History | None:
    if not file.exists():
        return None
    document = _json(file)
    try:
        steps, loss = [int(step) for step in document["steps"]], _numbers(document.get("loss", []))
        errors = document.get("error") or [None] * len(steps)
        history = History(
            steps,
            _numbers(document["mir"]),
            [None if error is None else float(error) for error in errors],
            _numbers(document.get("held_out_loss", [])),
            list(enumerate(loss, 1)),  # a demo records the loss after every step
        )
        if not len(history.steps) == len(history.mir) == len(history.error):
            raise ValueError(f"{len(steps)} steps, {len(history.mir)} values and {len(history.error)} errors")
        if history.held_out_loss and len(history.held_out_loss) != len(steps):
            raise ValueError(f"{len(steps)} steps and {len(history.held_out_loss)} held-out losses")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{file} is not the history of a training run: {error!r}") from error
    return history if steps else None


def _numbers(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]  # "-inf" too


def _study(file: Path) -> Study:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            columns, *rows = list(filter(None, csv.reader(lines))) or [[]]
    except (csv.Error, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{file} is not the table of a study: {error}") from error
    if not columns:
        raise InputError(f"{file} is not the table of a study: it is empty")
    if any(len(row) != len(columns) for row in rows):
        raise InputError(f"{file} is not the table of a study: some rows differ in length from the header")
    return Study(file.stem.removeprefix("study_"), columns, rows)
