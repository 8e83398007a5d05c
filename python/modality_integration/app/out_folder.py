"""The folder of `--out`: one run at a time, and what earlier ones left is replaced only where that is asked for."""

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

# What a measurement leaves, of whichever command: a folder holds one, so that its files belong together.
PICTURES = tuple(f"{name}.{suffix}" for name in ("layers", "training") for suffix in get_args(PlotFormat))
HISTORY = "history.json"  # of a demo's training
MEASUREMENT = ("mir.json", "run.json", "before.json", HISTORY, *PICTURES)
CHECKPOINT = "checkpoint"  # the folder of an unfinished `mir compute`
LOCK = ".mir.lock"

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def taken(folder: Path, console: Console, option: str = "out") -> Iterator[None]:
    """Around a run that writes into `folder`, which is made where it is missing: InputError while another run has it.

    The lock is the system's and ends with the process, however that ends. Where there can be none, a note says so. A
    folder that was made here and stayed empty goes again.
    """
    require_folder(folder, option)
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    try:
        lock = _locked(folder, console, option)
        try:
            yield
        finally:
            if lock is not None:
                with contextlib.suppress(OSError):  # the folder is gone, or has become read-only: nobody needs it then
                    (folder / LOCK).unlink()
                os.close(lock)
    finally:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # it holds something, as it should
                break


def require_free(folder: Path, files: Sequence[str], overwrite: bool) -> None:
    """InputError where `folder` holds one of `files`, results of an earlier run, unless `overwrite`."""
    there = [] if overwrite else [name for name in files if os.path.lexists(folder / name)]
    if there:
        raise InputError(
            f"out: {folder} holds results already ({', '.join(there)}): choose another --out, or add --overwrite to "
            "replace them"
        )


def require_no_checkpoint(folder: Path) -> None:
    """InputError where an unfinished `mir compute` would go on in `folder`, and replace what another command wrote."""
    if unfinished(folder):
        raise InputError(
            f"out: {folder} holds an unfinished run of mir compute: choose another --out, or finish that run, or "
            f"delete {folder / CHECKPOINT}"
        )


def unfinished(folder: Path) -> bool:
    """Whether a `mir compute` that was interrupted left its checkpoint in `folder`."""
    return any((folder / CHECKPOINT).glob("rank*.json"))


def require_empty(folder: Path, overwrite: bool, option: str) -> None:
    """InputError where `folder` holds anything, unless `overwrite`."""
    if not overwrite and folder.exists() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise InputError(
            f"{option}: {folder} holds files already: choose another --{option}, or add --overwrite to replace those "
            "of the same name"
        )


def _locked(folder: Path, console: Console, option: str) -> int | None:
    """The descriptor of the folder's lock, None where there can be none; InputError where another process has it."""
    file = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just left, and taken its empty folder with it
            continue
        except OSError as error:
            if error.errno not in FULL:
                raise InputError(f"{option}: {in_words(error)}") from error
            show_notes([f"{in_words(error)}: make room before the results come"], console)
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise InputError(
                f"{option}: another run is writing into {folder}{_holder(file)}: wait for it, or choose another "
                f"--{option}"
            ) from error
        except OSError as error:  # some network file systems have none
            os.close(lock)
            file.unlink(missing_ok=True)
            note = f"{folder} cannot be locked ({error.strerror}): start no second run in it while this one lasts"
            show_notes([note], console)
            return None
        if _is(file, lock):
            break
        os.close(lock)  # the run before has just ended and removed its file
    try:
        os.ftruncate(lock, 0)
        with named_errors(file):
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        show_notes([f"{in_words(error)}: make room before the results come"], console)
    return lock


def _is(file: Path, descriptor: int) -> bool:
    """Whether the name still stands for the open file."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    """Who has the lock, as far as that process got to say it."""
    try:
        words = file.read_text(errors="replace").strip()
    except OSError:  # it has ended meanwhile
        words = ""
    return f" ({words})" if words else ""
