"""Atomic file writes: a reader sees the old file or the new one, never a partial one, even if the process is killed.

A failed write raises an OSError that names the file.
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
    """Yield a temporary path to write to; on exit it is flushed to disk and replaces `path`."""
    partial = partial_of(path)
    with named_errors(path):
        try:
            yield partial
            _flush_to_disk(partial)
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):  # on a failing disk it stays; the first error is raised
                partial.unlink(missing_ok=True)
        try:
            _flush_to_disk(path.parent)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
                raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json_text(value))


def json_text(value: Any, **options: Any) -> str:
    """`value` as indented JSON text. options: passed to `json.dumps`."""
    return json.dumps(finite(value), indent=2, allow_nan=False, **options) + "\n"


def finite(value: Any) -> Any:
    """`value` with non-finite numbers replaced by the strings "inf", "-inf" or "nan", as JSON requires."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError if it is not JSON, OSError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def partial_of(path: Path) -> Path:
    """The temporary path of a file. All processes share the name, so a leftover of a killed process is overwritten."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def named_errors(path: Path | str) -> Iterator[None]:
    """Turn operating system errors raised inside into an OSError that names `path`, which they often omit.

    safetensors raises its own error type for these, with the system's error number in the message.
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
    """Make a file's content, or a folder's entries, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
