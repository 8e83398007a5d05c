"""Files written in one step: a reader sees the old one or the new one, never half, whatever kills the process.

What keeps a file from being written is an OSError that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to; what lies there afterwards is on disk, then takes the place of `path`."""
    partial = partial_of(path)
    with named_errors(path):
        try:
            yield partial
            _flush_to_disk(partial)
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):  # on a disk that fails it stays; what failed is being raised
                partial.unlink(missing_ok=True)
        try:
            _flush_to_disk(path.parent)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that flushes files alone
                raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in one step."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step."""
    write_text(path, json_text(value))


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON, a line an entry. options: of `json.dumps`."""
    return json.dumps(finite(value), indent=2, allow_nan=False, **options) + "\n"


def finite(value: Any) -> Any:
    """`value` as JSON can have it: a number that is not finite as a word, "inf", "-inf" or "nan"."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError where it is none, OSError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its place. One name for all processes: a killed one leaves it behind, and
    the next to write takes it over."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def named_errors(path: Path | str) -> Iterator[None]:
    """An error of the operating system inside becomes an OSError about `path`, which the system's own often leaves out.

    safetensors has errors of its own for what the system refused, with the system's number in their words.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (Path(path), partial_of(Path(path))):
            raise  # it is about another file
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        refused = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if refused is None:
            raise
        raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(path)) from error


def _flush_to_disk(path: Path) -> None:
    """A file's content, or a folder's names, survive the machine's losing power from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
