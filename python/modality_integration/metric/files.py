"""Files written in one step: a reader sees the old one or the new one, never half, whatever kills the process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to; what lies there afterwards is on disk, then takes the place of `path`."""
    partial = partial_of(path)
    try:
        yield partial
        _flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _flush_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in one step."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its place. One name for all processes: a killed one leaves it behind, and
    the next to write takes it over."""
    return path.with_name(f".{path.name}.partial")


def _flush_to_disk(path: Path) -> None:
    """A file's content, or a folder's names, survive the machine's losing power from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
