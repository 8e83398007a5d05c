"""What a person can mend: refusals of what was given, and interruptions, each said in one line by the command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
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


def require_folder(out: Path, option: str = "out") -> None:
    """InputError unless `out` is a folder that can be written to, or can become one."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{option}: {there} is a file, and a folder is wanted")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option}: {there} cannot be written to")


def require_unused(files: Iterable[Path], overwrite: bool, option: str = "out") -> None:
    """InputError where one of the files to be written exists already, unless `overwrite`."""
    there = [] if overwrite else [str(file) for file in files if os.path.lexists(file)]
    if there:
        are, them = ("exist", "them") if len(there) > 1 else ("exists", "it")
        raise InputError(
            f"{option}: {', '.join(there)} {are} already: choose another --{option}, or add --overwrite to replace "
            f"{them}"
        )


def in_words(error: OSError) -> str:
    """What the system refused and about which file, without its number."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"
