"""Errors that a user can fix, and interruptions; the command prints each as one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


class InputError(ValueError):
    """An input cannot be used; the message names it and says what is expected."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run; the message says what was saved and how to resume. `code` is the exit code."""

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn a ValueError raised inside into an InputError whose message begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{what}: {error}" if what else str(error)) from error


def require_folder(out: Path, option: str = "out") -> None:
    """InputError unless `out` is a writable folder or can be created as one."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{option}: expected a folder, got the file {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option}: {there} is not writable")


def require_unused(files: Iterable[Path], overwrite: bool, option: str = "out") -> None:
    """InputError if one of the files to be written already exists, unless `overwrite`."""
    there = [] if overwrite else [str(file) for file in files if os.path.lexists(file)]
    if there:
        are, them = ("exist", "them") if len(there) > 1 else ("exists", "it")
        raise InputError(
            f"{option}: {', '.join(there)} already {are}; choose another --{option}, or add --overwrite to replace "
            f"{them}"
        )


def in_words(error: OSError) -> str:
    """The system's error message and file name, without the error number."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"
