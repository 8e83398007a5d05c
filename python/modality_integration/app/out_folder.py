"""The `--out` folder: one run at a time, and earlier results are replaced only on request."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from modality_integration.app.console import show_notes
from modality_integration.app.errors import InputError, in_words, require_folder
from modality_integration.app.options import PlotFormat
from modality_integration.metric.files import named_errors

# The files of a measurement by any command. A folder holds one measurement, so its files belong together.
PICTURES = tuple(f"{name}.{suffix}" for name in ("layers", "training") for suffix in get_args(PlotFormat))
HISTORY = "history.json"  # training history of a demo
MEASUREMENT = ("mir.json", "run.json", "before.json", HISTORY, *PICTURES)
CHECKPOINT = "checkpoint"  # the folder of an unfinished `mir compute`
LOCK = ".mir.lock"

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def taken(folder: Path, console: Console, option: str = "out") -> Iterator[None]:
    """Lock `folder`, created if missing, for a run that writes into it; InputError while another run holds the lock.

    It is a lock of the operating system and ends with the process, however that ends. If locking is impossible, a note
    says so. A folder created here that stays empty is removed again.
    """
    require_folder(folder, option)
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    try:
        lock = _locked(folder, console, option)
        try:
            yield
        finally:
            if lock is not None:
                with contextlib.suppress(OSError):  # the folder is gone or read-only: the lock file does not matter
                    (folder / LOCK).unlink()
                os.close(lock)
    finally:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # it holds files, as expected
                break


def require_free(folder: Path, files: Sequence[str], overwrite: bool) -> None:
    """InputError if `folder` holds one of `files`, the results of an earlier run, unless `overwrite`."""
    there = [] if overwrite else [name for name in files if os.path.lexists(folder / name)]
    if there:
        raise InputError(
            f"out: {folder} already holds results ({', '.join(there)}); choose another --out, or add --overwrite to "
            "replace them"
        )


def require_no_checkpoint(folder: Path) -> None:
    """InputError if `folder` has an unfinished `mir compute`, which would resume and overwrite this command's files."""
    if unfinished(folder):
        raise InputError(
            f"out: {folder} holds an unfinished run of mir compute; choose another --out, finish that run, or "
            f"delete {folder / CHECKPOINT}"
        )


def unfinished(folder: Path) -> bool:
    """Whether an interrupted `mir compute` left its checkpoint in `folder`."""
    return any((folder / CHECKPOINT).glob("rank*.json"))


def require_empty(folder: Path, overwrite: bool, option: str) -> None:
    """InputError if `folder` is not empty, unless `overwrite`."""
    if not overwrite and folder.exists() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise InputError(
            f"{option}: {folder} already holds files; choose another --{option}, or add --overwrite to replace those "
            "of the same name"
        )


def _locked(folder: Path, console: Console, option: str) -> int | None:
    """The descriptor of the folder's lock, None if locking is impossible; InputError if another process holds it."""
    file = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just ended and removed its empty folder
            continue
        except OSError as error:
            if error.errno not in FULL:
                raise InputError(f"{option}: {in_words(error)}") from error
            show_notes([f"{in_words(error)}; free some space before the results are written"], console)
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise InputError(
                f"{option}: another run is writing to {folder}{_holder(file)}; wait for it, or choose another "
                f"--{option}"
            ) from error
        except OSError as error:  # some network file systems do not support locks
            os.close(lock)
            file.unlink(missing_ok=True)
            note = f"{folder} cannot be locked ({error.strerror}); do not start a second run in it during this one"
            show_notes([note], console)
            return None
        if _is(file, lock):
            break
        os.close(lock)  # the previous run has just ended and removed its file
    try:
        os.ftruncate(lock, 0)
        with named_errors(file):
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        show_notes([f"{in_words(error)}; free some space before the results are written"], console)
    return lock


def _is(file: Path, descriptor: int) -> bool:
    """Whether the path still refers to the open file."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    """The process that holds the lock, if it has written its name yet."""
    try:
        words = file.read_text(errors="replace").strip()
    except OSError:  # it has ended in the meantime
        words = ""
    return f" ({words})" if words else ""
