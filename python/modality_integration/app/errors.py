"""What a person can mend: refusals of what was given, and interruptions, each said in one line by the command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class InputError(ValueError):
    """Something a person gave cannot be used; the message says what it was and what would do."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal; the message says what is kept and how to go on, `code` is the exit code."""

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """A ValueError raised inside becomes an InputError that begins with `what` it was about."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{what}: {error}" if what else str(error)) from error


def require_folder(out: Path) -> None:
    """InputError unless `out` is a folder that can be written to, or can become one."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"out: {there} is a file, and the results go into a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"out: {there} cannot be written to")
